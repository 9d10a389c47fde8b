"""Two arms of one workload, seed by seed: how far apart, how sure, and what would make it surer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.nested_bootstrap import difference_interval, redraw
from analysis.power import EQUIVALENCE_TAIL, seeds_to_equivalence, seeds_to_resolve
from analysis.reselection import SEARCH_DEGREES, Search, paired_search_variance
from analysis.seed_intervals import Estimate, bounded_differences, bounds, ends, estimate, p_value, widened
from analysis.statistics import MINIMUM_RUNS, Floats, Interval, iqm, paired_differences
from analysis.workload_tests import probability_of_improvement

EQUIVALENCE = 2.0 * EQUIVALENCE_TAIL - 1.0
"""Confidence of the interval that must lie inside the region of practical equivalence: two tests at 5 % each."""
LIMIT_BY_SEARCH = 2.776
"""Student's 97.5 % quantile with `SEARCH_DEGREES`: the multiple of the search's error that no number of seeds beats."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An arm's test force errors by seed index, eV/Å, ``inf`` for a failed seed; empty before the first has ended.

    Attributes:
        search: what its search offers for re-selection; ``None`` where that is not known.
    """

    optimizer: str
    values: dict[int, float]
    search: Search | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The leading arm against another one, over the seeds that both have; errors in eV/Å.

    Attributes:
        difference: IQM of first minus second over paired seeds; negative when the first is better.
        interval: 95 % interval on which claims rest: seeds and, where `search_error` is known, the luck of the search;
            ``None`` (not available) for fewer than three pairs.
        seeds_interval: the same over seeds alone, for the configurations that were found.
        redrawn: 95 % percentile interval of the nested bootstrap; ``None`` where the searches are not known,
            or are not one search.
        redrawn_unconfirmed: largest share, over the two arms, of its draws that rest on a stage-1 value.
        n_pairs: seeds that both arms have ended, failed ones included.
        p: two-sided p that belongs to `interval`.
        seed_error, search_error: standard errors of the difference by seeds and by the search, ``None`` if not known.
        rope: half-width of the region of practical equivalence: one seed standard deviation, pooled over both arms.
        equivalence: 90 % interval that must lie inside it for a tie (two one-sided tests at 5 %).
        improvement: probability that a run of the first arm beats one of the second, ties counting half.
        seeds_to_resolve: paired seeds that would show this difference with 80 % power; ``None`` where none would.
        seeds_to_tie: paired seeds that would show equivalence; ``None`` where none would.
        limited_by_search: no number of seeds can resolve it, for the search's luck is too large.
    """

    first: str
    second: str
    difference: float
    interval: Interval | None
    seeds_interval: Interval | None
    redrawn: Interval | None
    redrawn_unconfirmed: float | None
    n_pairs: int
    p: float | None
    seed_error: float | None
    search_error: float | None
    rope: float | None
    equivalence: Interval | None
    improvement: float | None
    seeds_to_resolve: int | None
    seeds_to_tie: int | None
    limited_by_search: bool

    @property
    def resolved(self) -> bool:
        """Whether the first arm is better beyond the interval."""
        return self.interval is not None and self.interval.high < 0.0

    @property
    def equivalent(self) -> bool:
        """Whether the difference is shown to be smaller than one seed standard deviation."""
        if self.rope is None or self.equivalence is None:
            return False
        return -self.rope < self.equivalence.low and self.equivalence.high < self.rope


def compare(first: Contender, second: Contender, seed: int) -> Comparison:
    """Compare two arms over their common seeds.

    Args:
        first: the arm in the lead.
        second: another one.
        seed: seed of the nested bootstrap.
    """
    common = tuple(sorted(set(first.values) & set(second.values)))
    ours, theirs = (np.array([arm.values[i] for i in common], dtype=np.float64) for arm in (first, second))
    differences = paired_differences(ours, theirs)
    known = len(common) >= MINIMUM_RUNS
    own = estimate(differences) if known else None
    variance = _search_variance(first, second, common) if known else None
    claim = _with_search(own, variance)
    safe = estimate(bounded_differences(ours, theirs)) if known else None
    rope = pooled_deviation(ours, theirs)
    redrawn, unconfirmed = _redrawn(first, second, common, seed) if known else (None, None)
    centre = float(iqm(differences)) if common else 0.0
    deviation = float(differences.std(ddof=1)) if known and np.isfinite(differences).all() else float("inf")
    search_error = None if variance is None else float(np.sqrt(variance))
    return Comparison(
        first=first.optimizer,
        second=second.optimizer,
        difference=centre,
        interval=_interval(claim, differences, _with_search(safe, variance)),
        seeds_interval=_interval(own, differences, safe),
        redrawn=redrawn,
        redrawn_unconfirmed=unconfirmed,
        n_pairs=len(common),
        p=_p(claim, differences, _with_search(safe, variance)),
        seed_error=None if own is None else float(own.error),
        search_error=search_error,
        rope=rope,
        equivalence=None if claim is None else _plain_interval(*bounds(claim, EQUIVALENCE)),
        improvement=probability_of_improvement([ours], [theirs]) if common else None,
        seeds_to_resolve=seeds_to_resolve(centre, deviation),
        seeds_to_tie=None if rope is None else seeds_to_equivalence(centre, deviation, rope),
        limited_by_search=search_error is not None and abs(centre) <= LIMIT_BY_SEARCH * search_error,
    )


def _search_variance(first: Contender, second: Contender, seeds: tuple[int, ...]) -> float | None:
    if first.search is None or second.search is None:
        return None
    return paired_search_variance(first.search, second.search, seeds)


def _with_search(own: Estimate | None, variance: float | None) -> Estimate | None:
    """The claim's estimate; failures that leave no error, or leave no doubt, are not made any surer by the search."""
    if own is None or variance is None or not np.isfinite(own.centre) or not np.isfinite(own.error):
        return own
    return widened(own, np.asarray(variance, dtype=np.float64), SEARCH_DEGREES)


def _interval(of: Estimate | None, differences: Floats, safe: Estimate | None) -> Interval | None:
    return None if of is None or safe is None else _plain_interval(*ends(of, differences, safe))


def _plain_interval(low: Floats, high: Floats) -> Interval:
    return Interval(low=float(low), high=float(high))


def _p(of: Estimate | None, differences: Floats, safe: Estimate | None) -> float | None:
    """Two-sided p; where failures leave no error, that of the bounded differences if those of one arm alone failed."""
    if of is None or safe is None:
        return None
    one_sided = not (np.isposinf(differences).any() and np.isneginf(differences).any())
    return float(p_value(safe if np.isinf(of.error) and one_sided else of))


def pooled_deviation(first: Floats, second: Floats, fewest: int = MINIMUM_RUNS) -> float | None:
    """Seed standard deviation over the finite seeds of two arms; ``None`` where one has fewer than `fewest`."""
    finite = [values[np.isfinite(values)] for values in (first, second)]
    if min(map(len, finite)) < fewest:
        return None
    return float(np.sqrt(np.mean([values.var(ddof=1) for values in finite])))


def _redrawn(
    first: Contender, second: Contender, seeds: tuple[int, ...], seed: int
) -> tuple[Interval | None, float | None]:
    if first.search is None or second.search is None or first.search.source != second.search.source:
        return None, None
    found = redraw({"first": first.search, "second": second.search}, seeds, seed=seed)
    return difference_interval(found, "first", "second"), max(found.flagged.values())
