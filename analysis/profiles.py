"""Performance profiles and scores on the time to a target, which is infinite where the target was missed.

Dolan and Moré (2002); Dahl et al. 2023 (arXiv:2306.07179) for the score. Ratios depend on who else takes part: publish
the times as well, and see `stability` for what happens without one of the optimizers.
"""

from __future__ import annotations

import numpy as np

from analysis.statistics import Floats

LARGEST_RATIO = 4.0
"""Where profiles end: slower than this multiple of the fastest counts as missed."""
TRAPEZOID_POINTS = 100
"""Points at which AlgoPerf's public scorer evaluates a profile."""


def ratios(times: Floats) -> Floats:
    """Time over the fastest time of each workload, lower is better.

    Args:
        times: time or steps to target, shape (optimizers, workloads), above 0, ``inf`` where missed.

    Returns:
        Shape (optimizers, workloads), 1 for the fastest; ``inf`` for everybody where nobody reached the target.

    Raises:
        ValueError: a time is not above 0.
    """
    times = np.asarray(times, dtype=np.float64)
    if not (times > 0.0).all():
        raise ValueError(f"ratios: found the time {float(np.min(times)):g}, allowed: above 0, inf for a miss")
    fastest = times.min(axis=0)
    reached = np.isfinite(fastest)
    divided = times / np.where(reached, fastest, 1.0)
    return np.where(reached, divided, np.inf).astype(np.float64)


def profile(ratio: Floats, taus: Floats) -> Floats:
    """Share of workloads on which each optimizer is within a multiple of the fastest, higher is better.

    Args:
        ratio: as `ratios` returns it, shape (optimizers, workloads).
        taus: multiples, shape (points,).

    Returns:
        Shape (optimizers, points).
    """
    return np.asarray((ratio[:, :, None] <= taus).mean(axis=1), dtype=np.float64)


def score(ratio: Floats, largest: float = LARGEST_RATIO) -> Floats:
    """Area under the profile from 1 to `largest`, in [0, 1], higher is better; shape (optimizers,).

    The exact integral: mean over workloads of ``max(0, largest - r) / (largest - 1)``.
    """
    gained = np.maximum(largest - np.where(np.isfinite(ratio), ratio, largest), 0.0)
    return np.asarray(gained.mean(axis=1) / (largest - 1.0), dtype=np.float64)


def trapezoid_score(ratio: Floats, largest: float = LARGEST_RATIO, points: int = TRAPEZOID_POINTS) -> Floats:
    """The same area by the trapezoid rule, as AlgoPerf's public scorer has it; up to 0.0015 off the exact one."""
    taus = np.linspace(1.0, largest, points, dtype=np.float64)
    return np.asarray(np.trapezoid(profile(ratio, taus), taus, axis=1) / (largest - 1.0), dtype=np.float64)


def geometric_speedup(times: Floats, baseline: int) -> Floats:
    """Geometric mean over workloads of the baseline's time over each optimizer's, above 1 is faster.

    A miss of the optimizer alone gives 0, a miss of the baseline alone ``inf``; where both occur nothing can be said
    and the optimizer gets NaN. A workload that both missed counts as a ratio of 1.

    Args:
        times: shape (optimizers, workloads), ``inf`` where missed.
        baseline: row of the baseline.

    Returns:
        Shape (optimizers,).
    """
    times = np.asarray(times, dtype=np.float64)
    both = np.isinf(times) & np.isinf(times[baseline])
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.where(both, 1.0, times[baseline])) - np.log(np.where(both, 1.0, times))
        return np.asarray(np.exp(logs.mean(axis=1)), dtype=np.float64)
