"""When training curves first reach a target error, in steps and in seconds; a miss is infinite and takes part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.statistics import Floats, median


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Steps and device-seconds at which one run first reached a target; ``inf`` where it did not."""

    steps: float
    device_s: float


MISSED = Reached(steps=np.inf, device_s=np.inf)


def first_reach(steps: Floats, device_s: Floats, errors: Floats, target: float) -> Reached:
    """The first evaluation with an error at or below the target.

    Args:
        steps: steps at the evaluations, rising, shape (evaluations,).
        device_s: device-seconds at them, shape (evaluations,).
        errors: validation error (lower is better), shape (evaluations,); NaN never reaches a target.
        target: error to reach.
    """
    with np.errstate(invalid="ignore"):
        reached = np.flatnonzero(np.asarray(errors, dtype=np.float64) <= target)
    if not len(reached):
        return MISSED
    return Reached(steps=float(steps[reached[0]]), device_s=float(device_s[reached[0]]))


def median_reach(runs: Sequence[Reached]) -> Reached:
    """Median over seeds, misses included: infinite where half of them or more missed. Each axis by itself."""
    if not runs:
        return MISSED
    return Reached(
        steps=median(np.array([run.steps for run in runs], dtype=np.float64)),
        device_s=median(np.array([run.device_s for run in runs], dtype=np.float64)),
    )
