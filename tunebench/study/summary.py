"""The plan of a study in numbers: trials, rungs, steps and, where steps were measured, device-seconds of every arm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from tunebench.study.budget import affordable, arm_sentinels, cap_of
from tunebench.study.plan import ArmPlan, plan_arms, survivors, tune_steps
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import Refinement, Sampler, Workload

_EVALUATIONS_PER_ITERATION = 1.1
"""Of the full-batch loss, line search included: 42 to 45 in 40 iterations, docs/curvature.md."""


def plan_summary(
    resolved: ResolvedStudy,
    step_seconds: Mapping[str, float] | None = None,
    engines: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    afforded: Mapping[str, Mapping[int, int]] | None = None,
    training_frames: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The plan as plain data: per arm trials, rungs, expected survivors, steps and, where measured, device-seconds.

    Args:
        resolved: the study.
        step_seconds: measured seconds of one training step by arm name, alone on its device.
        engines: ``{engine, slots, reason}`` by workload name, where it is known.
        afforded: of a run under a cap, what its journal says that each arm's device-seconds pay for, by the number of
            configurations wanted (`read_afforded`).
        training_frames: frames of the training split by workload name, over all of which a refinement runs; where they
            are not known, neither is what a refinement costs.
    """
    frames = training_frames or {}
    rows = [
        _row(
            resolved,
            arm,
            (step_seconds or {}).get(arm.name),
            (afforded or {}).get(arm.name, {}),
            frames.get(arm.workload.name),
        )
        | _engine(engines or {}, arm)
        for arm in plan_arms(resolved)
    ]
    costs = (*(f"expected_{part}_device_s" for part in ("tune", "confirm", "refine")), "expected_device_s")
    return {
        "study": resolved.study.name,
        "hash": resolved.hash,
        "ranked": resolved.study.tune.sampler is Sampler.SOBOL,
        "arms": rows,
        "trials": sum(row["trials"] + row["confirm_trials"] for row in rows),
        **{cost: _sum_known(row[cost] for row in rows) for cost in costs},
    }


def _row(
    resolved: ResolvedStudy, planned: ArmPlan, step_s: float | None, afforded: Mapping[int, int], frames: int | None
) -> dict[str, Any]:
    """One arm; under a cap it has as many trials as that pays for if all of them take the measured step."""
    study, horizon = resolved.study, planned.workload.max_steps
    arm = _within_cap(resolved, planned, step_s, afforded)
    sentinels = len(_sentinels(resolved, planned, afforded, arm.trials))
    asha = study.tune.asha and study.tune.asha.model_copy(update={"sentinels": sentinels})
    tune = study.tune.model_copy(update={"trials_per_arm": arm.trials, "asha": asha})
    fewest = min(study.confirm.top_k, arm.trials)
    confirm_trials = fewest * study.confirm.seeds
    steps = {
        "tune": tune_steps(tune, arm.rungs, horizon, fewest, arm.fidelity),
        "confirm": confirm_trials * horizon,
        "refine": _refinement_steps(study.confirm.refine, planned.workload, confirm_trials, frames),
    }
    seconds = {part: None if step_s is None or count is None else step_s * count for part, count in steps.items()}
    return {
        "arm": arm.name,
        "trials": arm.trials,
        "trials_without_cap": planned.trials,
        "sentinels": sentinels if arm.rungs else 0,
        "cap_device_s": cap_of(planned, study.tune),
        "confirm_trials": confirm_trials,
        "horizon_steps": horizon,
        "rungs": list(arm.rungs),
        "fidelity": arm.fidelity.value if arm.rungs else None,
        "expected_survivors": survivors(tune, arm.rungs, fewest),
        "parameters": sorted(arm.space.parameters),
        "expected_tune_steps": steps["tune"],
        "expected_confirm_steps": steps["confirm"],
        "expected_refine_steps": steps["refine"],
        "step_s": step_s,
        **{f"expected_{part}_device_s": known for part, known in seconds.items()},
        "expected_device_s": _sum_known(seconds.values()),
    }


def _refinement_steps(how: Refinement | None, workload: Workload, trials: int, frames: int | None) -> int | None:
    """Training steps that see as many frames as the refinements do where none ends early; None where not known."""
    if how is None:
        return 0
    evaluations = 1 + math.ceil(_EVALUATIONS_PER_ITERATION * how.steps)
    return None if frames is None else trials * math.ceil(evaluations * frames / workload.batch_size)


def _within_cap(resolved: ResolvedStudy, arm: ArmPlan, step_s: float | None, afforded: Mapping[int, int]) -> ArmPlan:
    tune, cap = resolved.study.tune, cap_of(arm, resolved.study.tune)
    if arm.trials in afforded:  # decided, whatever a step takes now
        return replace(arm, trials=afforded[arm.trials])
    if cap is None or step_s is None:
        return arm
    times, fewest = [step_s] * arm.trials, resolved.study.confirm.top_k
    drawn = partial(_sentinels, resolved, arm, afforded)
    return replace(arm, trials=affordable(arm, tune.asha, times, drawn, fewest, cap, afforded.values()))


def _sentinels(resolved: ResolvedStudy, arm: ArmPlan, afforded: Mapping[int, int], trials: int) -> frozenset[int]:
    """The sentinels of an arm that has so many trials."""
    if resolved.study.tune.device_seconds_per_arm is None:
        return arm_sentinels(resolved, arm)
    return arm_sentinels(resolved, arm, {**afforded, arm.trials: trials})


def _engine(engines: Mapping[str, Mapping[str, Any]], arm: ArmPlan) -> dict[str, Any]:
    found = engines.get(arm.workload.name, {})
    return {"engine": found.get("engine"), "slots": found.get("slots")}


def _sum_known(values: Iterable[float | None]) -> float | None:
    """The sum, or None where a value is not known."""
    listed = list(values)
    return None if None in listed else sum(value for value in listed if value is not None)
