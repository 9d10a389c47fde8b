"""Injects faults into a study that is a job of Slurm and prints what each cost, for docs/cluster.md.

    python -m tests.cluster.slurm_faults [FAULT ...]

Takes root and two minutes for each. Every fault has a study of its own, that of `tests/cluster/faults.py`; the job's
script is that of `cluster/slurm.sbatch` as `tunebench cluster init` fills it in.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster.deployment import wait_for
from tests.cluster.faults import write_study
from tests.cluster.slurm import Slurm, missing, slurm_cluster
from tunebench.study.journal import read_trials
from tunebench.study.record import CHECKPOINTS, Reason

_PATIENCE_S = 600.0
_NODES = ("n1", "n2")
_BUSY = ("RUNNING", "COMPLETING")
_SBATCH = "job.sbatch study.yaml"


def told_to_end(slurm: Slurm, job: int) -> None:
    """The batch shell gets SIGTERM, as 120 s before the time limit."""
    slurm.login.run(f"scancel --signal=TERM --batch {job}")


def cancelled(slurm: Slurm, job: int) -> None:
    """The user types `scancel`."""
    slurm.login.run(f"scancel {job}")


def worker_lost(slurm: Slurm, job: int) -> None:
    """All processes of the second node end at once."""
    _lost(slurm, job, "n2")


def head_lost(slurm: Slurm, job: int) -> None:
    """All processes of the first node end at once: Ray's head, the driver and the job's script."""
    _lost(slurm, job, "n1")


FAULTS: dict[str, Callable[[Slurm, int], None]] = {
    fault.__name__: fault for fault in (told_to_end, cancelled, worker_lost, head_lost)
}


def cost_of(fault: str, slurm: Slurm, seed: int) -> dict[str, object]:
    """Start a study, inject a fault, start or requeue it where Slurm does not, and bring it to its end."""
    write_study(slurm.folder / "study.yaml", seed)
    before = set(_runs(slurm))
    job = slurm.submit(_SBATCH)
    wait_for(lambda: set(_runs(slurm)) - before, _PATIENCE_S, "the run begins")
    (run,) = set(_runs(slurm)) - before
    wait_for(lambda: len(list((run / CHECKPOINTS).glob("*/last.pt"))) == len(_NODES), _PATIENCE_S, "both train")
    time.sleep(1.0)
    FAULTS[fault](slurm, job)
    ended_s = wait_for(lambda: slurm.state(job) not in _BUSY, _PATIENCE_S, "the nodes are free")
    state, left = slurm.job(job), slurm.left(0.0)
    steps = _steps(slurm)
    if state["JobState"] == "PENDING":
        lost = [host for host in slurm.nodes if host.init is None]
        for host in lost:
            slurm.lan.start(host.name)
            slurm.start(host)
        slurm.login.run(f"scontrol update JobId={job} StartTime=now")
        wait_for(lambda: slurm.state(job) == "RUNNING", _PATIENCE_S, "the job runs again")
    else:
        job = slurm.submit(_SBATCH)
    on_s = wait_for(lambda: _steps(slurm) > steps, _PATIENCE_S, "the study goes on")
    wait_for(lambda: slurm.over(job), _PATIENCE_S, "the job ends")
    trials = read_trials(run)
    assert {trial.reason for trial in trials} == {Reason.FINISHED}, fault
    trained, lost_steps = (int(sum(trial.ledger[name] for trial in trials)) for name in ("steps", "lost_steps"))
    said = {name: state[name] for name in ("JobState", "ExitCode")}
    costs = {"lost_steps": lost_steps, "trained_steps": trained, "ended_s": ended_s, "on_s": on_s}
    return {**costs, **said, "left": left, "at the end": slurm.job(job)["JobState"]}


def main(wanted: list[str]) -> None:
    """Inject the faults that are named, or all."""
    if why := missing():
        sys.exit(f"slurm_faults: a Slurm of namespaces: {why}")
    with tempfile.TemporaryDirectory() as folder, slurm_cluster(Path(folder), _NODES, pace_s=0.1) as slurm:
        slurm.describe(nodes=len(_NODES), cpus=os.cpu_count() or 1)
        for seed, fault in enumerate(wanted or FAULTS):
            print(json.dumps({"fault": fault, **cost_of(fault, slurm, seed)}), flush=True)


def _lost(slurm: Slurm, job: int, node: str) -> None:
    slurm.lan.crash(node)
    wait_for(lambda: slurm.state(job) != "RUNNING", _PATIENCE_S, "Slurm notices")


def _runs(slurm: Slurm) -> list[Path]:
    return [file.parent for file in (slurm.lan.storage / "tunebench" / "runs").glob("*/journal.log")]


def _steps(slurm: Slurm) -> int:
    return sum(file.stat().st_size for file in slurm.lan.storage.glob("steps-*"))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("slurm_faults: terminated"))  # the network is taken away first
    main(sys.argv[1:])
