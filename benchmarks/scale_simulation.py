"""Whether the driver keeps a large cluster busy: the real driver above simulated GPUs, in simulated time.

Tune's controller and its actor manager, per-arm ASHA, the queue, the recorder, the journal on a real disk and the
boards of the arms are those of a study; GPUs, cohorts, tenants and Ray itself are simulated
(`benchmarks/simulated_cluster.py`). The driver's time is what it takes on this machine. Ray's calls and waits are timed
first, with a real Ray, and charged.

With `--drivers N` the arms and the GPUs are divided among N drivers, of which one is simulated. `--events` ends a
simulation early, when so many events of Tune have been dealt with.

    python benchmarks/scale_simulation.py --gpus 1000 --slots 32 --trials 100000 --drivers 1 8 32 --out OUT
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import yaml
from ray import tune
from ray.air.execution._internal import actor_manager, event_manager
from ray.train._internal import storage
from ray.tune.execution.tune_controller import TuneController
from ray.tune.experiment import Experiment
from rich.console import Console

from benchmarks.simulated_cluster import AmpleResources, Clock, Devices, FakeRay, Load, RayCosts
from benchmarks.study_overhead import OPTIMIZERS, plan_trials
from tunebench.engine.board import write_experiment
from tunebench.engine.task import Evaluation
from tunebench.study.journal import read_trials
from tunebench.study.plan import plan_arms
from tunebench.study.record import JOURNAL, Reason, Stage
from tunebench.study.resolve import ResolvedStudy, resolve
from tunebench.study.seeds import named_seed
from tunebench.tuning.arm_boards import ArmBoards
from tunebench.tuning.asha import PerArmAsha, arm_ladders
from tunebench.tuning.pool_client import TrialQueue
from tunebench.tuning.progress import Progress
from tunebench.tuning.ray_environment import TUNE_ENVIRONMENT
from tunebench.tuning.recorder import Recorder
from tunebench.tuning.stage import Watching
from tunebench.tuning.tenancy import for_tune

EVALUATIONS, FACTOR = 40, 3  # of studies/threebpa.yaml
STEP_S = {"nequip-3": 32 / 4706, "nequip-4": 32 / 793, "allegro": 32 / 1029}
"""Seconds of a step of a cohort of 32 on one H200 (docs/throughput.md)."""
CPUS_PER_GPU = 8
_WAITED = (1000, 4000, 16000)  # futures
_FULL = 0.98  # of the slots
_BUSY = 0.9  # of its time; a driver that is busier falls behind whenever something comes in between
_ADDED_BY_TUNE = {
    "time_total_s": 1.0,
    "time_this_iter_s": 1.0,
    "timestamp": 0,
    "done": False,
    "pid": 1,
    "hostname": "simulated",
    "node_ip": "10.0.0.1",
    "date": "2026-11-22_21-00-00",
    "iterations_since_restore": 1,
}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one driver's share of the cluster.

    Attributes:
        drivers: among which the whole was divided.
        gpus, trials: of this one. begun, ended: of its trials.
        events: of Tune that were dealt with. reports: among them.
        simulated_s: until the end. driver_s: of those, in which the driver worked.
        ramp_s: until 98 % of the slots were taken, from the driver's first step; None where they never were.
        gpu_idle, slot_idle: shares of the time from then until the last trial began, in which there is always work.
        decision_s, other_s: median and 99th percentile from a report to its answer, where it decides and elsewhere.
        futures: mean number that Tune waits for at once.
        pool_ms: of the processor for one decision of the pool.
        memory_bytes: largest resident set of the process. journal_bytes: at the end.
    """

    drivers: int
    gpus: int
    trials: int
    begun: int
    ended: int
    events: int
    reports: int
    simulated_s: float
    driver_s: float
    ramp_s: float | None
    gpu_idle: float | None
    slot_idle: float | None
    decision_s: tuple[float, float] | None
    other_s: tuple[float, float] | None
    futures: float
    pool_ms: float
    memory_bytes: int
    journal_bytes: int

    @property
    def event_s(self) -> float:
        """Seconds of the driver for one event."""
        return self.driver_s / max(self.events, 1)


class _Pool:
    """Says how many slots there are; what the pool decides is simulated."""

    def __init__(self, slots: int) -> None:
        self._slots = slots

    def capacity(self) -> int:
        return self._slots

    def look(self) -> None:
        """Nothing becomes of nodes."""


class Reports:
    """Made-up learning curves: a final error of the trial's own, approached as training goes on."""

    def __init__(self, load: Load) -> None:
        self._load = load

    def __call__(self, trial: str, step: int) -> dict[str, Any]:
        """What a tenant of the trial reports to Tune at a step; as large as a real report."""
        final = np.random.default_rng(named_seed(self._load.seed, "curve", trial)).lognormal(-2.0, 0.7)
        value = float(final * (1.0 + 4.0 * np.exp(-5.0 * step / self._load.horizon)))
        metrics = {f"{name}_{kind}": value for name in ("energy_per_atom", "forces") for kind in ("mae", "rmse")}
        evaluation = Evaluation(
            step=step,
            objective=value,
            errors={"val": {readout: {**metrics, "objective": value} for readout in ("raw", "ema")}},
            wall_s=step * self._load.step_s,
            device_s=step * self._load.step_s,
            train_loss=value,
            learning_rate=0.01,
            attempts=1,
            groups=[{"rule": "adamw", "view": "matrix", "blocks": 9, "tensors": 9, "parameters": 5504, "share": 1.0}],
            horizon=self._load.horizon,
            at_rung=step in self._load.rungs,
            outcome=Reason.FINISHED if step == self._load.horizon else None,
        )
        return {**for_tune(evaluation.to_plain()), **_ADDED_BY_TUNE, "training_iteration": step}


def study_of(folder: Path, load: Load, trials: int, workloads: int) -> ResolvedStudy:
    """So many trials in arms of five optimizers on each workload."""
    data = {"source": "xtb", "system": "ethanol", "frames": {"train": 10, "val": 5, "test": 5}}
    workload = {"data": data, "model": {"family": "nequip"}, "max_steps": load.horizon}
    asha = {"grace_steps": load.rungs[0], "reduction_factor": FACTOR, "sentinels": 0, "fidelity": "truncate"}
    study = {
        "name": "scale",
        "workloads": [{"name": f"w{index}", **workload} for index in range(workloads)],
        "optimizers": list(OPTIMIZERS),
        "tune": {"trials_per_arm": max(trials // (workloads * len(OPTIMIZERS)), 3), "asha": asha},
        "resources": {"cpus_per_trial": 1, "max_failures": 2},
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study), encoding="utf-8")
    return resolve(file)


def simulate(load: Load, resolved: ResolvedStudy, run: Path, costs: RayCosts, drivers: int, events: int) -> Outcome:
    """Let one driver work on a study's tune stage."""
    arms, console = plan_arms(resolved), Console(file=(run / "console").open("w"))
    write_experiment(run, {name for arm in arms for name in (*arm.space.parameters, *arm.space.fixed)})
    journal = plan_trials(run, arms, resolved)
    records = read_trials(run)
    keys = {record.key.trial_id: record.key for record in records}
    progress = Progress(run, Stage.TUNE, console)
    for record in records:
        progress.planned(record.key, None, None)
    rungs = {arm.name: arm.rungs for arm in arms}
    scheduler = PerArmAsha(
        arm_ladders(resolved.study.tune.asha, rungs, records, 1),
        keys.__getitem__,
        lambda *given: queue.room_for(*given),
    )
    pool = _Pool(load.gpus * load.slots)
    queue = TrialQueue(list(keys), keys, pool, None, lambda: scheduler.waiting)
    clock = Clock()
    devices = Devices(load, clock, Reports(load))
    devices.plan(list(keys))
    below = FakeRay(devices, clock, costs, load.seed)
    engines = dict.fromkeys((workload.name for workload in resolved.study.workloads), "cohort")
    recorder = Recorder(
        journal, scheduler, keys, lambda key: True, progress, engines, left=lambda trial, result: devices.vacate(trial)
    )
    callbacks: list[tune.Callback] = [recorder, Watching(ArmBoards(run, arms, console), pool)]
    controller = _controller(run, queue, scheduler, callbacks, below)
    watch = _Watch(load, clock, devices, len(keys))
    with progress, clock.counting_the_disk():
        clock.start()
        while not controller.is_finished() and len(below.futures) < events:
            controller.step()
            watch.look(len(controller.get_trials()))
    latencies = {decides: _percentiles(found) for decides, found in below.latencies.items()}
    decided = sum(map(len, below.latencies.values()))
    return Outcome(
        drivers=drivers,
        gpus=load.gpus,
        trials=len(keys),
        begun=len(controller.get_trials()),
        ended=sum(trial.is_finished() for trial in controller.get_trials()),
        events=len(below.futures),
        reports=decided,
        simulated_s=clock.now,
        driver_s=clock.busy_s,
        ramp_s=watch.ramp_s,
        gpu_idle=watch.idle(0),
        slot_idle=watch.idle(1),
        decision_s=latencies[True],
        other_s=latencies[False],
        futures=float(np.mean(below.futures)),
        pool_ms=1e3 * devices.pool_s / max(devices.decisions, 1),
        memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        journal_bytes=(run / JOURNAL).stat().st_size,
    )


class _Watch:
    """Sees how busy the devices are from when they are full until the last trial has begun."""

    def __init__(self, load: Load, clock: Clock, devices: Devices, trials: int) -> None:
        self._load, self._clock, self._devices, self._trials = load, clock, devices, trials
        self._slots = load.gpus * load.slots
        self._first: tuple[float, tuple[float, float]] | None = None
        self._last: tuple[float, tuple[float, float]] | None = None

    def look(self, begun: int) -> None:
        """So many trials have begun."""
        with self._clock.stopped():
            if self._first is None and self._devices.taken() >= _FULL * min(self._slots, self._trials):
                self._first = self._clock.now, self._devices.used()
            if self._first is not None and self._last is None and begun == self._trials > self._slots:
                self._last = self._clock.now, self._devices.used()

    @property
    def ramp_s(self) -> float | None:
        """Until the slots were full."""
        return None if self._first is None else self._first[0]

    def idle(self, which: int) -> float | None:
        """Share of the devices' time (0) or of the slots' (1) in which nothing stepped."""
        if self._first is None:
            return None
        end, used = self._last or (self._clock.now, self._devices.used())
        there = (end - self._first[0]) * (self._load.gpus if which == 0 else self._slots)
        return 1.0 - (used[which] - self._first[1][which]) / there if there else None


def _controller(
    run: Path,
    queue: TrialQueue,
    scheduler: PerArmAsha,
    callbacks: list[tune.Callback],
    below: FakeRay,
) -> TuneController:
    """What `Tuner.fit` makes (Ray 2.60), above Ray that is none."""
    storage._get_ray_train_session_dir = lambda: str(run / ".session")
    experiment = Experiment(
        name="tune",
        run=_never_run,
        config=queue.param_space,
        num_samples=queue.num_samples,
        storage_path=str(run / ".tune"),
        trial_name_creator=lambda trial: str(trial.config["trial"]),
        trial_dirname_creator=lambda trial: str(trial.config["trial"]),
        max_failures=2,
    )
    queue.add_configurations([experiment])
    controller = TuneController(
        search_alg=queue,
        scheduler=scheduler,
        callbacks=callbacks,
        storage=experiment.storage,
        reuse_actors=True,
        resource_manager_factory=lambda: AmpleResources(below),
    )
    manager = controller._actor_manager

    def tracked(future: Any) -> bool:
        events = (manager._actor_state_events, manager._actor_task_events)
        return any(future in each._tracked_futures for each in events)

    actor_manager.ray = event_manager.ray = below.namespace(tracked)
    remote = ray.remote(_Trainable)
    controller._class_cache.get = lambda trainable: remote
    return controller


class _Trainable:
    """Never started."""


def _never_run(config: Mapping[str, Any]) -> None:
    raise AssertionError("trials are simulated")


def _percentiles(seconds: Sequence[float]) -> tuple[float, float] | None:
    if not seconds:
        return None
    median, late = np.percentile(seconds, [50, 99])
    return float(median), float(late)


# --- Ray's own costs -------------------------------------------------------------------------------------------------


class _Answers:
    async def at_once(self, report: dict[str, Any]) -> dict[str, Any]:
        return report

    async def never(self) -> None:
        import asyncio

        await asyncio.Event().wait()


def measure_ray() -> RayCosts:
    """Time a call of an actor and a wait for one of many futures, on the processor of the caller's thread."""
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    actor = ray.remote(_Answers).options(max_concurrency=2 * max(_WAITED)).remote()
    load = Load(gpus=1, slots=1, every_steps=1, horizon=40, rungs=(10,), step_s=1.0)
    report = Reports(load)("trial", 1)
    ray.get(actor.at_once.remote(report))
    answers = [actor.at_once.remote(report) for _ in range(300)]
    ray.wait(answers, num_returns=len(answers))
    call = _seconds(lambda: ray.get(actor.at_once.remote(report)), 300)
    waits, futures = [], [actor.never.remote() for _ in range(max(_WAITED))]
    for number in _WAITED:
        some = [*futures[:number], answers[0]]
        waits.append(_seconds(lambda some=some: ray.wait(some, num_returns=1, timeout=0.1), 20))
    each, first = np.polyfit(_WAITED, waits, 1)
    ray.shutdown()
    return RayCosts(call=call, wait=max(float(first), 0.0), wait_each=max(float(each), 0.0))


def _seconds(do: Callable[[], Any], times: int) -> float:
    began = time.thread_time()
    for _ in range(times):
        do()
    return (time.thread_time() - began) / times


# --- command ---------------------------------------------------------------------------------------------------------


def told(found: Outcome) -> str:
    """One line about a simulation."""

    def share(value: float | None) -> str:
        return "unknown" if value is None else f"{100 * value:.1f} %"

    def both(value: tuple[float, float] | None) -> str:
        return "none" if value is None else f"{value[0]:.3g} s, {value[1]:.3g} s"

    ramp = "not over" if found.ramp_s is None else f"{found.ramp_s:.0f} s"
    return (
        f"{found.drivers} driver(s), each {found.gpus} GPUs and {found.trials} trials: {found.ended} ended in "
        f"{found.simulated_s:.0f} s, {found.events} events, {found.reports} reports; driver busy "
        f"{share(found.driver_s / found.simulated_s)}, "
        f"{1e3 * found.event_s:.2f} ms an event, {found.futures:.0f} futures at once; "
        f"ramp {ramp}; idle GPUs {share(found.gpu_idle)}, slots {share(found.slot_idle)}; "
        f"decision p50, p99 {both(found.decision_s)}, other reports {both(found.other_s)}; "
        f"pool {found.pool_ms:.2f} ms a decision; memory {found.memory_bytes / 2**20:.0f} MiB, "
        f"journal {found.journal_bytes / 2**20:.1f} MiB"
    )


def fitted(outcomes: Sequence[Outcome]) -> tuple[float, float]:
    """Seconds of the driver for an event, and further ones for each trial at once: least squares over outcomes."""
    each, alone = np.polyfit([found.futures for found in outcomes], [found.event_s for found in outcomes], 1)
    return float(alone), float(each)


def most_at_once(alone_s: float, each_s: float, stretch_s: float) -> int:
    """Trials at once, each with a report after every stretch, that keep a driver busy for 90 % of its time.

    The positive root of ``trials * (alone_s + each_s * trials) = 0.9 * stretch_s``.
    """
    root = float(np.sqrt(alone_s**2 + 4.0 * each_s * _BUSY * stretch_s)) if each_s > 0.0 else 0.0
    return int((root - alone_s) / (2.0 * each_s)) if each_s > 0.0 else int(_BUSY * stretch_s / alone_s)


def capacities(outcomes: Sequence[Outcome], horizon: int) -> str:
    """One line for each model: how many GPUs with cohorts of 32 one driver keeps up with."""
    alone, each = fitted(outcomes)
    lines = [f"an event takes {1e3 * alone:.2f} ms and {1e6 * each:.2f} us for each trial at once"]
    for model, step_s in STEP_S.items():
        most = most_at_once(alone, each, horizon / EVALUATIONS * step_s)
        lines.append(f"{model}: one driver keeps up with {most} trials at once, {most // 32} GPUs of 32 slots")
    return "\n".join(lines)


def figure(outcomes: Sequence[Outcome], horizon: int, file: Path) -> None:
    """Draw what an event costs the driver over trials at once, and what it may cost for each model."""
    from matplotlib.figure import Figure

    from analysis.figure_style import figure_style

    alone, each = fitted(outcomes)
    most = 32_000
    trials = np.geomspace(100, most, 200)
    with figure_style():
        drawn = Figure(figsize=(5.2, 3.2), layout="constrained")
        axis = drawn.subplots()
        for model, step_s in STEP_S.items():
            axis.plot(trials, 1e3 * _BUSY * horizon / EVALUATIONS * step_s / trials, label=f"allowed, {model}")
        axis.plot(trials, 1e3 * (alone + each * trials), color="black", linewidth=0.8, linestyle=":")
        axis.plot([o.futures for o in outcomes], [1e3 * o.event_s for o in outcomes], "ko", label="driver, simulated")
        axis.set(xscale="log", yscale="log", xlabel="trials at once of one driver", ylabel="ms for one event")
        axis.legend()
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(file, dpi=150)


def one(arguments: argparse.Namespace, drivers: int, costs: RayCosts) -> Outcome:
    """Simulate one of so many drivers, in this process."""
    gpus = max(arguments.gpus // drivers, 1)
    every = max(arguments.horizon // EVALUATIONS, 1)
    load = Load(
        gpus=gpus,
        slots=arguments.slots,
        every_steps=every,
        horizon=every * EVALUATIONS,
        rungs=(every * EVALUATIONS // 4, every * EVALUATIONS * 3 // 4),
        step_s=STEP_S[arguments.model],
        crashes=arguments.crashes,
        losses_per_day=arguments.losses_per_day,
        seed=arguments.seed,
    )
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(200, int(1.1 * gpus * CPUS_PER_GPU)))
    with tempfile.TemporaryDirectory() as folder:
        workloads = max(arguments.workloads // drivers, 1)
        resolved = study_of(Path(folder), load, arguments.trials // drivers, workloads)
        return simulate(load, resolved, Path(folder), costs, drivers, arguments.events)


def main() -> None:
    """Simulate each division in a process of its own, one after the other, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--workloads", type=int, default=20, help="with five arms each")
    parser.add_argument("--model", choices=list(STEP_S), default="nequip-4")
    parser.add_argument("--horizon", type=int, default=36_000, help="steps of a trial")
    parser.add_argument(
        "--crashes", type=float, default=0.0005, help="share of evaluations before which a trial crashes"
    )
    parser.add_argument("--losses-per-day", type=float, default=0.1, help="of each GPU")
    parser.add_argument("--drivers", type=int, nargs="+", default=[1])
    parser.add_argument("--events", type=int, default=sys.maxsize, help="end a simulation after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for outcomes as JSON")
    parser.add_argument("--here", help="costs of Ray as JSON: simulate in this process and print JSON")
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(asdict(one(arguments, arguments.drivers[0], RayCosts(**json.loads(arguments.here))))))
        return
    costs = measure_ray()
    print(
        f"Ray: {1e6 * costs.call:.0f} us a call, "
        f"{1e6 * costs.wait:.0f} us a wait and {1e6 * costs.wait_each:.2f} us "
        f"for each future in it; load average {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    outcomes = []
    for drivers in arguments.drivers:
        command = [
            sys.executable,
            __file__,
            *sys.argv[1:],
            "--drivers",
            str(drivers),
            "--here",
            json.dumps(asdict(costs)),
        ]
        environment = {**os.environ, **TUNE_ENVIRONMENT}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        outcomes.append(Outcome(**json.loads(done.stdout.splitlines()[-1])))
        print(told(outcomes[-1]), flush=True)
    if len(outcomes) > 1:
        print(capacities(outcomes, arguments.horizon))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        content = {"ray": asdict(costs), "outcomes": [asdict(found) for found in outcomes]}
        (arguments.out / "scale.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if len(outcomes) > 1:
            figure(outcomes, arguments.horizon, arguments.out / "scale.png")


if __name__ == "__main__":
    main()
