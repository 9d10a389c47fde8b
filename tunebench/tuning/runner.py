"""Runs a study, or goes on with it: prepare, tune, select, confirm, and compute properties of what came out.

The journal decides what is left to do, so a first start, a second start and a start after a kill are one code path.
"""

from __future__ import annotations

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from tunebench.engine.checkpoints import drop_checkpoints
from tunebench.engine.task import TrialTask, trial_task
from tunebench.properties.registry import check_installed
from tunebench.study.edges import widenings
from tunebench.study.environment import write_environment
from tunebench.study.errors import Interrupted, RunError
from tunebench.study.extension import extend, extended
from tunebench.study.journal import JournalWriter, read_trials
from tunebench.study.lint import refuse_unfair
from tunebench.study.notice import take_down
from tunebench.study.plan import ArmPlan, plan_arms, trial_seeds
from tunebench.study.record import BUILDING, JOURNAL, Reason, Stage, TrialKey, TrialRecord
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.run_copy import RunCopy, has_run, named_storage
from tunebench.study.seeds import named_seed
from tunebench.study.spec import Sampler
from tunebench.study.step_times import DeviceTimes
from tunebench.study.storage import Storage
from tunebench.tuning.arm_boards import ArmBoards
from tunebench.tuning.console_lines import say
from tunebench.tuning.device_budget import Searched, budgets
from tunebench.tuning.engine_choice import EngineChoice, choose_engines
from tunebench.tuning.errand import Errand
from tunebench.tuning.preparation import check_arms, initial_weights, prepare_workloads
from tunebench.tuning.ray_environment import leaving_ray, set_ray_environment, terminate_like_interrupt
from tunebench.tuning.retention import retention
from tunebench.tuning.run_folder import check_data, held_run
from tunebench.tuning.samplers import configuration, sobol_points, tpe_configurations
from tunebench.workloads.data import PreparedData
from tunebench.workloads.stored_data import store_initial, store_prepared

if TYPE_CHECKING:
    from tunebench.tuning.pool_client import PoolClient
    from tunebench.tuning.shards import Shards

_TPE_ROUNDS = 8


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How to run, apart from what the study says.

    Attributes:
        run: the run directory.
        address: Ray cluster to join, None for a cluster of this machine alone.
        extend: further configurations for every arm of a run that has begun.
        storage: address where all but the journal is kept, and the journal is copied to; None where the run directory
            lies on a disk that all nodes share, or the run has named a storage before.
        drivers: processes that drive trials, each with whole arms; 1 for this process alone.
        properties: compute the properties that the study asks for; without, the run ends with its training.
    """

    run: Path
    address: str | None = None
    extend: int = 0
    storage: str | None = None
    drivers: int = 1
    properties: bool = True


def run_study(resolved: ResolvedStudy, options: RunOptions, console: Console) -> list[TrialRecord]:
    """Run whatever of the study is not yet in its journal.

    Returns:
        All trials of the finished study.

    Raises:
        StudyError: the data contradict the study, or it breaks a rule of a fair comparison that it does not waive.
        RunError: the run directory belongs to another study or other data, is in use, or has no room; a library that
            the study's properties need is not installed.
        Interrupted: Ctrl-C; everything is kept.
        RunStopped: the disk is full; everything is kept.
    """
    terminate_like_interrupt()
    if resolved.study.properties and options.properties:
        check_installed()  # before hours of training, not after them
    storage = named_storage(options.run, options.storage)
    begun = (options.run / JOURNAL).exists() or (storage is not None and has_run(storage))
    if not begun:  # later its ranges may be wider than fair ones are at the start
        refuse_unfair(resolved)
    with held_run(resolved, options.run, storage), RunCopy(options.run, storage, partial(say, console)) as copy:
        if options.extend:
            _extend(resolved, options, console)
        resolved = extended(resolved, options.run)
        data = prepare_workloads(resolved, console)
        if storage is not None:
            for prepared in data.values():
                store_prepared(storage, prepared)
            for workload in resolved.study.workloads:
                if workload.init is not None:
                    store_initial(storage, workload.init)
        starts = initial_weights(resolved, data)
        with leaving_ray():
            if not begun:
                _check_arms(resolved, data, options, storage, console)
            hashes = {name: prepared.hash for name, prepared in data.items()}
            for line in write_environment(options.run, hashes, starts):
                warning = f"warning: environment changed since the run began: {line}"
                console.print(warning, style="yellow", highlight=False)
            run = _Run(resolved, options, data, console, storage, copy)
            run.tune()
            run.confirm()
            copy.fetch()
            run.properties()
    return read_trials(options.run)


def _extend(resolved: ResolvedStudy, options: RunOptions, console: Console) -> None:
    """Give every arm more configurations, and wider ranges to those whose best lies at an edge."""
    if not (options.run / JOURNAL).exists():
        raise RunError(f"{options.run}: found no {JOURNAL}, allowed: --extend for a run that has begun")
    found = widenings(extended(resolved, options.run), read_trials(options.run))
    for each in found:
        console.print(
            f"{each.optimizer}: its best {each.parameter} lies at the edge of its range, which now goes from "
            f"{each.low:g} to {each.high:g}",
            highlight=False,
            soft_wrap=True,
        )
    extend(resolved, options.run, options.extend, found)


def _check_arms(
    resolved: ResolvedStudy,
    data: dict[str, PreparedData],
    options: RunOptions,
    storage: Storage | None,
    console: Console,
) -> None:
    """Check the arms; Ray on this machine alone, which waits for processes of its own for seconds, starts meanwhile."""
    if options.address is not None:
        check_arms(resolved, data)
        return
    set_ray_environment(options.address)
    from tunebench.tuning.stage import join_ray  # imports Ray, which reads its environment now

    with ThreadPoolExecutor(1, thread_name_prefix="check") as beside:
        checked = beside.submit(check_arms, resolved, data)
        join_ray(options.address, resolved.study.resources, options.run, storage, console)
    checked.result()


class _Run:
    """One start of a study on one run directory."""

    def __init__(
        self,
        resolved: ResolvedStudy,
        options: RunOptions,
        data: dict[str, PreparedData],
        console: Console,
        storage: Storage | None,
        copy: RunCopy,
    ) -> None:
        self._resolved, self._study, self._options = resolved, resolved.study, options
        self._data, self._console, self._storage, self._copy = data, console, storage, copy
        self._arms = plan_arms(resolved)
        self._engines: dict[str, EngineChoice] = {}
        self._pool: PoolClient | None = None
        self._shards: Shards | None = None
        self._boards = ArmBoards(options.run, self._arms, console)
        check_data(options.run, data)
        self._journal = JournalWriter(options.run)
        for arm in self._arms:
            self._journal.add_arm(arm.name, {"ranked": self._study.tune.sampler is Sampler.SOBOL})
        self._sweep()

    def _sweep(self) -> None:
        """Delete what a killed driver had no time to delete."""
        dropped = retention(self._study.keep_checkpoints)
        for record in self._journal.trials():
            if record.reason is not None and dropped(record.key):
                drop_checkpoints(self._options.run, record.key.trial_id)
                self._copy.drop_checkpoints(record.key.trial_id)
        for leftover in self._options.run.glob(f"{BUILDING}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        take_down(self._options.run)

    def tune(self) -> None:
        """Tune stage: plan every configuration of every arm and run those that have not ended."""
        if self._study.tune.sampler is Sampler.SOBOL:
            self._plan_sobol()
            self._run_stage(Stage.TUNE)
            return
        for number in range(_TPE_ROUNDS):
            self._plan_tpe(number)
            self._run_stage(Stage.TUNE)

    def confirm(self) -> None:
        """Confirm stage: the best configurations of every arm with fresh seeds, to the horizon, without stopping."""
        records, confirm = self._journal.trials(), self._study.confirm
        with self._journal.batch():
            for arm in self._arms:
                best = best_configurations(records, arm.name, confirm.top_k)
                for record, seed_index in product(best, range(confirm.seeds)):
                    key = arm.key(Stage.CONFIRM, record.key.config_index, seed_index)
                    self._plan(arm, key, record.params)
        self._run_stage(Stage.CONFIRM)

    def properties(self) -> None:
        """Compute what the study asks of the confirm stage's models; cohorts and drivers end before that."""
        if not self._study.properties or not self._options.properties:
            return
        set_ray_environment(self._options.address)
        from tunebench.tuning.property_tasks import run_properties  # imports Ray, which reads its environment now

        for actors in (self._pool, self._shards):
            if actors is not None:
                actors.close()
        run_properties(self._resolved, self._journal.trials(), self._options, self._copy.storage, self._console)

    def _plan_sobol(self) -> None:
        count = max(arm.trials for arm in self._arms)
        points = {
            workload.name: sobol_points(
                self._resolved.spaces.values(), count, named_seed(self._study.seed, "sobol", workload.name)
            )
            for workload in self._study.workloads
        }
        searched = {
            arm.name: [configuration(arm.space, point) for point in points[arm.workload.name][: arm.trials]]
            for arm in self._arms
        }
        given = budgets(
            self._resolved,
            searched,
            self._arms,
            self._options.run,
            self._journal,
            self._say,
            lambda: self._measured(searched),
        )
        with self._journal.batch():
            for index, arm in product(range(count), self._arms):
                if index < given[arm.name].count:
                    point = points[arm.workload.name][index]
                    own = {name: point[name] for name in arm.space.parameters}
                    params, sentinel = searched[arm.name][index], index in given[arm.name].sentinels
                    self._plan(arm, arm.key(Stage.TUNE, index, 0), params, own, sentinel=sentinel)

    def _measured(self, searched: Searched) -> DeviceTimes:
        """Times of the steps that are searched, measured on a device of the kind that the trials will have."""
        set_ray_environment(self._options.address)
        from tunebench.tuning.step_measurement import measured_steps  # imports Ray, which reads its environment now

        run, storage = self._options.run, self._storage
        errand = Errand(resolved=self._resolved, data=self._data, searched=searched, run=run, storage=storage)
        return measured_steps(errand, self._options.address, self._console)

    def _say(self, line: str) -> None:
        say(self._console, line)

    def _plan_tpe(self, number: int) -> None:
        records = self._journal.trials()
        for arm in self._arms:
            planned = _round(number, arm.trials)
            of_arm = [record for record in records if record.key.arm == arm.name and record.key.stage is Stage.TUNE]
            if len(of_arm) >= planned.stop:  # planned by an earlier start
                continue
            earlier = [record for record in of_arm if record.key.config_index < planned.start]
            seed = named_seed(self._study.seed, "tpe", arm.name, planned.start)
            for index, params in zip(planned, tpe_configurations(arm.space, earlier, len(planned), seed), strict=True):
                self._plan(arm, arm.key(Stage.TUNE, index, 0), params)

    def _plan(
        self,
        arm: ArmPlan,
        key: TrialKey,
        params: dict[str, Any],
        point: dict[str, float] | None = None,
        *,
        sentinel: bool = False,
    ) -> None:
        distributions = {name: parameter.distribution() for name, parameter in arm.space.parameters.items()}
        seeds = trial_seeds(self._study.seed, arm.workload.name, key.stage, key.seed_index)
        data_hash = self._data[arm.workload.name].hash
        self._journal.plan(key, params, distributions, seeds, data_hash, sentinel=sentinel, point=point)

    def _run_stage(self, stage: Stage) -> None:
        self._boards.show()
        try:
            self._run_open_trials(stage)
        finally:
            self._boards.show()
        left = [r for r in self._journal.trials() if r.key.stage is stage and r.reason is None]
        if left:
            raise Interrupted(f"{len(left)} trials of the {stage} stage have not ended")

    def _run_open_trials(self, stage: Stage) -> None:
        records = [record for record in self._journal.trials() if record.key.stage is stage]
        tasks = {record.key.trial_id: self._task(record) for record in records if record.reason is None}
        if tasks:
            self._choose_engines({task.workload.name for task in tasks.values()})
            set_ray_environment(self._options.address)
            from tunebench.tuning.pool_client import PoolClient  # imports Ray, which reads its environment now
            from tunebench.tuning.shards import Shards
            from tunebench.tuning.stage import run_stage

            self._pool = self._pool or PoolClient(
                self._study.resources,
                self._options.run,
                joined=self._options.address is not None,
                storage=self._storage,
                say=self._say,
            )
            self._shards = self._shards or Shards(self._options.run, self._options.drivers)
            run_stage(
                self._resolved,
                stage,
                self._arms,
                records,
                tasks,
                self._engines,
                self._pool,
                self._shards,
                self._copy,
                self._journal,
                self._boards,
                self._options,
                self._console,
            )

    def _choose_engines(self, workloads: set[str]) -> None:
        """Decide once per start what trains each workload, and say where it is not what was asked for."""
        new = choose_engines(self._resolved, self._data, workloads - self._engines.keys())
        self._engines |= new
        for choice in new.values():
            if choice.reason:
                self._console.print(choice.warning(), style="yellow", highlight=False, soft_wrap=True)

    def _task(self, record: TrialRecord) -> TrialTask:
        arm = next(arm for arm in self._arms if arm.name == record.key.arm)
        data, run = self._data[arm.workload.name], self._options.run.resolve()
        return trial_task(
            self._resolved,
            arm,
            data,
            record.key,
            params=record.params,
            seeds=record.seeds,
            run=run,
            storage=self._storage,
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


def _round(number: int, trials: int) -> range:
    """Configurations of one of the rounds; late rounds of a small arm are empty."""
    size = math.ceil(trials / _TPE_ROUNDS)
    return range(min(number * size, trials), min((number + 1) * size, trials))
