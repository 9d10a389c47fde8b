"""How much the luck of the search moves a comparison: the best configuration of other draws of the same configurations.

A study searches once. Drawing its configurations with replacement, the same ones for every arm, and selecting anew says
how differently that search might have ended. Selection looks at validation alone, so an arm's configurations have a
fixed order of preference and the best one drawn is the drawn one that comes first in it. The distribution of that pair
of places has a closed form, so no draws are needed here; `nested_bootstrap` draws where a closed form is missing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from analysis.statistics import Floats, Indices

SEARCH_DEGREES = 4.0
"""Degrees of freedom of the search's variance: it rests on the few leading configurations of one search.

By simulation (`benchmarks/verdict_calibration.py`): with 4 false winners stay at or below 5 % also where the search's
luck is far larger than the seeds'; 5 lets 6 % through there.
"""
EXCESS = 4.0 / 3.0
"""How much a bootstrap exaggerates the variance of the best of n: 1.345 for exponential spacings of the best values.

With q = 1/e the drawn best has place k with probability (1 - q) q^(k - 1), which gives a variance of
q / (1 - q)^2 + q / (1 - q) - q^2 / (1 - q^2) squared spacings, where the true variance is one.
"""
BLOWN_UP = 100.0
"""Times the lowest error of two arms; a seed above it has failed as one that ended in NaN has, whatever its number.

A trial may end with 1e5 eV/Å, which is finite. As a number it would drown every other difference.
"""
FAILED_FACTOR = 1.5
"""Weight of the variance over all confirmed configurations alike, where seeds failed; by the same simulation."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """What an arm's search offers for selection.

    Attributes:
        order: configuration numbers, the one that selection prefers first; confirmed ones lead.
        confirmed: test error by seed index of each confirmed configuration, in the same order; ``inf`` for a failure.
        tuned: stage-1 stand-in for the test error of the others, in the same order; ``inf`` for a failure.
        source: where the search was made; searches of different sources drew their configurations independently.
    """

    order: tuple[int, ...]
    confirmed: tuple[dict[int, float], ...]
    tuned: tuple[float, ...]
    source: str = ""


def joint_places(first: Indices, second: Indices, drawn: int, places: int) -> Floats:
    """Probability that the best drawn configuration has place k in the first arm's order and l in the second's.

    With both arms drawing the same configurations, neither of the first k of one order and the first l of the other is
    drawn with probability ``((N - u) / N)^n``, u being the size of their union. Differences over k and l give the
    probabilities; what lies beyond the last place is added to it.

    Args:
        first: configuration numbers in the first arm's order, shape (..., N).
        second: likewise for the second arm, the same numbers in another order.
        drawn: number n of configurations in a draw.
        places: how many leading places are told apart, at most N.

    Returns:
        Shape (..., places, places), summing to 1.

    Raises:
        ValueError: the arms do not have the same configurations.
    """
    number = first.shape[-1]
    if first.shape != second.shape or not np.array_equal(np.sort(first, axis=-1), np.sort(second, axis=-1)):
        raise ValueError("joint_places: found arms with different configurations, allowed: the same in both")
    same = (first[..., :places, None] == second[..., None, :places]).astype(np.float64)
    inside = np.zeros((*same.shape[:-2], places + 1, places + 1), dtype=np.float64)
    inside[..., 1:, 1:] = same.cumsum(axis=-1).cumsum(axis=-2)
    depth = np.arange(places + 1, dtype=np.float64)
    union = depth[:, None] + depth[None, :] - inside
    none_drawn = np.power((number - union) / number, drawn)
    none_drawn[..., -1, :] = none_drawn[..., :, -1] = 0.0
    upper, lower = none_drawn[..., :-1, :], none_drawn[..., 1:, :]
    return np.asarray((upper - lower)[..., :-1] - (upper - lower)[..., 1:], dtype=np.float64)


def places_alone(number: int, drawn: int, places: int) -> Floats:
    """Probability that the best drawn configuration of one arm has place k: ``((N-k)/N)^n - ((N-k-1)/N)^n``.

    Args:
        number: number N of configurations.
        drawn: number n of configurations in a draw.
        places: how many leading places are told apart, at most N; what lies beyond is added to the last one.

    Returns:
        Shape (places,), summing to 1.
    """
    none_drawn = np.power((number - np.arange(places + 1, dtype=np.float64)) / number, drawn)
    none_drawn[-1] = 0.0
    return np.asarray(none_drawn[:-1] - none_drawn[1:], dtype=np.float64)


def search_variance(differences: Floats, weights: Floats) -> Floats:
    """Variance that re-selection gives to a difference, freed from the noise of the seeds.

    The variance of the seed means over re-selections also holds seed noise; an unbiased estimate of that part, from how
    much single seeds differ, is taken off. Never below 0.

    Args:
        differences: first arm minus second arm at each pair of places and each seed, shape (..., k, l, seeds).
        weights: probabilities of the pairs, shape (..., k, l).

    Returns:
        Shape (...); ``inf`` where a pair that may be selected has an infinite difference.
    """
    seeds = differences.shape[-1]
    reachable = np.broadcast_to(weights[..., None] > 1e-12, differences.shape)
    broken = (~np.isfinite(differences) & reachable).any(axis=(-3, -2, -1))
    calm = np.where(np.isfinite(differences), differences, 0.0)
    of_means = _variance(calm.mean(axis=-1, keepdims=True), weights)[..., 0]
    of_seeds = _variance(calm, weights).mean(axis=-1)
    noise = (of_seeds - of_means) / (seeds - 1.0)
    return np.asarray(np.where(broken, np.inf, np.maximum(of_means - noise, 0.0)), dtype=np.float64)


def luck_of_search(
    differences: Floats, weights: Floats, failed: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
) -> Floats:
    """Variance of a difference by the luck of the search, from `search_variance` without its known excess.

    Selection puts configurations without a failed seed first. Where seeds of confirmed configurations failed, which of
    them was selected is therefore luck of the seeds too, and at least the variance over all pairs alike is taken.

    Args:
        differences: as for `search_variance`, shape (..., k, l, seeds), failures bounded.
        weights: as for `search_variance`, shape (..., k, l).
        failed: whether a confirmed configuration of either arm has a failed seed, shape (...).

    Returns:
        Shape (...).
    """
    drawn = search_variance(differences, weights) / EXCESS
    alike = FAILED_FACTOR * search_variance(differences, np.full_like(weights, 1.0 / np.prod(weights.shape[-2:])))
    return np.asarray(np.where(failed, np.maximum(drawn, alike), drawn), dtype=np.float64)


def paired_search_variance(first: Search, second: Search, seeds: tuple[int, ...]) -> float | None:
    """Search variance of the difference of two arms over common seeds, from their confirmed configurations.

    A failed seed of a confirmed configuration that is not the arm's best counts as the worst error of the two arms that
    is not blown up, for an infinite one would say that nothing at all is known.

    Returns:
        ``None`` where there is nothing to re-select: fewer than two configurations to draw from, a single confirmed one
        in both arms, or fewer than two seeds.
    """
    together = first.source == second.source
    common = set(first.order) & set(second.order)
    kept = (common, common) if together else (set(first.order), set(second.order))
    tables = [_table(search, seeds, own) for search, own in zip((first, second), kept, strict=True)]
    if min(map(len, kept)) < 2 or len(seeds) < 2 or min(map(len, tables)) == 0 or max(map(len, tables)) < 2:
        return None
    worst = _worst(np.concatenate([table.ravel() for table in tables]))
    if worst is None:
        return None
    places = min(max(map(len, tables)), *map(len, kept))
    clipped = [np.minimum(_padded(table, places), worst) for table in tables]
    weights = _common_places(first, second, common, places) if together else _independent_places(first, second, places)
    differences = clipped[0][:, None, :] - clipped[1][None, :, :]
    failed = np.asarray(any((table > worst).any() for table in tables))
    return float(luck_of_search(differences, weights, failed))


def _worst(errors: Floats) -> float | None:
    """The largest error that is not blown up; ``None`` where all failed."""
    lowest = errors[errors > 0.0].min(initial=math.inf)
    sound = errors[np.isfinite(errors) & (errors <= BLOWN_UP * lowest)]
    return float(sound.max()) if len(sound) else None


def _common_places(first: Search, second: Search, common: set[int], places: int) -> Floats:
    ours, theirs = (
        np.array([config for config in search.order if config in common], dtype=np.intp) for search in (first, second)
    )
    return joint_places(ours, theirs, len(common), places)


def _independent_places(first: Search, second: Search, places: int) -> Floats:
    ours, theirs = (places_alone(len(search.order), len(search.order), places) for search in (first, second))
    return np.asarray(ours[:, None] * theirs[None, :], dtype=np.float64)


def _table(search: Search, seeds: tuple[int, ...], common: set[int]) -> Floats:
    """Errors of the leading confirmed configurations, up to the first one that lacks a seed, shape (places, seeds)."""
    rows: list[list[float]] = []
    for config, values in zip(search.order, search.confirmed, strict=False):
        if config in common:
            if not all(seed in values for seed in seeds):
                break
            rows.append([values[seed] for seed in seeds])
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(seeds))


def _padded(table: Floats, places: int) -> Floats:
    return np.concatenate([table, np.repeat(table[-1:], max(places - len(table), 0), axis=0)])[:places]


def _variance(values: Floats, weights: Floats) -> Floats:
    """Variance over the pairs of places, shape (..., seeds)."""
    weight = weights[..., None]
    mean = (weight * values).sum(axis=(-3, -2))
    return np.asarray((weight * np.square(values)).sum(axis=(-3, -2)) - np.square(mean), dtype=np.float64)
