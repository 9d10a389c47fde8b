"""Injects faults into a study on a local network and prints what each cost, for docs/cluster.md.

    python -m tests.cluster.faults [FAULT ...]

Takes root and some minutes for each. The cluster has the settings of `cluster/onprem.yaml`, unchanged. Every fault has
a study of its own: trials of 60 steps, each with a pause of 0.1 s, evaluated every 10 steps. Two train at once, each
on a host of its own; a third host is idle.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.deployment import Deployment, wait_for
from tests.cluster.lan import Host, local_network, missing
from tests.tuning.conftest import STUDY
from tunebench.study.record import Reason
from tunebench.tuning.trial_log import LOGS

_PATIENCE_S = 600.0
_CUT_S = (20.0, 50.0)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a fault cost.

    Attributes:
        lost_steps: made again, over all trials. trained_steps: of all trials, without those.
        idle_s: seconds from the fault until a step was made in the place of the lost ones; of a start by hand, from it.
        seen: what else was measured.
    """

    lost_steps: int
    trained_steps: int
    idle_s: float
    seen: str


def write_study(file: Path, seed: int, max_steps: int = 60) -> None:
    """A study of four trials; each seed has a run directory of its own."""
    workload = {**STUDY["workloads"][0], "max_steps": max_steps, "evaluate_every_steps": 10}
    resources = {**STUDY["resources"], "concurrent_trials": 2}
    stages = {"tune": {"trials_per_arm": 1, "asha": None}, "confirm": {"top_k": 1, "seeds": 1}}
    study = {**STUDY, "name": "faults", "seed": seed, "workloads": [workload], "resources": resources, **stages}
    file.write_text(yaml.safe_dump(study))


def worker_killed(deployment: Deployment) -> tuple[float, str]:
    """All processes of a host end at once; its network says so to the others."""
    busy = _busy_worker(deployment)
    deployment.lan.crash(busy.name)
    return _until_others_step(deployment, busy), "kill -9 of the host's first process"


def cable_pulled(deployment: Deployment) -> tuple[float, str]:
    """A host cannot be reached any more, and nothing says so."""
    busy = _busy_worker(deployment)
    deployment.lan.cable(busy.name, plugged=False)
    return _until_others_step(deployment, busy), "ip link set ... down"


def _cut_for(seconds: float, deployment: Deployment) -> tuple[float, str]:
    busy = _busy_worker(deployment)
    deployment.lan.cable(busy.name, plugged=False)
    time.sleep(seconds)
    deployment.lan.cable(busy.name, plugged=True)
    began, ended = time.monotonic(), len(deployment.ended())
    wait_for(lambda: len(deployment.ended()) > ended, _PATIENCE_S, "a trial ends")
    lost = (deployment.run / LOGS / "pool.log").read_text().count("ended: ")
    return time.monotonic() - began, f"{lost} cohorts were lost; the time is that until a trial ended"


def short_cut(deployment: Deployment) -> tuple[float, str]:
    """A host cannot be reached for 20 s."""
    return _cut_for(_CUT_S[0], deployment)


def long_cut(deployment: Deployment) -> tuple[float, str]:
    """A host cannot be reached for 50 s."""
    return _cut_for(_CUT_S[1], deployment)


def driver_killed(deployment: Deployment) -> tuple[float, str]:
    """The driver gets SIGKILL, and somebody submits the study again."""
    _busy_worker(deployment)
    deployment.head.run("pkill -9 -f 'm tunebench run'")
    steps = _all_steps(deployment)
    began = time.monotonic()
    deployment.submit()
    wait_for(lambda: _all_steps(deployment) > steps, _PATIENCE_S, "the study goes on")
    return time.monotonic() - began, "from the second `ray submit`"


def head_killed(deployment: Deployment) -> tuple[float, str]:
    """The head is switched off and on; somebody runs `ray up` and submits the study again."""
    _busy_worker(deployment)
    deployment.lan.crash("head")
    deployment.lan.start("head")
    began = time.monotonic()
    deployment.up()
    up_s = time.monotonic() - began
    steps = _all_steps(deployment)
    deployment.submit()
    wait_for(lambda: _all_steps(deployment) > steps, _PATIENCE_S, "the study goes on")
    return time.monotonic() - began, f"from `ray up`, which took {up_s:.0f} s"


def laptop_closed(deployment: Deployment) -> tuple[float, str]:
    """The machine that submitted the study is switched off."""
    _busy_worker(deployment)
    deployment.lan.crash("laptop")
    steps, gap = _all_steps(deployment), 0.0
    for _ in range(10):
        gap = max(gap, wait_for(lambda now=steps: _all_steps(deployment) > now, _PATIENCE_S, "a step"))
        steps = _all_steps(deployment)
    deployment.lan.start("laptop")
    return 0.0, f"longest wait for a step in the moments after: {gap:.1f} s"


FAULTS: dict[str, Callable[[Deployment], tuple[float, str]]] = {
    fault.__name__: fault
    for fault in (laptop_closed, worker_killed, short_cut, long_cut, cable_pulled, driver_killed, head_killed)
}


def cost_of(fault: str, deployment: Deployment, seed: int) -> Cost:
    """Start a study, inject a fault, and bring the study to its end."""
    write_study(deployment.lan.storage / "studies" / "study.yaml", seed)
    deployment.ray("rsync-up", "/srv/studies/", "studies/")
    before = set(deployment.runs())
    deployment.submit()
    wait_for(lambda: set(deployment.runs()) - before, _PATIENCE_S, "the run begins")
    idle_s, seen = FAULTS[fault](deployment)
    wait_for(deployment.finished, _PATIENCE_S, "the study finishes")
    trials = deployment.trials()
    assert {trial.reason for trial in trials} == {Reason.FINISHED}, fault
    steps, lost = (int(sum(trial.ledger[name] for trial in trials)) for name in ("steps", "lost_steps"))
    return Cost(lost_steps=lost, trained_steps=steps, idle_s=idle_s, seen=seen)


def main(wanted: list[str]) -> None:
    """Inject the faults that are named, or all."""
    if why := missing():
        sys.exit(f"faults: a network of namespaces: {why}")
    names = ["laptop", "head", "w1", "w2"]
    with tempfile.TemporaryDirectory() as folder, local_network(Path(folder), names, on=names) as lan:
        study = Path(folder) / "study.yaml"
        write_study(study, 0)
        deployment = Deployment(lan, study)
        deployment.prepare(pace_s=0.1)
        deployment.up()
        for seed, fault in enumerate(wanted or FAULTS):
            for worker in deployment.workers:
                _repaired(deployment, worker)
            cost: dict[str, Any] = asdict(cost_of(fault, deployment, seed))
            print(json.dumps({"fault": fault, **cost}), flush=True)


def _repaired(deployment: Deployment, worker: Host) -> None:
    """Switch a worker on, plug its cable in, and wait until it is part of the cluster."""
    deployment.lan.cable(worker.name, plugged=True)
    if worker.init is None:
        deployment.lan.start(worker.name)

    def is_there() -> bool:
        nodes = deployment.head.run("ray list nodes 2>/dev/null || ray status", check=False).stdout
        return f"{len(deployment.workers) + 1} local.cluster.node" in nodes

    wait_for(is_there, _PATIENCE_S, f"{worker.name} joins")


def _busy_worker(deployment: Deployment) -> Host:
    """A worker that makes steps, some time after the first checkpoint of the run."""
    wait_for(deployment.checkpoints, _PATIENCE_S, "a trial has something to lose")
    before = {host.name: deployment.steps_on(host) for host in deployment.workers}

    def busy() -> list[Host]:
        return [host for host in deployment.workers if deployment.steps_on(host) > before[host.name] + 3]

    wait_for(busy, _PATIENCE_S, "a worker trains")
    return busy()[0]


def _others(deployment: Deployment, host: Host) -> Callable[[], bool]:
    """Whether a host that was idle until now makes steps, or one that trains makes those of `host`, too."""
    idle = [each for each in (deployment.head, *deployment.workers) if each is not host]
    before = {each.name: deployment.steps_on(each) for each in idle}
    time.sleep(1.0)
    resting = [each for each in idle if deployment.steps_on(each) == before[each.name]]
    return lambda: any(deployment.steps_on(each) > before[each.name] for each in resting)


def _until_others_step(deployment: Deployment, host: Host) -> float:
    return wait_for(_others(deployment, host), _PATIENCE_S, "another host takes its place") + 1.0


def _all_steps(deployment: Deployment) -> int:
    return sum(deployment.steps_on(host) for host in (deployment.head, *deployment.workers))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("faults: terminated"))  # the network is taken away first
    main(sys.argv[1:])
