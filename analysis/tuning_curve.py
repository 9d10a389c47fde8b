"""What an arm's search had found after so many trials and so many device-seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.statistics import Floats, best_so_far, random_order_band
from analysis.step_costs import TimeAxis
from tunebench.study.record import Reason, TrialRecord


@dataclass(frozen=True, kw_only=True)
class TuningCurve:
    """Best validation objective so far (lower is better) of one arm's tune stage; every array has shape (trials,).

    Stopped trials count with the objective they had when they were stopped, failed ones as ``inf``; the device-seconds
    of both, by the workload's `TimeAxis`, are part of the sum. `low` and `high` hold 80 % of the curves that random
    orders of the trials would give.
    """

    trials: Floats
    device_s: Floats
    best: Floats
    low: Floats
    high: Floats


def tuning_curve(trials: Sequence[TrialRecord], seed: int, axis: TimeAxis) -> TuningCurve | None:
    """Curve over the ended trials of a tune stage in planned order; ``None`` before the first trial has ended."""
    ended = [trial for trial in trials if trial.reason is not None]
    if not ended:
        return None
    values = np.array([ended_value(trial) for trial in ended], dtype=np.float64)
    low, high = random_order_band(values, seed)
    return TuningCurve(
        trials=np.arange(1, len(ended) + 1, dtype=np.float64),
        device_s=np.cumsum([axis.of_trial(trial) for trial in ended], dtype=np.float64),
        best=best_so_far(values),
        low=low,
        high=high,
    )


def ended_value(trial: TrialRecord) -> float:
    """Validation objective that an ended trial is worth: its last one if finished or stopped, ``inf`` if it failed."""
    if trial.reason not in (Reason.FINISHED, Reason.STOPPED_ASHA) or trial.value is None:
        return math.inf
    return trial.value if math.isfinite(trial.value) else math.inf
