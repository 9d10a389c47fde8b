"""What an engine is given for one trial, and what it reports back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from tunebench.engine.work import Work
from tunebench.study.plan import ArmPlan
from tunebench.study.record import Readout, Reason, Stage, TrialKey
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.search_space import Treats
from tunebench.study.spec import Objective, Refinement, Schedule, Workload
from tunebench.study.storage import Storage
from tunebench.workloads.data import PreparedData

Errors = dict[str, dict[str, dict[str, float]]]
"""Measured errors, ``{split: {readout: {metric: value}}}``; units as in `Metric`."""


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Named seeds of a trial: initial weights, data order, force labels. Arms share them."""

    init: int
    order: int
    labels: int


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """Everything that decides a trial's trajectory, and where it leaves its traces.

    Attributes:
        hyperparameters: sampled and fixed settings of the optimizer, by search-space name.
        averaged: the averaged readout of this arm, EMA or SCHEDULE_FREE.
        evaluation_steps: ascending steps at which validation errors are measured; the last one is the horizon.
        rungs: those of them after which somebody decides whether the trial goes on.
        horizons: ascending lengths of the complete schedules that are left, the workload's last; a trial trains
            through the first, and from the beginning through the next where it goes on. Left out, the workload's alone.
        device: ``cpu`` or ``cuda``.
        rule: name of the update rule; left out, that of the key, which may be another name for the same optimizer.
        treats: the weights that the optimizer's own rule must treat, as its search space promises.
        stalled_after_s: seconds without a step after which a process that trains this trial alone is ended; None waits.
        written_every_s: seconds between two writings of its files; the first evaluation, a rung and the end are always
            written.
        refine: how the trial is refined at the workload's horizon; None for not at all.
        storage: where its files are kept as well; None where `run` lies on a disk that all nodes share.
    """

    key: TrialKey
    workload: Workload
    data: PreparedData
    hyperparameters: dict[str, Any]
    averaged: Readout
    schedule: Schedule
    objective: Objective
    seeds: Seeds
    evaluation_steps: tuple[int, ...]
    run: Path
    device: str = "cpu"
    threads: int = 1
    time_limit_s: float | None = None
    stalled_after_s: float | None = None
    rule: str = ""
    treats: Treats = Treats.ALL
    rungs: tuple[int, ...] = ()
    written_every_s: float = 30.0
    horizons: tuple[int, ...] = ()
    refine: Refinement | None = None
    storage: Storage | None = None

    def __post_init__(self) -> None:
        """Refuse a trial that would not be measured at its horizons."""
        last = (self.workload.max_steps,)
        if not set(self.horizons) <= set(self.evaluation_steps) or self.horizons[-1:] not in ((), last):
            raise ValueError(
                f"horizons: found {self.horizons}, allowed: ascending, among the evaluation steps and ending at the "
                f"workload's horizon, {self.workload.max_steps}"
            )
        if self.evaluation_steps[-1:] != last:
            raise ValueError(
                f"evaluation_steps: found {self.evaluation_steps}, allowed: ascending and ending at the horizon, "
                f"{self.workload.max_steps}"
            )

    @property
    def optimizer(self) -> str:
        """Name of the update rule."""
        return self.rule or self.key.optimizer

    @property
    def horizon(self) -> int:
        """Steps of the schedule that the trial trains through now."""
        return self.horizons[0] if self.horizons else self.workload.max_steps

    @property
    def lengthened(self) -> TrialTask | None:
        """The trial at its next horizon, which it trains through from the beginning; None at the last."""
        left = self.horizons[1:]
        return replace(self, horizons=left, rungs=left[:-1]) if left else None

    def at(self, horizon: int) -> TrialTask | None:
        """The trial at one of the horizons that are left; None at a shorter one."""
        found: TrialTask | None = self
        while found is not None and found.horizon != horizon:
            found = found.lengthened
        return found

    @property
    def final_splits(self) -> tuple[str, ...]:
        """Splits opened once, at the horizon: test and out-of-distribution in the confirm stage, none before."""
        if self.key.stage is not Stage.CONFIRM:
            return ()
        return tuple(name for name in self.data.splits if name not in ("train", "val"))

    @property
    def weighs_stress(self) -> bool:
        """Whether errors of the stress are measured: where the data have one and the study weighs it."""
        return self.data.has_stress and (self.workload.loss.stress > 0 or self.objective.stress > 0)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of a running trial; plain data, so that it passes through any scheduler.

    Attributes:
        step: finished steps at this horizon.
        objective: the study's objective on the validation split, lower is better.
        wall_s: seconds since the trial began at this horizon, earlier attempts included. device_s: those spent in
            training steps.
        train_loss: mean training loss since the previous evaluation.
        horizon: steps of the schedule that the trial was trained through.
        at_rung: whether somebody decides now if the trial goes on.
        earlier: what the trial spent at shorter horizons.
        lost: what kills and crashes took, at any horizon, and it had to do again; to `NOTE_EVERY_S` seconds each.
        outcome: set in the last report of a trial that ended by itself.
        refinement: what the refinement did, plain data; None where there was none.
    """

    step: int
    objective: float
    errors: Errors
    wall_s: float
    device_s: float
    train_loss: float
    learning_rate: float
    attempts: int
    horizon: int = 0
    at_rung: bool = False
    earlier: Work = field(default_factory=Work)
    lost: Work = field(default_factory=Work)
    outcome: Reason | None = None
    message: str = ""
    groups: list[dict[str, Any]] = field(default_factory=list)
    refinement: dict[str, Any] | None = None

    @property
    def done(self) -> Work:
        """What the trial has spent at this horizon."""
        return Work(steps=self.step, wall_s=self.wall_s, device_s=self.device_s)

    @property
    def spent(self) -> Work:
        """What it has spent at all horizons, without what was lost."""
        return self.earlier + self.done

    @property
    def is_sound(self) -> bool:
        """Whether a trial could go on from here."""
        return self.outcome is not Reason.DIVERGED

    @classmethod
    def without_steps(cls, *, attempts: int, outcome: Reason | None = None, message: str = "") -> Evaluation:
        """What is known of a trial before its first step; as an objective it has the worst, ``inf``."""
        return cls(
            step=0,
            objective=math.inf,
            errors={},
            wall_s=0.0,
            device_s=0.0,
            train_loss=math.nan,
            learning_rate=math.nan,
            attempts=attempts,
            outcome=outcome,
            message=message,
        )

    def to_plain(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries only."""
        return {**asdict(self), "outcome": None if self.outcome is None else self.outcome.value}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_plain`; keys that are not an evaluation's are left out."""
        known = {f.name: plain[f.name] for f in fields(cls) if f.name in plain}
        known["outcome"] = Reason(known["outcome"]) if known.get("outcome") else None
        work = {name: Work(**known.get(name, {})) for name in ("earlier", "lost")}
        return cls(**{**known, **work})


def trial_task(
    resolved: ResolvedStudy,
    arm: ArmPlan,
    data: PreparedData,
    key: TrialKey,
    *,
    params: Mapping[str, Any],
    seeds: Mapping[str, int],
    run: Path,
    storage: Storage | None = None,
) -> TrialTask:
    """The task of one trial of an arm: what the study says of it, with these searched hyperparameters and seeds."""
    resources = resolved.study.resources
    return TrialTask(
        key=key,
        workload=arm.workload,
        data=data,
        hyperparameters={**params, **arm.space.fixed_values()},
        averaged=arm.averaged,
        schedule=arm.schedule,
        objective=resolved.study.objective,
        seeds=Seeds(**seeds),
        evaluation_steps=arm.evaluation_steps,
        run=run,
        device=resources.device,
        threads=resources.threads,
        time_limit_s=resources.time_limit_s,
        stalled_after_s=resources.stalled_after_s,
        rule=arm.rule,
        treats=arm.space.treats,
        rungs=arm.rungs if key.stage is Stage.TUNE else (),
        horizons=arm.horizons if key.stage is Stage.TUNE else (),
        refine=resolved.study.confirm.refine if key.stage is Stage.CONFIRM else None,
        storage=storage,
    )


Report = Callable[[Evaluation], None]
"""Receives every evaluation; may end the trial by raising `SystemExit`."""
