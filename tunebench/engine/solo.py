"""Seconds of a step of every arm, alone on the device: what `tunebench calibrate` measures.

Slots of a cohort share a device step, so the clock on the wall says nothing about one of them. Here a trial is alone:
in a cohort of one slot, compiled as the study runs it, or in NequIP's module where the model cannot be traced. All
steps of a study are measured in one process, round after round, so that a drift of the clock hits all alike.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, Protocol

import torch
from nequip.utils.global_state import set_global_state

from tunebench.engine.calibration import LightningSteps, check_device, untuned_task
from tunebench.engine.cohort import Cohort
from tunebench.engine.functional import Untraceable
from tunebench.engine.task import TrialTask
from tunebench.study.environment import environment
from tunebench.study.plan import ArmPlan, plan_arms
from tunebench.study.processes import usable_cores
from tunebench.study.record import Reason
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.search_space import Scalar
from tunebench.study.spec import Engine
from tunebench.study.step_times import (
    REFRESH_PERIOD,
    DeviceTimes,
    SoloStep,
    TimedStep,
    settings_of,
)
from tunebench.workloads.data import PreparedData

_log = logging.getLogger(__name__)

_WARM = 6  # the rule's set-up, one step of its usual kind as it is, and on a GPU one that is captured
_FEWEST = 5
_HORIZON = 4096
_NEVER, _ALWAYS = 10**9, 1

Clock = Callable[[], float]
Say = Callable[[str], None]


class Solo(Protocol):
    """Trains trials of one workload, one at a time.

    Attributes:
        engine: what trains.
        threads: of its CPU work.
    """

    engine: Literal["cohort", "lightning"]
    threads: int

    def seconds(self, task: TrialTask, steps: int) -> float:
        """Seconds of a step of a trial from its beginning, over so many steps after some that are not timed."""
        ...


class CohortSolo:
    """A cohort of one slot, kept while trials come and go.

    Args:
        task: any trial of the workload.
        cache: folder of traces and compiled graphs.
        clock: seconds.
        compiled: as for `Cohort`.

    Raises:
        Untraceable: the model cannot be written as a function of its weights.
        WorkloadError: the data or the model's arguments are refused.
    """

    engine: Literal["cohort", "lightning"] = "cohort"

    def __init__(self, task: TrialTask, cache: Path | None, clock: Clock, *, compiled: bool = True) -> None:
        self.threads = device_threads(task.device)
        torch.set_num_threads(self.threads)
        self._clock = clock
        self._cohort = Cohort(task, 1, cache=cache, compiled=compiled)
        self._cohort.join(task)  # traces the model
        self._cohort.leave(task.key.trial_id, Reason.PREEMPTED)

    def seconds(self, task: TrialTask, steps: int) -> float:
        """Seconds of a step, as `Solo` says."""
        torch.set_num_threads(self.threads)
        self._cohort.join(task)
        try:
            self._cohort.run(_WARM)
            return _timed(self._cohort.run, steps, self._clock)
        finally:
            self._cohort.leave(task.key.trial_id, Reason.PREEMPTED)


class LightningSolo:
    """The lightning engine's steps, with a module of its own for each trial.

    Args:
        task: any trial of the workload.
        clock: seconds.
    """

    engine: Literal["cohort", "lightning"] = "lightning"

    def __init__(self, task: TrialTask, clock: Clock) -> None:
        self.threads, self._clock = task.threads, clock

    def seconds(self, task: TrialTask, steps: int) -> float:
        """Seconds of a step, as `Solo` says."""
        torch.set_num_threads(self.threads)
        trial = LightningSteps(task)
        trial.run(_WARM)
        return _timed(trial.run, steps, self._clock)


def _timed(run: Callable[[int], None], steps: int, clock: Clock) -> float:
    """Seconds of one of so many steps; `run` returns when the device is done."""
    began = clock()
    run(steps)
    return (clock() - began) / steps


@dataclass(frozen=True, kw_only=True)
class SoloPlan:
    """How long to measure.

    Attributes:
        rounds: times that every step is measured; one more before them is thrown away.
        seconds: what a measurement of one kind of step takes at least, without its warm-up.
        cache: folder of traces and compiled graphs; None keeps none.
        accelerator: kind of the device as Ray names it; None where Ray was not asked.
        clock: seconds.
    """

    rounds: int = 5
    seconds: float = 0.5
    cache: Path | None = None
    accelerator: str | None = None
    clock: Clock = time.perf_counter


def solo_steps(
    resolved: ResolvedStudy,
    data: Mapping[str, PreparedData],
    searched: Mapping[str, Sequence[Mapping[str, Any]]],
    plan: SoloPlan,
    say: Say,
) -> DeviceTimes:
    """Measure a step of every arm of a study under all settings that its trials have and that change the cost.

    It is measured on the device at hand. Matrix optimizers are measured with a refresh of their preconditioners at no
    step and at every step.

    Args:
        resolved: the study.
        data: prepared data by workload.
        searched: hyperparameters of trials by arm name; for an arm without any, the defaults and variants of them.
        plan: how long to measure.
        say: takes lines for the user; what fails is named there, and left out of the table.

    Raises:
        StudyError: the study asks for a GPU and there is none.
        WorkloadError: data or a model's arguments are refused.
    """
    check_device(resolved, "or a machine with one")
    set_global_state()
    with TemporaryDirectory(prefix="tunebench-calibrate-") as scratch:
        cells = _cells(resolved, data, searched, Path(scratch))
        solos: dict[str, Solo] = {}
        for cell in cells:
            if cell.workload not in solos:
                solos[cell.workload] = _solo(cell.tasks[0], resolved.study.engine, plan, say)
        timings = [_Timing(cell=cell, task=task, solo=solos[cell.workload]) for cell in cells for task in cell.tasks]
        failed = _measure(timings, plan, say)
    found = environment({name: prepared.hash for name, prepared in data.items()})
    kind = resolved.study.resources.device
    return DeviceTimes(
        device=torch.cuda.get_device_name() if kind == "cuda" else found["processor"] or "cpu",
        kind=kind,
        accelerator=plan.accelerator,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        rounds=plan.rounds,
        environment=found,
        steps=tuple(_solo_step(cell, timings) for cell in cells if cell not in failed),
    )


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cell:
    """An arm under one choice of settings, with a trial of plain steps and, where there are such, one of refreshes."""

    workload: str
    optimizer: str
    settings: dict[str, Scalar]
    tasks: tuple[TrialTask, ...]

    @property
    def name(self) -> str:
        chosen = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return f"{self.workload}/{self.optimizer}" + (f" ({chosen})" if chosen else "")


@dataclass(kw_only=True, eq=False)
class _Timing:
    """One kind of step of a cell, and what the rounds found."""

    cell: _Cell
    task: TrialTask
    solo: Solo
    steps: int = _FEWEST
    rounds_s: list[float] = field(default_factory=list)


def _cells(
    resolved: ResolvedStudy,
    data: Mapping[str, PreparedData],
    searched: Mapping[str, Sequence[Mapping[str, Any]]],
    scratch: Path,
) -> list[_Cell]:
    found = []
    for arm in plan_arms(resolved):
        own = searched.get(arm.name, ())
        task = _lasting(untuned_task(resolved, arm, data[arm.workload.name]), scratch)
        found += [_cell(arm, task, settings) for settings in settings_of(own, arm.space)]
    return found


def _cell(arm: ArmPlan, task: TrialTask, settings: dict[str, Scalar]) -> _Cell:
    refreshes = REFRESH_PERIOD in task.hyperparameters
    kinds: list[dict[str, Any]] = [{REFRESH_PERIOD: p} for p in (_NEVER, _ALWAYS)] if refreshes else [{}]
    tasks = (replace(task, hyperparameters={**task.hyperparameters, **settings, **kind}) for kind in kinds)
    return _Cell(workload=arm.workload.name, optimizer=arm.optimizer, settings=settings, tasks=tuple(tasks))


def _lasting(task: TrialTask, scratch: Path) -> TrialTask:
    """A trial that ends nowhere near, and leaves nothing."""
    workload = task.workload.model_copy(update={"max_steps": _HORIZON})
    return replace(task, workload=workload, evaluation_steps=(_HORIZON,), rungs=(), horizons=(), run=scratch)


def _solo(task: TrialTask, engine: Engine, plan: SoloPlan, say: Say) -> Solo:
    if engine is Engine.LIGHTNING:
        return LightningSolo(task, plan.clock)
    try:
        return CohortSolo(task, plan.cache, plan.clock)
    except Untraceable as error:
        say(f"{task.workload.name}: {Engine.LIGHTNING} engine, because its model cannot be traced: {error}")
        return LightningSolo(task, plan.clock)


def device_threads(device: str) -> int:
    """Threads of a cohort: all cores of the machine on the CPU, a GPU's share of them on CUDA."""
    cores = usable_cores()
    return cores if device == "cpu" else max(cores // max(torch.cuda.device_count(), 1), 1)


# --- measuring -------------------------------------------------------------------------------------------------------


def _measure(timings: Sequence[_Timing], plan: SoloPlan, say: Say) -> set[_Cell]:
    """Fill the rounds, and return the cells that failed.

    What comes before the first round finds how many steps to time and meets every shape of batch that they have.
    """
    failed: set[_Cell] = set()
    for timing in timings:
        if timing.cell not in failed:
            timing.steps = _steps_for(plan.seconds, _tried(timing, failed, say))
    for number in range(plan.rounds + 1):
        for timing in timings:
            if timing.cell not in failed:
                timing.rounds_s.append(_tried(timing, failed, say))
        if number == 0:
            for timing in timings:
                timing.steps = max([timing.steps, *(_steps_for(plan.seconds, seconds) for seconds in timing.rounds_s)])
                timing.rounds_s.clear()
        say(f"round {number} of {plan.rounds}" if number else f"warm, {len(timings)} kinds of steps")
    return failed


def _tried(timing: _Timing, failed: set[_Cell], say: Say) -> float:
    """Seconds of a step; NaN where it fails, which is said and ends the cell's part."""
    try:
        seconds = timing.solo.seconds(timing.task, timing.steps)
        if seconds > 0:
            return seconds
        raise ValueError(f"found {seconds} s for a step, allowed: more than 0")
    except Exception as error:  # whatever stops one optimizer must not cost the others their place in the table
        _log.warning("%s", timing.cell.name, exc_info=True)
        failed.add(timing.cell)
        say(f"{timing.cell.name}: left out, {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return math.nan


def _steps_for(seconds: float, step_s: float) -> int:
    if not step_s > 0:
        return _FEWEST
    return min(max(math.ceil(seconds / step_s), _FEWEST), _HORIZON - _WARM)


def _solo_step(cell: _Cell, timings: Sequence[_Timing]) -> SoloStep:
    own = [timing for timing in timings if timing.cell is cell]
    plain, *refresh = (TimedStep.of(timing.rounds_s, timing.steps) for timing in own)
    return SoloStep(
        workload=cell.workload,
        optimizer=cell.optimizer,
        settings=cell.settings,
        engine=own[0].solo.engine,
        threads=own[0].solo.threads,
        plain=plain,
        refresh=refresh[0] if refresh else None,
    )
