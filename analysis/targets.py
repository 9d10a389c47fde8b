"""Time and steps to a target error on every workload, with profiles, scores and speed-ups over workloads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.load import Run
from analysis.profiles import geometric_speedup, ratios, score
from analysis.selection import best_candidate, chosen_readout, confirm_candidates
from analysis.stability import LeftOut, by_profile_score, leave_one_out
from analysis.statistics import Floats, median
from analysis.step_costs import step_time, time_axis
from analysis.time_to_target import Reached, first_reach, median_reach
from tunebench.study.record import Metric, Readout, Reason, Split, TrialRecord

BASELINE = "adamw"
"""Optimizer that sets targets and that speed-ups are told against, where the study has it; else its first one."""


@dataclass(frozen=True, kw_only=True)
class WorkloadTarget:
    """Who reached the baseline's error, and when.

    Attributes:
        target: the baseline's median validation force MAE at the horizon, eV/Å; ``None`` where it failed.
        reached: optimizer -> median steps and device-seconds over the seeds of its best configuration.
        calibrated: device-seconds are calibrated.
    """

    workload: str
    target: float | None
    reached: dict[str, Reached]
    calibrated: bool


@dataclass(frozen=True, kw_only=True)
class AxisScores:
    """Scores on one axis over all workloads.

    Attributes:
        ratios: optimizer -> ratio to the fastest by workload, ``inf`` where missed.
        scores: optimizer -> exact profile score in [0, 1], higher is better; depends on who takes part.
        speedups: optimizer -> geometric-mean speed-up against the baseline, ``None`` where misses leave none.
        left_out: the order by score without each optimizer in turn.
    """

    ratios: dict[str, tuple[float, ...]]
    scores: dict[str, float]
    speedups: dict[str, float | None]
    left_out: tuple[LeftOut, ...]


@dataclass(frozen=True, kw_only=True)
class TargetScores:
    """Steps and seconds to the baseline's own error, workload by workload and in sum."""

    baseline: str
    workloads: tuple[WorkloadTarget, ...]
    steps: AxisScores | None
    seconds: AxisScores | None


def target_scores(run: Run) -> TargetScores:
    """How fast every optimizer's best configuration reaches the error at which the baseline's ends.

    Scores need a target on at least one workload; workloads without one are left out of them.
    """
    baseline = BASELINE if BASELINE in run.rivals else (run.rivals or run.optimizers)[0]
    workloads = tuple(_workload_target(run, name, baseline) for name in run.workloads)
    usable = [workload for workload in workloads if workload.target is not None]
    steps = {name: np.array([w.reached[name].steps for w in usable], dtype=np.float64) for name in run.rivals}
    seconds = {name: np.array([w.reached[name].device_s for w in usable], dtype=np.float64) for name in run.rivals}
    return TargetScores(
        baseline=baseline,
        workloads=workloads,
        steps=_axis_scores(steps, baseline),
        seconds=_axis_scores(seconds, baseline),
    )


def _axis_scores(times: Mapping[str, Floats], baseline: str) -> AxisScores | None:
    table = np.stack(list(times.values()))
    if not table.shape[1] or not (table > 0.0).all():
        return None
    names, ratio = list(times), ratios(table)
    speedups = geometric_speedup(table, names.index(baseline))
    return AxisScores(
        ratios=dict(zip(names, map(tuple, ratio.tolist()), strict=True)),
        scores=dict(zip(names, score(ratio).tolist(), strict=True)),
        speedups={name: None if math.isnan(s) else s for name, s in zip(names, speedups.tolist(), strict=True)},
        left_out=leave_one_out(times, by_profile_score),
    )


def _workload_target(run: Run, workload: str, baseline: str) -> WorkloadTarget:
    curves = {name: _curves(run, workload, name) for name in run.rivals}
    ends = [_end(trial, curve) for trial, curve in curves[baseline]]
    target = median(np.array(ends, dtype=np.float64)) if ends else math.inf
    return WorkloadTarget(
        workload=workload,
        target=target if math.isfinite(target) else None,
        reached={name: median_reach([_reach(curve, target) for _, curve in found]) for name, found in curves.items()},
        calibrated=time_axis(run, workload).calibrated,
    )


def _end(trial: TrialRecord, curve: pd.DataFrame) -> float:
    finished = trial.reason is Reason.FINISHED and len(curve)
    return float(curve["value"].iloc[-1]) if finished else math.inf


def _reach(curve: pd.DataFrame, target: float) -> Reached:
    steps, device_s, errors = (curve[name].to_numpy(dtype=np.float64) for name in ("step", "device_s", "value"))
    return first_reach(steps, device_s, errors, target if math.isfinite(target) else -math.inf)


def _curves(run: Run, workload: str, optimizer: str) -> list[tuple[TrialRecord, pd.DataFrame]]:
    """Validation force error of every ended seed of an arm's best configuration, in the readout that counts."""
    best = best_candidate(confirm_candidates(run, workload, optimizer), run.study.objective)
    if best is None:
        return []
    calibrated = time_axis(run, workload).calibrated
    return [(trial, _curve(run, trial, calibrated)) for trial in best.trials.values()]


def _curve(run: Run, trial: TrialRecord, calibrated: bool) -> pd.DataFrame:
    readout = chosen_readout(trial, run.study.objective) or Readout.RAW.value
    own = run.curve(trial.key.trial_id)
    wanted = (own["split"] == Split.VAL) & (own["metric"] == Metric.FORCES_MAE) & (own["readout"] == readout)
    curve = own[wanted].sort_values("step")[["step", "device_s", "value"]]
    cost = step_time(run, trial) if calibrated else None
    return curve if cost is None else curve.assign(device_s=curve["step"] * cost.median_s)
