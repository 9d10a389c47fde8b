"""What a study will do, before it does it: arms, rungs, trials, evaluation steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunebench.study.record import Readout, Stage, TrialKey
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.search_space import SearchSpace
from tunebench.study.seeds import named_seed
from tunebench.study.spec import Asha, Sampler, Schedule, Workload

_EVALUATIONS = 20  # per horizon, where the study does not say


@dataclass(frozen=True, kw_only=True)
class ArmPlan:
    """One arm: a workload and an optimizer with its search space, schedule and rungs.

    Attributes:
        rungs: steps at which ASHA compares the arm's trials. evaluation_steps: steps with validation errors.
        averaged: the averaged readout, EMA or SCHEDULE_FREE.
    """

    workload: Workload
    optimizer: str
    space: SearchSpace
    schedule: Schedule
    averaged: Readout
    rungs: tuple[int, ...]
    evaluation_steps: tuple[int, ...]

    @property
    def name(self) -> str:
        """``WORKLOAD/OPTIMIZER``."""
        return f"{self.workload.name}/{self.optimizer}"

    def key(self, stage: Stage, config_index: int, seed_index: int) -> TrialKey:
        """Key of one of the arm's trials."""
        return TrialKey(
            workload=self.workload.name,
            optimizer=self.optimizer,
            stage=stage,
            config_index=config_index,
            seed_index=seed_index,
        )


def plan_arms(resolved: ResolvedStudy) -> list[ArmPlan]:
    """All arms, workload by workload in the order of the study file."""
    return [
        ArmPlan(
            workload=workload,
            optimizer=arm.name,
            space=resolved.spaces[arm.name],
            schedule=resolved.schedules[arm.name],
            averaged=Readout(resolved.spaces[arm.name].readout),
            rungs=(rungs := rung_steps(resolved.study.tune.asha, workload.max_steps)),
            evaluation_steps=evaluation_steps(workload, rungs),
        )
        for workload in resolved.study.workloads
        for arm in resolved.study.optimizers
    ]


def rung_steps(asha: Asha | None, horizon: int) -> tuple[int, ...]:
    """Steps below the horizon at which trials of an arm are compared: grace, grace x factor, grace x factor² ..."""
    if asha is None:
        return ()
    steps = []
    step = asha.grace_steps or max(horizon // 4, 1)
    while step < horizon:
        steps.append(step)
        step *= asha.reduction_factor
    return tuple(steps)


def evaluation_steps(workload: Workload, rungs: tuple[int, ...]) -> tuple[int, ...]:
    """Ascending steps with validation errors: a regular grid, every rung, the horizon."""
    every = workload.evaluate_every_steps or max(workload.max_steps // _EVALUATIONS, 1)
    return tuple(sorted({*range(every, workload.max_steps + 1, every), *rungs, workload.max_steps}))


def survivors(trials: int, rungs: tuple[int, ...], reduction_factor: int) -> list[int]:
    """Trials expected to train beyond each rung; at least one always does."""
    counts = []
    for _ in rungs:
        trials = max(trials // reduction_factor, 1)
        counts.append(trials)
    return counts


def trial_seeds(root: int, workload: str, stage: Stage, seed_index: int) -> dict[str, int]:
    """Named seeds of a trial. The optimizer has no part in them: arms are paired by seed index."""
    return {name: named_seed(root, name, workload, stage.value, seed_index) for name in ("init", "order", "labels")}


@dataclass(frozen=True, kw_only=True)
class ArmCost:
    """Expected work of one arm in steps; multiply by the seconds of a step on the device at hand."""

    tune_steps: int
    confirm_steps: int


def arm_cost(arm: ArmPlan, resolved: ResolvedStudy) -> ArmCost:
    """Expected steps of an arm under the stopping rule, without failures."""
    tune, confirm = resolved.study.tune, resolved.study.confirm
    ends = [*arm.rungs, arm.workload.max_steps]
    factor = tune.asha.reduction_factor if tune.asha else 1
    alive = [tune.trials_per_arm, *survivors(tune.trials_per_arm, arm.rungs, factor)]
    segments = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return ArmCost(
        tune_steps=sum(count * length for count, length in zip(alive, segments, strict=True)),
        confirm_steps=confirm.top_k * confirm.seeds * arm.workload.max_steps,
    )


def plan_summary(resolved: ResolvedStudy, step_seconds: dict[str, float] | None = None) -> dict[str, Any]:
    """The plan as plain data: per arm trials, rungs, expected survivors, steps and, where measured, device-seconds.

    Args:
        resolved: the study.
        step_seconds: measured seconds of one training step by arm name.
    """
    study = resolved.study
    rows: list[dict[str, Any]] = []
    for arm in plan_arms(resolved):
        cost = arm_cost(arm, resolved)
        seconds = (step_seconds or {}).get(arm.name)
        rows.append(
            {
                "arm": arm.name,
                "trials": study.tune.trials_per_arm,
                "confirm_trials": study.confirm.top_k * study.confirm.seeds,
                "horizon_steps": arm.workload.max_steps,
                "rungs": list(arm.rungs),
                "expected_survivors": survivors(
                    study.tune.trials_per_arm, arm.rungs, study.tune.asha.reduction_factor if study.tune.asha else 1
                ),
                "parameters": sorted(arm.space.parameters),
                "expected_tune_steps": cost.tune_steps,
                "expected_confirm_steps": cost.confirm_steps,
                "step_s": seconds,
                "expected_device_s": None if seconds is None else seconds * (cost.tune_steps + cost.confirm_steps),
            }
        )
    known = [row["expected_device_s"] for row in rows]
    return {
        "study": study.name,
        "hash": resolved.hash,
        "ranked": study.tune.sampler is Sampler.SOBOL,
        "arms": rows,
        "trials": sum(row["trials"] + row["confirm_trials"] for row in rows),
        "expected_device_s": None if None in known else sum(known),
    }
