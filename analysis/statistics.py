"""Small pure statistics on errors, lower is better; a failed run is ``inf`` and is never dropped.

Definitions and their limits are those of rliable (arXiv:2108.13264), rewritten so that every draw is seeded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

CONFIDENCE = 0.95
DRAWS = 10_000
MINIMUM_RUNS = 3
"""Fewer runs have no interval: two values say next to nothing about their own scatter."""
TRIMMED = 0.25


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An interval, ends included, in the unit of the values it came from; at 95 % unless said otherwise."""

    low: float
    high: float


def iqm(values: Floats) -> Floats:
    """Interquartile mean over the last axis: ``floor(n / 4)`` runs cut at each end, then the mean.

    This is ``scipy.stats.trim_mean(x, 0.25)``, as in rliable: whole runs are cut, none is weighted. Three runs or fewer
    lose none, so there it is the plain mean and one failed run makes it ``inf``; five runs lose the best and the worst.

    Args:
        values: errors of shape (..., runs), ``inf`` where a run failed.

    Returns:
        Shape (...).

    Raises:
        ValueError: there are no runs.
    """
    values = np.asarray(values, dtype=np.float64)
    runs = values.shape[-1]
    if runs == 0:
        raise ValueError("iqm: found 0 runs, allowed: 1 or more")
    cut = int(TRIMMED * runs)
    kept = np.sort(values, axis=-1)[..., cut : runs - cut]
    return np.asarray(kept.mean(axis=-1), dtype=np.float64)


def median(values: Floats) -> float:
    """Median of errors of shape (runs,); ``inf`` when half of the runs or more failed."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    middle = len(ordered) // 2
    if len(ordered) % 2 == 1:
        return float(ordered[middle])
    return float(0.5 * (ordered[middle - 1] + ordered[middle]))


def paired_differences(first: Floats, second: Floats) -> Floats:
    """First minus second, run by run, for errors of equal shape; 0 where both failed, for failures are alike.

    Raises:
        ValueError: the arms have different numbers of runs.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired_differences: found shapes {first.shape} and {second.shape}, allowed: equal ones")
    # inf - inf is NaN: two failures are equal, which counts against any claim.
    both = np.isposinf(first) & np.isposinf(second)
    return np.asarray(np.where(both, 0.0, first - np.where(both, 0.0, second)), dtype=np.float64)


def percentile_interval(samples: Floats) -> Interval:
    """The middle 95 % of samples of shape (draws,), as order statistics so that ``inf`` needs no arithmetic."""
    ordered = np.sort(samples)
    tail = (1.0 - CONFIDENCE) / 2.0
    low = int(np.floor(tail * len(ordered)))
    return Interval(low=float(ordered[low]), high=float(ordered[len(ordered) - 1 - low]))


def best_so_far(values: Floats) -> Floats:
    """Running minimum along the last axis, shape unchanged."""
    return np.asarray(np.minimum.accumulate(np.asarray(values, dtype=np.float64), axis=-1), dtype=np.float64)


def random_order_band(values: Floats, seed: int, orders: int = 1000) -> tuple[Floats, Floats]:
    """Tenth and ninetieth percentile of the best of the first n trials, had the trials come in random order.

    Args:
        values: validation objectives of shape (trials,), ``inf`` where a trial failed.
        seed: seed of the orders.
        orders: number of random orders.

    Returns:
        Two arrays of shape (trials,), at n = 1 ... trials.
    """
    generator = np.random.default_rng(seed)
    shuffled = generator.permuted(np.tile(np.asarray(values, dtype=np.float64), (orders, 1)), axis=1)
    ordered = np.sort(best_so_far(shuffled), axis=0)
    return ordered[int(0.1 * orders)], ordered[int(0.9 * orders)]
