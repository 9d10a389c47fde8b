"""What a search of n configurations may expect to find, from one search of more, without an order of its trials.

The unbiased U-statistic of Tang et al. 2020 (arXiv:2004.14283, after Dodge et al. 2019): the mean of the best of all
subsets of n trials. It asks for trials that were drawn independently and trained to the horizon: sentinels, or a study
without early stopping. Where trials were stopped, `censored_best_of_n` bounds it from both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln

from analysis.statistics import Floats, Indices

BAND = 0.8
"""Share of bootstrap curves inside a band."""
DRAWS = 2000
_CHUNK = 4_000_000


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """Expected best error (lower is better) after n configurations, one entry per budget.

    Attributes:
        n: numbers of configurations.
        optimistic, pessimistic: expectation with stopped trials at their lower and at their upper bound; equal where no
            trial was stopped.
        low, high: 80 % bootstrap band over trials, the low end of the optimistic and the high end of the pessimistic
            curve. Unreliable for n near the number of trials.
    """

    n: tuple[int, ...]
    optimistic: tuple[float, ...]
    pessimistic: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def u_weights(number: int, budgets: Indices) -> Floats:
    """Weight of each trial, from the worst to the best, in the best of n: ``C(i-1, n-1) / C(number, n)``.

    Args:
        number: number of trials.
        budgets: numbers n of configurations, between 1 and `number`, shape (budgets,).

    Returns:
        Shape (budgets, number); each row sums to 1.

    Raises:
        ValueError: a budget outside 1 to `number`.
    """
    budgets = np.asarray(budgets, dtype=np.intp)
    if not len(budgets) or budgets.min() < 1 or budgets.max() > number:
        raise ValueError(f"best of n: found n = {budgets.tolist()}, allowed: 1 to {number}, the number of trials")
    place, n = np.arange(1, number + 1, dtype=np.float64)[None, :], budgets.astype(np.float64)[:, None]
    possible = place >= n
    above = np.where(possible, place - n, 0.0)
    # log C(i-1, n-1) - log C(number, n)
    subsets = gammaln(place) - gammaln(n) - gammaln(above + 1.0)
    every = gammaln(number + 1.0) - gammaln(n + 1.0) - gammaln(number - n + 1.0)
    return np.where(possible, np.exp(subsets - every), 0.0).astype(np.float64)


def best_of_n(errors: Floats, budgets: Indices) -> Floats:
    """Expected lowest error of n of the trials, drawn without replacement.

    Args:
        errors: errors of shape (..., trials), lower is better; ``inf`` is a failure.
        budgets: numbers of configurations, shape (budgets,).

    Returns:
        Shape (..., budgets); ``inf`` where all n may fail.
    """
    ordered = np.sort(np.asarray(errors, dtype=np.float64), axis=-1)[..., ::-1]
    weights = u_weights(ordered.shape[-1], budgets)
    failed = np.isinf(ordered)
    expected = np.where(failed, 0.0, ordered) @ weights.T
    # Weights of n above the number of failures are exactly 0 on failed trials, so 0 * inf never has to be evaluated.
    return np.where((failed.astype(np.float64) @ weights.T) > 0.0, np.inf, expected).astype(np.float64)


def censored_best_of_n(optimistic: Floats, pessimistic: Floats, budgets: Indices, *, seed: int) -> BestOfN:
    """Expected best of n between the bounds of every trial, with a bootstrap band over trials.

    Args:
        optimistic: lower bound of each trial's final error, shape (trials,).
        pessimistic: upper bound, shape (trials,).
        budgets: numbers of configurations, shape (budgets,).
        seed: seed of the band.

    Raises:
        ValueError: a lower bound above its upper one.
    """
    low, high = (np.asarray(values, dtype=np.float64) for values in (optimistic, pessimistic))
    if low.shape != high.shape or (low > high).any():
        raise ValueError("best of n: found an optimistic bound above the pessimistic one, allowed: at most equal")
    bands = _bands(low, high, budgets, seed)
    return BestOfN(
        n=tuple(np.asarray(budgets).tolist()),
        optimistic=tuple(best_of_n(low, budgets).tolist()),
        pessimistic=tuple(best_of_n(high, budgets).tolist()),
        low=tuple(bands[0].tolist()),
        high=tuple(bands[1].tolist()),
    )


def stopped_bounds(errors: Floats, best_seen: Floats, stopped: Indices) -> tuple[Floats, Floats]:
    """Bounds of the final errors of an arm's trials, where some were stopped because they looked bad.

    Pessimistic: a stopped trial never improves on its best value. Optimistic: it ends like its arm's best finisher (or
    at its own best value, where that is lower already).

    Args:
        errors: final error of finished trials, ``inf`` of failed ones, shape (trials,); stopped entries are not read.
        best_seen: lowest error each trial ever had, shape (trials,).
        stopped: indices of stopped trials.

    Returns:
        Optimistic and pessimistic errors, each of shape (trials,).
    """
    pessimistic = np.array(errors, dtype=np.float64)
    pessimistic[stopped] = best_seen[stopped]
    finished = np.delete(pessimistic, stopped)
    finisher = finished.min(initial=np.inf)
    optimistic = pessimistic.copy()
    optimistic[stopped] = np.minimum(best_seen[stopped], finisher)
    return optimistic, pessimistic


def budget_grid(trials: int, most: int = 64) -> Indices:
    """Numbers of configurations to evaluate: all of them, or `most` evenly spaced in the logarithm."""
    if trials <= most:
        return np.arange(1, trials + 1, dtype=np.intp)
    return np.unique(np.round(np.geomspace(1.0, trials, most)).astype(np.intp))


def _bands(low: Floats, high: Floats, budgets: Indices, seed: int) -> tuple[Floats, Floats]:
    number, tail = len(low), 0.5 - 0.5 * BAND
    generator = np.random.default_rng(seed)
    curves: tuple[list[Floats], list[Floats]] = ([], [])
    for size in _chunks(number):
        drawn = generator.integers(0, number, size=(size, number), dtype=np.intp)
        curves[0].append(best_of_n(low[drawn], budgets))
        curves[1].append(best_of_n(high[drawn], budgets))
    below, above = (np.sort(np.concatenate(part), axis=0) for part in curves)
    return below[int(tail * DRAWS)], above[DRAWS - 1 - int(tail * DRAWS)]


def _chunks(width: int) -> Iterator[int]:
    size = max(_CHUNK // width, 1)
    for start in range(0, DRAWS, size):
        yield min(size, DRAWS - start)
