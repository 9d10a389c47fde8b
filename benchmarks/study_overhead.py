"""What the driver of a study costs: many trials of a mock trainable through the whole stack, beside plain Tune.

Trials replay made-up learning curves and train nothing. One side is tunebench's: Tuner, per-arm ASHA, recorder, journal
and boards. The other is Tune alone with its own ASHA, its logs off. Each side runs in a process of its own, and sides
alternate. Printed are driver seconds on the processor per trial and per report, seconds by the clock, the driver's
memory in the second half of the trials against the first, the size of the journal, and at last how many times as much
a trial and a report cost tunebench's driver. With `--drivers N` tunebench's side is a main process and N drivers, as
with `tunebench run --drivers N`; what is printed of a driver is then of the main process.

    python benchmarks/study_overhead.py [--trials 1000] [--repeats 1] [--cpus 2] [--drivers 1] [--profile ours.prof]
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from rich.console import Console

from tunebench.engine.board import write_experiment
from tunebench.engine.task import Evaluation
from tunebench.study.journal import JournalWriter, read_trials
from tunebench.study.plan import ArmPlan, plan_arms
from tunebench.study.record import JOURNAL, Reason, Stage, TrialRecord
from tunebench.study.resolve import ResolvedStudy, resolve
from tunebench.study.run_copy import RunCopy
from tunebench.tuning import driver, shards
from tunebench.tuning.arm_boards import ArmBoards
from tunebench.tuning.driver import DriverWork, drive
from tunebench.tuning.entries import Clerk, Ended, Entry, Evaluated, Write
from tunebench.tuning.pool_client import PoolClient
from tunebench.tuning.progress import Progress
from tunebench.tuning.ray_environment import TUNE_ENVIRONMENT
from tunebench.tuning.samplers import configuration, sobol_points
from tunebench.tuning.stage import Watching
from tunebench.tuning.tenancy import for_tune

HORIZON, EVALUATIONS, GRACE, FACTOR = 400, 20, 100, 3
RUNGS = (GRACE, GRACE * FACTOR)
OPTIMIZERS = ("adamw", "schedule_free", "muon", "soap", "lamb")
_CPUS_PER_TRIAL = 0.25
_OBJECT_STORE_BYTES = 128 * 2**20


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one side cost its driver.

    Attributes:
        reports: that the driver took in.
        driver_s: on the processor, without start-up. wall_s: by the clock.
        others_s: on the processor, of drivers beside the main process, their start-up included.
        memory_bytes: resident set of the main process as trials ended, one after the other.
        journal_bytes: 0 for plain Tune.
    """

    trials: int
    reports: int
    driver_s: float
    wall_s: float
    others_s: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    journal_bytes: int = 0

    @property
    def growth(self) -> float:
        """Mean memory in the second half of the trials over that in the first."""
        half = len(self.memory_bytes) // 2
        return statistics.mean(self.memory_bytes[half:]) / statistics.mean(self.memory_bytes[:half])


class Meter(tune.Callback):
    """Counts reports, and looks at the driver's memory whenever a trial ends."""

    def __init__(self) -> None:
        self.reports = 0
        self.memory_bytes: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks."""
        return {}

    def on_trial_result(self, *arguments: Any, **info: Any) -> None:
        """One more report."""
        self.reports += 1

    def on_trial_complete(self, *arguments: Any, **info: Any) -> None:
        """One trial less."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory_bytes.append(pages * os.sysconf("SC_PAGE_SIZE"))


def study_of(folder: Path, trials: int) -> ResolvedStudy:
    """Ten arms, rungs at a quarter and three quarters of the horizon."""
    data = {"source": "xtb", "system": "ethanol", "frames": {"train": 10, "val": 5, "test": 5}}
    workload = {"data": data, "model": {"family": "nequip"}, "max_steps": HORIZON}
    study = {
        "name": "overhead",
        "workloads": [{"name": name, **workload} for name in ("first", "second")],
        "optimizers": list(OPTIMIZERS),
        "tune": {
            "trials_per_arm": max(trials // (2 * len(OPTIMIZERS)), 3),
            "asha": {"grace_steps": GRACE, "reduction_factor": FACTOR, "sentinels": 0, "fidelity": "truncate"},
        },
        "resources": {"cpus_per_trial": 1},
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study), encoding="utf-8")
    return resolve(file)


def objective(trial: str, step: int) -> float:
    """A made-up learning curve: a final error of the trial's own, approached as training goes on."""
    draw = np.random.default_rng(list(trial.encode()))
    return float(draw.lognormal(-2.0, 0.7) * (1.0 + 4.0 * np.exp(-5.0 * step / HORIZON)))


def evaluation(trial: str, step: int) -> Evaluation:
    """A report as large as a real one."""
    value = objective(trial, step)
    metrics = {f"{name}_{kind}": value for name in ("energy_per_atom", "forces") for kind in ("mae", "rmse")}
    groups = [{"rule": "adamw", "view": "matrix", "blocks": 9, "tensors": 9, "parameters": 5504, "share": 1.0}]
    return Evaluation(
        step=step,
        objective=value,
        errors={"val": {readout: {**metrics, "objective": value} for readout in ("raw", "ema")}},
        wall_s=0.02 * step,
        device_s=0.01 * step,
        train_loss=value,
        learning_rate=0.01,
        attempts=1,
        groups=groups,
        horizon=HORIZON,
        at_rung=step in RUNGS,
        outcome=Reason.FINISHED if step == HORIZON else None,
    )


def mock_trial(config: Mapping[str, Any], steps: Path) -> None:
    """Report a trial's curve from where it was paused, which a file tells."""
    name = config["trial"]
    file = steps / name
    done = int(file.read_text()) if file.exists() else 0
    every = HORIZON // EVALUATIONS
    for step in range(done + every, HORIZON + 1, every):
        file.write_text(str(step))
        tune.report(for_tune(evaluation(name, step).to_plain()))


def plan_trials(run: Path, arms: list[ArmPlan], resolved: ResolvedStudy) -> JournalWriter:
    """A journal in which every trial waits."""
    journal = JournalWriter(run)
    points = sobol_points(resolved.spaces.values(), arms[0].trials, 0)
    for arm in arms:
        journal.add_arm(arm.name, {"ranked": True})
    with journal.batch():
        for (index, point), arm in product(enumerate(points), arms):
            distributions = {name: parameter.distribution() for name, parameter in arm.space.parameters.items()}
            seeds = {"init": 1, "order": 2, "labels": 3}
            params = configuration(arm.space, point)
            journal.plan(arm.key(Stage.TUNE, index, 0), params, distributions, seeds, "0" * 64)
    return journal


def ours(run: Path, trials: int, drivers: int = 1) -> Cost:
    """The whole stack but the cohorts."""
    resolved = study_of(run, trials)
    arms, console = plan_arms(resolved), Console(file=(run / "console").open("w"))
    began, processor = time.perf_counter(), time.process_time()
    write_experiment(run, {name for arm in arms for name in (*arm.space.parameters, *arm.space.fixed)})
    journal = plan_trials(run, arms, resolved)
    work = _work(run, arms, read_trials(run), resolved)
    progress = Progress.of(run, Stage.TUNE, console, work.records)
    clerk, meter = Clerk(journal, progress, lambda key: True, RunCopy(run, None)), Meter()
    pool = PoolClient(work.resources, run)
    watching = Watching(ArmBoards(run, arms, console), pool)
    others_s: list[float] = []
    with progress:
        if drivers == 1:
            Mocked.trials_of(run)
            drive(work, pool, clerk.write, [watching, meter])
        else:
            shards.Shard = Mocked  # type: ignore[misc]
            several = shards.Shards(run, drivers)
            several.run(several.divided(work), pool, partial(_counted, meter, clerk.write), watching.look)
            others_s = [ray.get(actor.driver_s.remote()) for actor in several._actors]
    ended = sum(record.reason is not None for record in read_trials(run))
    assert ended == len(work.records), f"found {ended} trials that ended, wanted {len(work.records)}"
    return Cost(
        trials=len(work.records),
        reports=meter.reports,
        driver_s=time.process_time() - processor,
        wall_s=time.perf_counter() - began,
        others_s=others_s,
        memory_bytes=meter.memory_bytes,
        journal_bytes=(run / JOURNAL).stat().st_size,
    )


def _work(run: Path, arms: list[ArmPlan], records: list[TrialRecord], resolved: ResolvedStudy) -> DriverWork:
    """All trials, of an engine that takes Ray's resources; of their tasks there is what a driver looks at."""
    steps = tuple(range(HORIZON // EVALUATIONS, HORIZON + 1, HORIZON // EVALUATIONS))
    workloads = {workload.name: workload for workload in resolved.study.workloads}
    tasks: dict[str, Any] = {
        record.key.trial_id: SimpleNamespace(
            key=record.key,
            workload=workloads[record.key.workload],
            hyperparameters=record.params,
            evaluation_steps=steps,
            run=run,
            storage=None,
        )
        for record in records
    }
    return DriverWork(
        name="tune",
        run=run,
        storage=None,
        records=records,
        tenants={},
        alone=tasks,
        bound={},
        engines=dict.fromkeys(workloads, "lightning"),
        rungs={arm.name: arm.rungs for arm in arms},
        asha=resolved.study.tune.asha,
        fewest=1,
        resources=resolved.study.resources,
    )


class Mocked(shards.Shard):
    """A driver whose trials replay their curves."""

    @staticmethod
    def trials_of(run: Path) -> None:
        """From now on drivers of this process have such trials."""
        driver._trainable = lambda work: _trainable(run)

    def begin(self, work: DriverWork, pool: Any) -> None:
        """As every driver, with such trials."""
        self.trials_of(work.run)
        super().begin(work, pool)

    def driver_s(self) -> float:
        """Seconds of this process on the processor."""
        return time.process_time()


def _counted(meter: Meter, write: Write, entries: Sequence[Entry]) -> None:
    write(entries)
    for entry in entries:
        if isinstance(entry, Evaluated):
            meter.on_trial_result()
        elif isinstance(entry, Ended):
            meter.on_trial_complete()


def plain(run: Path, trials: int, drivers: int = 1) -> Cost:
    """Tune and its own ASHA, which pools all arms and never pauses."""
    names = [
        f"{arm.name}.{index}".replace("/", ".")
        for arm in plan_arms(study_of(run, trials))
        for index in range(arm.trials)
    ]
    meter = Meter()
    began, processor = time.perf_counter(), time.process_time()
    scheduler = ASHAScheduler(
        time_attr="step", metric="objective", mode="min", max_t=HORIZON, grace_period=GRACE, reduction_factor=FACTOR
    )
    tune.Tuner(
        _trainable(run),
        param_space={"trial": tune.grid_search(names)},
        tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=True),
        run_config=tune.RunConfig(name="plain", storage_path=str(run), verbose=0, callbacks=[meter]),
    ).fit()
    return Cost(
        trials=len(names),
        reports=meter.reports,
        driver_s=time.process_time() - processor,
        wall_s=time.perf_counter() - began,
        memory_bytes=meter.memory_bytes,
    )


def _trainable(run: Path) -> Any:
    steps = run / "steps"
    steps.mkdir(exist_ok=True)
    return tune.with_resources(tune.with_parameters(mock_trial, steps=steps), {"cpu": _CPUS_PER_TRIAL})


SIDES: dict[str, Callable[[Path, int, int], Cost]] = {"tunebench": ours, "plain Tune": plain}


def measure_here(side: str, trials: int, cpus: int, drivers: int, profile: str | None) -> Cost:
    """Run one side in this process."""
    ray.init(
        "local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, object_store_memory=_OBJECT_STORE_BYTES
    )
    with tempfile.TemporaryDirectory() as folder:
        profiler = cProfile.Profile(time.thread_time)  # of the driver's own thread, not of those of Ray
        if profile:
            profiler.enable()
        cost = SIDES[side](Path(folder), trials, drivers)
        if profile:
            profiler.disable()
            profiler.dump_stats(profile)
    ray.shutdown()
    return cost


def measure(side: str, arguments: argparse.Namespace) -> Cost:
    """Run one side in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--side",
        side,
        "--trials",
        str(arguments.trials),
        "--cpus",
        str(arguments.cpus),
        "--drivers",
        str(arguments.drivers),
    ]
    if arguments.profile and side == "tunebench":
        command += ["--profile", arguments.profile]
    # what Ray reads when it is imported; the token as in `set_ray_environment`
    environment = {**TUNE_ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    if side == "plain Tune":  # which would resume from its own state
        del environment["TUNE_GLOBAL_CHECKPOINT_S"]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def told(side: str, cost: Cost) -> str:
    """One line about a side."""
    peak = max(cost.memory_bytes) / 2**20
    others = f" and others {', '.join(f'{seconds:.1f}' for seconds in cost.others_s)} s" if cost.others_s else ""
    journal = f", journal {cost.journal_bytes / 2**20:.2f} MiB" if cost.journal_bytes else ""
    return (
        f"{side}: {cost.trials} trials, {cost.reports} reports, {cost.wall_s:.0f} s; "
        f"driver {cost.driver_s:.1f} s{others}, {1e3 * cost.driver_s / cost.trials:.1f} ms a trial, "
        f"{1e3 * cost.driver_s / cost.reports:.2f} ms a report; "
        f"memory {peak:.0f} MiB, second half over first {cost.growth:.3f}{journal}; "
        f"load average {os.getloadavg()[0]:.1f}"
    )


def ratio(costs: Mapping[str, Sequence[Cost]]) -> str:
    """What a trial and a report cost tunebench's driver, as times what they cost plain Tune's: medians over repeats."""
    found = {}
    for unit in ("trials", "reports"):
        per_unit = {side: statistics.median(c.driver_s / getattr(c, unit) for c in of) for side, of in costs.items()}
        found[unit] = per_unit["tunebench"] / per_unit["plain Tune"]
    found_in = f"{len(costs['tunebench'])} repeat(s)"
    return f"tunebench over plain Tune, {found_in}: {found['trials']:.2f} a trial, {found['reports']:.2f} a report"


def main() -> None:
    """Measure both sides in turn and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--drivers", type=int, default=1, help="of tunebench's side, as `tunebench run --drivers`")
    parser.add_argument("--side", choices=list(SIDES), help="one side, in this process, as JSON")
    parser.add_argument("--profile", help="write a profile of tunebench's driver there; it slows the driver down")
    arguments = parser.parse_args()
    if arguments.side:
        print(
            json.dumps(
                asdict(
                    measure_here(arguments.side, arguments.trials, arguments.cpus, arguments.drivers, arguments.profile)
                )
            )
        )
        return
    costs: dict[str, list[Cost]] = {side: [] for side in SIDES}
    for _ in range(arguments.repeats):
        for side, measured in costs.items():
            measured.append(measure(side, arguments))
            print(told(side, measured[-1]), flush=True)
    print(ratio(costs))


if __name__ == "__main__":
    main()
