"""Runs a study, or goes on with it: prepare, tune, select, confirm.

The journal decides what is left to do, so a first start, a second start and a start after a kill are one code path.
"""

from __future__ import annotations

import errno
import fcntl
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tunebench.engine.checkpoints import drop_checkpoints
from tunebench.engine.task import Seeds, TrialTask
from tunebench.study.environment import write_environment
from tunebench.study.errors import Interrupted, RunError, RunStopped
from tunebench.study.journal import JournalWriter, read_trials
from tunebench.study.plan import ArmPlan, plan_arms, trial_seeds
from tunebench.study.record import BUILDING, JOURNAL, STUDY_HASH, Reason, Stage, TrialKey, TrialRecord
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.seeds import named_seed
from tunebench.study.spec import Sampler, StudyError
from tunebench.tuning.ray_environment import leaving_ray, set_ray_environment, terminate_like_interrupt
from tunebench.tuning.retention import retention
from tunebench.tuning.samplers import configuration, sobol_points, tpe_configurations
from tunebench.workloads.coverage import check_labels
from tunebench.workloads.data import PreparedData, prepare
from tunebench.workloads.errors import WorkloadError

LOCK = ".lock"
_TPE_ROUNDS = 8
_MIN_FREE_BYTES = 200 * 2**20


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run, apart from what the study says.

    Attributes:
        run: the run directory.
        address: Ray cluster to join, None for a cluster of this machine alone.
    """

    run: Path
    address: str | None = None


def default_run_folder(resolved: ResolvedStudy, parent: Path) -> Path:
    """``PARENT/NAME-HASH``: the same study finds its run again, a changed study gets its own."""
    return parent / f"{resolved.study.name}-{resolved.hash[:8]}"


def run_study(resolved: ResolvedStudy, options: RunOptions, console: Console) -> list[TrialRecord]:
    """Run whatever of the study is not yet in its journal.

    Returns:
        All trials of the finished study.

    Raises:
        StudyError: the data contradict the study.
        RunError: the run directory belongs to another study, is in use, or has no room.
        Interrupted: Ctrl-C; everything is kept.
        RunStopped: the disk is full; everything is kept.
    """
    _make_folder(options.run)
    terminate_like_interrupt()
    with _locked(options.run):
        _check_folder(resolved, options.run)
        data = prepare_workloads(resolved, console)
        if not (options.run / JOURNAL).exists():
            check_arms(resolved, data)
        run = _Run(resolved, options, data, console)
        with leaving_ray(), _stopping_where_the_disk_is_full(options.run):
            run.tune()
            run.confirm()
    return read_trials(options.run)


def prepare_workloads(resolved: ResolvedStudy, console: Console) -> dict[str, PreparedData]:
    """The data of every workload by its name, built or found in the cache.

    Raises:
        StudyError: data that contradict the study, with file and key.
    """
    prepared = {}
    for index, workload in enumerate(resolved.study.workloads):
        with _naming_the_workload(resolved, index):
            prepared[workload.name] = prepare(
                workload.data,
                base=resolved.file.parent,
                progress=partial(_print_progress, console, workload.name),
            )
            check_labels(prepared[workload.name], workload, resolved.study.objective)
    return prepared


def check_arms(resolved: ResolvedStudy, data: dict[str, PreparedData]) -> None:
    """Build the model and the optimizer of every arm once, before any trial does.

    Raises:
        StudyError: arguments that the model's builder refuses, or an optimizer that finds nothing to do in the model.
    """
    from tunebench.engine.calibration import training_parts, untuned_task  # imports torch and NequIP

    for arm in plan_arms(resolved):
        index = resolved.study.workloads.index(arm.workload)
        with _naming_the_workload(resolved, index):
            try:
                training_parts(replace(untuned_task(resolved, arm, data[arm.workload.name]), device="cpu"))
            except ValueError as error:
                raise WorkloadError("model", f"{arm.workload.model.family} for {arm.optimizer}", str(error)) from error


@contextmanager
def _naming_the_workload(resolved: ResolvedStudy, index: int) -> Iterator[None]:
    """Turn a workload's error into the study's, with file and whole key."""
    try:
        yield
    except WorkloadError as error:
        key = f"workloads[{index}].{error.key}"
        raise StudyError(resolved.file, key, error.found, error.allowed) from error


def _print_progress(console: Console, workload: str, line: str) -> None:
    console.print(f"{workload}: {line}", highlight=False, soft_wrap=True)


class _Run:
    """One start of a study on one run directory."""

    def __init__(
        self, resolved: ResolvedStudy, options: RunOptions, data: dict[str, PreparedData], console: Console
    ) -> None:
        self._resolved, self._study, self._options = resolved, resolved.study, options
        self._data, self._console = data, console
        self._arms = plan_arms(resolved)
        changed = write_environment(options.run, {name: prepared.hash for name, prepared in data.items()})
        for line in changed:
            console.print(f"warning: environment changed since the run began: {line}", style="yellow", highlight=False)
        _check_data(options.run, data)
        self._journal = JournalWriter(options.run)
        for arm in self._arms:
            self._journal.add_arm(arm.name, {"ranked": self._study.tune.sampler is Sampler.SOBOL})
        self._sweep()

    def _sweep(self) -> None:
        """Delete what a killed driver had no time to delete."""
        dropped = retention(self._study.keep_checkpoints)
        for record in read_trials(self._options.run):
            if record.reason is not None and dropped(record.key):
                drop_checkpoints(self._options.run, record.key.trial_id)
        for leftover in self._options.run.glob(f"{BUILDING}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def tune(self) -> None:
        """Tune stage: plan every configuration of every arm and run those that have not ended."""
        if self._study.tune.sampler is Sampler.SOBOL:
            self._plan_sobol()
            self._run_stage(Stage.TUNE)
            return
        for planned in _rounds(self._study.tune.trials_per_arm):
            self._plan_tpe(planned)
            self._run_stage(Stage.TUNE)

    def confirm(self) -> None:
        """Confirm stage: the best configurations of every arm with fresh seeds, to the horizon, without stopping."""
        records = read_trials(self._options.run)
        for arm in self._arms:
            for record in best_configurations(records, arm.name, self._study.confirm.top_k):
                for seed_index in range(self._study.confirm.seeds):
                    key = arm.key(Stage.CONFIRM, record.key.config_index, seed_index)
                    self._plan(arm, key, record.params)
        self._run_stage(Stage.CONFIRM)

    def _plan_sobol(self) -> None:
        count = self._study.tune.trials_per_arm
        points = {
            workload.name: sobol_points(
                self._resolved.spaces.values(), count, named_seed(self._study.seed, "sobol", workload.name)
            )
            for workload in self._study.workloads
        }
        for index in range(count):
            for arm in self._arms:
                params = configuration(arm.space, points[arm.workload.name][index])
                self._plan(arm, arm.key(Stage.TUNE, index, 0), params)

    def _plan_tpe(self, planned: range) -> None:
        records = read_trials(self._options.run)
        for arm in self._arms:
            of_arm = [record for record in records if record.key.arm == arm.name and record.key.stage is Stage.TUNE]
            if len(of_arm) >= planned.stop:  # planned by an earlier start
                continue
            earlier = [record for record in of_arm if record.key.config_index < planned.start]
            seed = named_seed(self._study.seed, "tpe", arm.name, planned.start)
            for index, params in zip(planned, tpe_configurations(arm.space, earlier, len(planned), seed), strict=True):
                self._plan(arm, arm.key(Stage.TUNE, index, 0), params)

    def _plan(self, arm: ArmPlan, key: TrialKey, params: dict[str, Any]) -> None:
        distributions = {name: parameter.distribution() for name, parameter in arm.space.parameters.items()}
        seeds = trial_seeds(self._study.seed, arm.workload.name, key.stage, key.seed_index)
        self._journal.plan(key, params, distributions, seeds, self._data[arm.workload.name].hash)

    def _run_stage(self, stage: Stage) -> None:
        records = [record for record in read_trials(self._options.run) if record.key.stage is stage]
        tasks = {record.key.trial_id: self._task(record) for record in records if record.reason is None}
        if tasks:
            set_ray_environment(self._options.address)
            from tunebench.tuning.stage import run_stage  # imports Ray, which reads its environment now

            run_stage(self._resolved, stage, self._arms, records, tasks, self._journal, self._options, self._console)
        left = [r for r in read_trials(self._options.run) if r.key.stage is stage and r.reason is None]
        if left:
            raise Interrupted(f"{len(left)} trials of the {stage} stage have not ended")

    def _task(self, record: TrialRecord) -> TrialTask:
        arm = next(arm for arm in self._arms if arm.name == record.key.arm)
        resources = self._study.resources
        return TrialTask(
            key=record.key,
            workload=arm.workload,
            data=self._data[arm.workload.name],
            hyperparameters={**record.params, **arm.space.fixed_values()},
            averaged=arm.averaged,
            schedule=arm.schedule,
            objective=self._study.objective,
            seeds=Seeds(**record.seeds),
            evaluation_steps=arm.evaluation_steps,
            run=self._options.run.resolve(),
            device="cuda" if resources.gpus_per_trial > 0 else "cpu",
            threads=max(math.floor(resources.cpus_per_trial), 1),
            time_limit_s=resources.time_limit_s,
        )


def best_configurations(records: list[TrialRecord], arm: str, count: int) -> list[TrialRecord]:
    """The arm's best tune-stage trials by validation objective that reached the horizon.

    Where fewer reached it, trials that were stopped fill up, the longest-running first. Diverged and crashed trials
    are never selected. Ties go to the earlier configuration.
    """
    usable = [
        record
        for record in records
        if record.key.arm == arm
        and record.key.stage is Stage.TUNE
        and record.value is not None
        and record.reason in (Reason.FINISHED, Reason.STOPPED_ASHA)
    ]
    usable.sort(key=lambda r: (-r.ledger["steps"], r.value, r.key.config_index))
    return usable[:count]


def _rounds(trials: int) -> Iterator[range]:
    size = math.ceil(trials / _TPE_ROUNDS)
    return (range(start, min(start + size, trials)) for start in range(0, trials, size))


def _check_folder(resolved: ResolvedStudy, run: Path) -> None:
    if (run / STUDY_HASH).exists():
        found = (run / STUDY_HASH).read_text(encoding="utf-8", errors="replace").strip()
        if found != resolved.hash:
            raise RunError(f"{run}: holds study {found[:8]}, allowed: study {resolved.hash[:8]} or an empty folder")
    elif (run / JOURNAL).exists():
        raise RunError(f"{run}: holds a journal but no {STUDY_HASH}, allowed: a run directory or an empty folder")
    else:
        resolved.write(run)
    free = shutil.disk_usage(run).free
    if free < _MIN_FREE_BYTES:
        raise RunError(
            f"{run}: {free / 2**20:.0f} MiB free on its disk, allowed: {_MIN_FREE_BYTES / 2**20:.0f} or more"
        )


def _check_data(run: Path, data: dict[str, PreparedData]) -> None:
    """Errors of one run must have been measured on the same data."""
    if not (run / JOURNAL).exists():
        return
    for record in read_trials(run):
        found, began = data[record.key.workload].hash, record.data_hash
        if began not in (None, found):
            raise RunError(
                f"{run}: workload {record.key.workload} has data {found[:12]}, allowed: {began[:12]}, with which "
                "the run began; start another run for other data"
            )


def _make_folder(run: Path) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / LOCK).touch()
    except OSError as error:
        raise RunError(f"{run}: found {error.strerror}, allowed: a folder that can be written") from error


@contextmanager
def _stopping_where_the_disk_is_full(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise RunStopped(f"{run}: {error.strerror}; free some space and run again") from error


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """One driver per run directory; the lock goes with its process, however that ends."""
    with (run / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{run}: another `tunebench run` is working on it, allowed: one at a time") from None
        yield
