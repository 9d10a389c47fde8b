"""Whether the driver keeps a large cluster busy: the real driver above simulated GPUs, in simulated time.

Tune's controller, the manager of its trials' seats, per-arm ASHA, the queue, the recorder, the journal on a real disk
and the boards of the arms are those of a study; GPUs, cohorts, the tenants at their reception and Ray itself are
simulated (`benchmarks/simulated_cluster.py`). The driver's time is what it takes on this machine. Ray's calls, objects
and waits, and what a real reception takes for its tenants, are timed first, with a real Ray, and charged.

With `--drivers N` the arms and the GPUs are divided among N drivers, of which one is simulated, as
`tunebench run --drivers N` does: it hands its entries to a main process, which writes them, and waits for those that
bind. The main process' work for this driver is done here and timed apart; that it has N drivers to serve, which may
wait for each other, is not simulated, and the boards of the arms, for which it takes a twentieth of its time at most,
are left out. `--events` ends a simulation early, when so many events of Tune have been dealt with.

    python benchmarks/scale_simulation.py --gpus 1000 --slots 32 --trials 100000 --drivers 1 8 32 --out OUT
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
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

from benchmarks.simulated_cluster import Clock, Costs, Devices, FakeRay, Load
from benchmarks.study_overhead import OPTIMIZERS, plan_trials
from tunebench.engine.board import write_experiment
from tunebench.engine.task import Evaluation
from tunebench.study.journal import read_trials
from tunebench.study.plan import plan_arms
from tunebench.study.record import JOURNAL, Reason, Stage
from tunebench.study.resolve import ResolvedStudy, resolve
from tunebench.study.run_copy import RunCopy
from tunebench.study.seeds import named_seed
from tunebench.tuning import trial_actors
from tunebench.tuning.arm_boards import ArmBoards
from tunebench.tuning.asha import PerArmAsha, arm_ladders
from tunebench.tuning.division import Places
from tunebench.tuning.entries import Called, Clerk, Entry, binds
from tunebench.tuning.handle import Handle
from tunebench.tuning.pool_client import TrialQueue, start_here
from tunebench.tuning.progress import Progress
from tunebench.tuning.ray_environment import TUNE_ENVIRONMENT
from tunebench.tuning.reception import Reception
from tunebench.tuning.recorder import Recorder
from tunebench.tuning.shard import TELL_EVERY_S
from tunebench.tuning.shares import Shares
from tunebench.tuning.stage import Watching
from tunebench.tuning.tenancy import VISIT, for_tune
from tunebench.tuning.trial_actors import AFTER_LAST, use_trial_actors

EVALUATIONS, FACTOR = 40, 3  # of studies/threebpa.yaml
STEP_S = {"nequip-3": 32 / 4706, "nequip-4": 32 / 793, "allegro": 32 / 1029}
"""Seconds of a step of a cohort of 32 on one H200, from a run within 4 % of that in docs/throughput.md."""
CPUS_PER_GPU = 8
_WAITED = (1000, 4000, 16000)  # futures
_TENANTS, _REPORTS = 500, 8  # of each, that a real reception passes on
_COSTS = "costs"
_FULL = 0.98  # of the slots
_BUSY = 0.9  # of its time; a driver that is busier falls behind whenever something comes in between


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
        reception_s: of the processor of the reception, where all tenants of this driver live.
        memory_bytes: largest resident set of the process. journal_bytes: at the end.
        entries, messages: that went to the main process. main_s: its time on the processor for them, calls of Ray
            included. disk_s: its waits for the disk, which it shares among all drivers that wait for it.
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
    reception_s: float
    memory_bytes: int
    journal_bytes: int
    entries: int = 0
    messages: int = 0
    main_s: float = 0.0
    disk_s: float = 0.0

    @property
    def main_busy(self) -> float:
        """Share of the main process' time for all drivers that are like this one; beyond 1 it cannot keep up."""
        return self.drivers * self.main_s / self.simulated_s

    @property
    def event_s(self) -> float:
        """Seconds of the driver for one event."""
        return self.driver_s / max(self.events, 1)


class _Pool:
    """Says how many slots there are; what the pool decides is simulated."""

    def __init__(self, slots: int) -> None:
        self._slots = slots

    actor = None

    def capacity(self) -> int:
        return self._slots

    def others(self) -> int | None:
        return None

    def vacate(self, trial: str, visit: str) -> None:
        """Slots get free where they are simulated."""

    def look(self) -> None:
        """Nothing becomes of nodes."""


class _MainProcess:
    """What a shard hands its entries to: written here and now, timed apart from the shard, which waits for it.

    Args:
        clerk: writes them.
        places: among which the shard's are.
        clock: of the simulation, on which the shard works and waits.
        costs: of Ray's calls; a message is one call of the main process', with a wait, and an answer of the shard's.
    """

    def __init__(self, clerk: Clerk, places: Places, clock: Clock, costs: Costs) -> None:
        self._clerk, self._places, self._clock, self._costs = clerk, places, clock, costs
        self._entries: list[Entry] = []
        self._told_at = 0.0
        self.entries = self.messages = 0
        self.main_s = self.disk_s = 0.0

    def write(self, entries: Sequence[Entry]) -> None:
        """As `Outbox.write`."""
        self._entries += entries
        waits = any(map(binds, entries))
        if waits or self._clock.now - self._told_at >= TELL_EVERY_S:
            self._tell(waits=waits)

    def _tell(self, *, waits: bool) -> None:
        self._clock.charge(self._costs.call)
        began = self._clock.now
        with self._clock.stopped(), _DiskTime() as disk:
            processor = time.thread_time()
            self._clerk.write(self._entries)
            self._places.take(0, self._entries)
            self._places.give(0, 1 << 20)
            main_s = time.thread_time() - processor + self._costs.call + self._costs.wait
        self.entries += len(self._entries)
        self.messages += 1
        self.main_s += main_s
        self.disk_s += disk.waited_s
        self._entries, self._told_at = [], began
        if waits:
            self._clock.wait_until(began + main_s + disk.waited_s)


class _DiskTime:
    """Counts the time in which this process waits for the disk and does nothing."""

    def __enter__(self) -> _DiskTime:
        self.waited_s, self._sync = 0.0, os.fsync
        os.fsync = self._counted
        return self

    def __exit__(self, *exception: object) -> None:
        os.fsync = self._sync

    def _counted(self, file: Any) -> None:
        began, used = time.perf_counter(), time.thread_time()
        self._sync(file)
        self.waited_s += max(time.perf_counter() - began - (time.thread_time() - used), 0.0)


class Reports:
    """Made-up learning curves: a final error of the trial's own, approached as training goes on."""

    def __init__(self, load: Load) -> None:
        self._load = load

    def __call__(self, trial: str, step: int) -> dict[str, Any]:
        """What a tenant of the trial reports to Tune at a step, but for its place."""
        return for_tune(self.plain(trial, step))

    def plain(self, trial: str, step: int) -> dict[str, Any]:
        """What its cohort has measured; as large as a real evaluation."""
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
        return evaluation.to_plain()


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


def simulate(load: Load, resolved: ResolvedStudy, run: Path, costs: Costs, drivers: int, events: int) -> Outcome:
    """Let one driver work on a study's tune stage."""
    arms, console = plan_arms(resolved), Console(file=(run / "console").open("w"))
    write_experiment(run, {name for arm in arms for name in (*arm.space.parameters, *arm.space.fixed)})
    journal = plan_trials(run, arms, resolved)
    records = read_trials(run)
    keys = {record.key.trial_id: record.key for record in records}
    progress = Progress.of(run, Stage.TUNE, console, records)
    scheduler = PerArmAsha(
        arm_ladders(resolved.study.tune.asha, {arm.name: arm.rungs for arm in arms}, records, 1),
        keys.__getitem__,
        lambda *given: queue.first_with_room(*given),
    )
    pool = _Pool(load.gpus * load.slots)
    queue = TrialQueue(
        list(keys), keys, pool, lambda: scheduler.waiting, called=lambda trial: write([Called(key=keys[trial])])
    )
    clock = Clock()
    devices = Devices(load, clock, costs, Reports(load))
    devices.plan(list(keys))
    below = FakeRay(devices, clock, costs, load.seed)
    engines = dict.fromkeys((workload.name for workload in resolved.study.workloads), "cohort")
    clerk = Clerk(journal, progress, lambda key: True, RunCopy(run, None))
    main = _MainProcess(clerk, Places([{name: key.workload for name, key in keys.items()}]), clock, costs)
    write = clerk.write if drivers == 1 else main.write
    recorder = Recorder(write, scheduler, keys, run, engines, left=lambda trial, result: devices.vacate(result[VISIT]))
    boards = [Watching(ArmBoards(run, arms, console), pool)] if drivers == 1 else []
    callbacks: list[tune.Callback] = [recorder, *boards]
    controller = _controller(run, queue, scheduler, callbacks, below)
    watch = _Watch(load, clock, devices, len(keys))
    own_disk = clock.counting_the_disk() if drivers == 1 else nullcontext()
    with progress, own_disk:
        clock.start()
        _drive(controller, below, watch, events)
    latencies = {decides: _percentiles(found) for decides, found in below.latencies.items()}
    return Outcome(
        drivers=drivers,
        gpus=load.gpus,
        trials=len(keys),
        begun=len(controller.get_trials()),
        ended=sum(trial.is_finished() for trial in controller.get_trials()),
        events=len(below.futures),
        reports=sum(map(len, below.latencies.values())),
        simulated_s=clock.now,
        driver_s=clock.busy_s,
        ramp_s=watch.ramp_s,
        gpu_idle=watch.idle(0),
        slot_idle=watch.idle(1),
        decision_s=latencies[True],
        other_s=latencies[False],
        futures=float(np.mean(below.futures)),
        pool_ms=1e3 * devices.pool_s / max(devices.decisions, 1),
        reception_s=devices.reception_s,
        memory_bytes=_most_memory_bytes(),
        journal_bytes=(run / JOURNAL).stat().st_size,
        entries=main.entries,
        messages=main.messages,
        main_s=main.main_s,
        disk_s=main.disk_s,
    )


def _drive(controller: TuneController, below: FakeRay, watch: _Watch, events: int) -> None:
    """Until all trials have ended or so many events were seen."""
    while not controller.is_finished() and len(below.futures) < events:
        controller.step()
        watch.look(len(controller.get_trials()))


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
        run=tune.with_resources(_never_run, Shares({}, {})),
        config=queue.param_space,
        num_samples=queue.num_samples,
        storage_path=str(run / ".tune"),
        trial_name_creator=lambda trial: str(trial.config["trial"]),
        trial_dirname_creator=lambda trial: str(trial.config["trial"]),
        max_failures=2,
    )
    queue.add_configurations([experiment])
    for module in (actor_manager, event_manager, trial_actors):
        module.ray = below.module
    use_trial_actors(lambda: below.reception)
    controller = TuneController(
        search_alg=queue, scheduler=scheduler, callbacks=callbacks, storage=experiment.storage, reuse_actors=True
    )
    remote = ray.remote(_Trainable)
    controller._class_cache.get = lambda trainable: remote
    return controller


class _Trainable:
    """Never started."""


def _never_run(config: Mapping[str, Any]) -> None:
    raise AssertionError("trials are simulated")


def _most_memory_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _percentiles(seconds: Sequence[float]) -> tuple[float, float] | None:
    if not seconds:
        return None
    median, late = np.percentile(seconds, [50, 99])
    return float(median), float(late)


# --- what is charged -------------------------------------------------------------------------------------------------


class _Answers:
    async def at_once(self, report: dict[str, Any]) -> dict[str, Any]:
        return report

    async def never(self) -> None:
        await asyncio.Event().wait()


class _TimedReception(Reception):
    async def busy_s(self) -> float:
        """Seconds on the processor of the thread in which its tenants live."""
        return time.thread_time()


class _ReadyPool:
    """A pool that has a place for everybody, and itself the cohort, which has all reports at once."""

    def __init__(self, evaluation: dict[str, Any]) -> None:
        self._evaluation = evaluation

    async def place(self, trial: str, reception: Handle, visit: str) -> tuple[int, Handle, str]:
        return 0, ray.get_runtime_context().current_actor, ""

    async def next_report(self, trial: str, visit: str, heard: int) -> dict[str, Any]:
        return {"evaluation": self._evaluation, "decides": False}

    async def leave(self, trial: str, visit: str) -> None:
        """Nothing."""


def measure_costs() -> Costs:
    """Time what Ray takes of the caller's thread, and what tenants take of their reception's, on the processor."""
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    reports = Reports(Load(gpus=1, slots=1, every_steps=1, horizon=40, rungs=(10,), step_s=1.0))
    actor = ray.remote(_Answers).options(max_concurrency=2 * max(_WAITED)).remote()
    report = reports("trial", 1)
    ray.get(actor.at_once.remote(report))
    answers = [actor.at_once.remote(report) for _ in range(300)]
    ray.wait(answers, num_returns=len(answers))
    call = _seconds(lambda: ray.get(actor.at_once.remote(report)), 300)
    put = _seconds(lambda: ray.get(ray.put(None)), 300)
    waits, futures = [], [actor.never.remote() for _ in range(max(_WAITED))]
    for number in _WAITED:
        some = [*futures[:number], answers[0]]
        waits.append(_seconds(lambda some=some: ray.wait(some, num_returns=1, timeout=0.1), 20))
    each, first = np.polyfit(_WAITED, waits, 1)
    stay, passed_on = _measure_reception(reports.plain("trial", 1))
    ray.shutdown()
    return Costs(
        call=call, put=put, wait=max(float(first), 0.0), wait_each=max(float(each), 0.0), stay=stay, report=passed_on
    )


def _measure_reception(evaluation: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a real reception for the stay of a tenant without its reports, and for one report."""
    with tempfile.TemporaryDirectory() as run:
        pool = start_here(_ReadyPool, evaluation)
        reception = start_here(_TimedReception, pool, Path(run), None, AFTER_LAST)

        def report(stays: Sequence[str]) -> float:
            ray.get([reception.train.remote(stay, "trial") for stay in stays])
            return float(ray.get(reception.busy_s.remote()))

        report(["to warm up"])
        stays = [str(number) for number in range(_TENANTS)]
        began = ray.get(reception.busy_s.remote())
        first, *_, last = [report(stays) for _ in range(1 + _REPORTS)]
        ray.get([reception.leave.remote(stay) for stay in stays])
        ended = ray.get(reception.busy_s.remote())
    each = (last - first) / _REPORTS / _TENANTS
    return (ended - last + first - began) / _TENANTS - each, each


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
        f"pool {found.pool_ms:.2f} ms a decision; reception busy {share(found.reception_s / found.simulated_s)}; "
        f"memory {found.memory_bytes / 2**20:.0f} MiB, journal {found.journal_bytes / 2**20:.1f} MiB"
        f"{_told_of_main(found)}"
    )


def _told_of_main(found: Outcome) -> str:
    """What the main process has of a driver, where it is another process."""
    if not found.messages:
        return ""
    return (
        f"; main process: {found.entries} entries in {found.messages} messages, "
        f"{1e3 * found.main_s / found.messages:.2f} ms of the processor for a message and "
        f"{1e6 * found.main_s / found.events:.0f} us for an event, {1e3 * found.disk_s / found.messages:.2f} ms of the "
        f"disk for a message; busy for all {found.drivers} drivers {100 * found.main_busy:.0f} %"
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


def one(arguments: argparse.Namespace, drivers: int, costs: Costs) -> Outcome:
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
    parser.add_argument("--here", help=f"costs as JSON: simulate in this process; {_COSTS}: time them; print JSON")
    arguments = parser.parse_args()
    if arguments.here == _COSTS:
        print(json.dumps(asdict(measure_costs())))
        return
    if arguments.here:
        print(json.dumps(asdict(one(arguments, arguments.drivers[0], Costs(**json.loads(arguments.here))))))
        return
    costs = Costs(**_in_process(_COSTS))
    print(
        f"Ray: {1e6 * costs.call:.0f} us a call, {1e6 * costs.put:.0f} us an object, "
        f"{1e6 * costs.wait:.0f} us a wait and {1e6 * costs.wait_each:.2f} us for each future in it; "
        f"reception: {1e6 * costs.report:.0f} us a report, {1e6 * costs.stay:.0f} us a stay; "
        f"load average {os.getloadavg()[0]:.1f}",
        flush=True,
    )
    outcomes = []
    for drivers in arguments.drivers:
        outcomes.append(Outcome(**_in_process(json.dumps(asdict(costs)), "--drivers", str(drivers))))
        print(told(outcomes[-1]), flush=True)
    if len(outcomes) > 1:
        print(capacities(outcomes, arguments.horizon))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        content = {"costs": asdict(costs), "outcomes": [asdict(found) for found in outcomes]}
        (arguments.out / "scale.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        if len(outcomes) > 1:
            figure(outcomes, arguments.horizon, arguments.out / "scale.png")


def _in_process(here: str, *options: str) -> dict[str, Any]:
    """What this script prints with further options in a process of its own, whose Ray has a token of its own."""
    environment = {**TUNE_ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    command = [sys.executable, __file__, *sys.argv[1:], *options, "--here", here]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment})
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
