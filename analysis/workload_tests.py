"""Tests over workloads, the unit that a general claim is about: Wilcoxon with Holm, and the Bayesian signed rank.

Seeds are averaged inside a workload before anything here is called: seeds taken as data sets give 68 % false claims.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.statistics import Floats

MINIMUM_WORKLOADS = 6
"""The smallest two-sided p of Wilcoxon's test is 2^(1 - N): below six workloads it cannot reach 0.05."""
PRIOR_STRENGTH = 0.5
"""Weight of the prior's pseudo-workload without a difference, as in Benavoli et al. 2017."""
_DRAWS = 10_000
_HUGE = 1e150


@dataclass(frozen=True, kw_only=True)
class PracticalProbabilities:
    """Probabilities that the first optimizer is practically better, alike, or worse; they sum to 1."""

    first_better: float
    alike: float
    second_better: float


def bayesian_signed_rank(differences: Floats, rope: float, *, seed: int, draws: int = _DRAWS) -> PracticalProbabilities:
    """Bayesian signed-rank test with a region of practical equivalence.

    Dirichlet weights on the workloads and on one pseudo-workload without a difference; in each draw the three regions
    get the weighted share of pairwise means below ``-rope``, inside, and above ``rope``, and the largest share wins the
    draw (Benavoli, Corani, Demšar and Zaffalon, JMLR 18(77), 2017, section 4.3). Draws in which two regions share
    the largest part are split between them.

    Args:
        differences: first minus second per workload, lower is better for the first, shape (workloads,).
        rope: half-width of the region, in the unit of the differences.
        seed: seed of the draws.
        draws: number of draws.

    Raises:
        ValueError: no workloads, or a rope below 0.
    """
    values = np.concatenate([[0.0], np.asarray(differences, dtype=np.float64)])
    if len(values) < 2 or rope < 0.0:
        raise ValueError(f"signed rank: found {len(values) - 1} workloads and rope {rope:g}, allowed: 1 and 0 or more")
    weights = np.random.default_rng(seed).dirichlet([PRIOR_STRENGTH, *[1.0] * (len(values) - 1)], size=draws)
    bounded = np.clip(values, -_HUGE, _HUGE)  # so that failures on both sides cancel
    sums = 0.5 * (bounded[:, None] + bounded[None, :])
    regions = ((sums < -rope), (np.abs(sums) <= rope), (sums > rope))
    shares = np.stack([_quadratic(weights, region.astype(np.float64)) for region in regions], axis=1)
    leading = shares >= shares.max(axis=1, keepdims=True) - 1e-12
    better, alike, worse = (leading / leading.sum(axis=1, keepdims=True)).mean(axis=0)
    return PracticalProbabilities(first_better=float(better), alike=float(alike), second_better=float(worse))


def wilcoxon(differences: Floats) -> float:
    """Exact two-sided p of Wilcoxon's signed-rank test over workloads; 1 where all differences are 0.

    Infinite differences take part with the largest ranks.
    """
    values = np.clip(np.asarray(differences, dtype=np.float64), -_HUGE, _HUGE)
    values = values[values != 0.0]
    if not len(values):
        return 1.0
    return float(stats.wilcoxon(values, method="exact" if len(values) <= 50 else "auto").pvalue)


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """P values adjusted for their number by Holm (1979), in the same order; reject where at most 0.05."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    factors = len(p) - np.arange(len(p), dtype=np.float64)
    adjusted = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    result = np.empty_like(adjusted)
    result[order] = adjusted
    return tuple(result.tolist())


def probability_of_improvement(first: Sequence[Floats], second: Sequence[Floats]) -> float:
    """Mean over workloads of the share of pairs of runs in which the first optimizer has the lower error, ties half.

    Args:
        first: errors of the first optimizer by workload, each of shape (runs,); ``inf`` is a failure.
        second: errors of the second optimizer on the same workloads.

    Raises:
        ValueError: no workloads, or unequally many.
    """
    if not first or len(first) != len(second):
        raise ValueError(
            f"improvement: found {len(first)} and {len(second)} workloads, allowed: equally many, 1 or more"
        )
    return float(np.mean([_shares_of_pairs(ours, theirs) for ours, theirs in zip(first, second, strict=True)]))


def _shares_of_pairs(first: Floats, second: Floats) -> float:
    ours, theirs = np.asarray(first, dtype=np.float64)[:, None], np.asarray(second, dtype=np.float64)[None, :]
    return float((ours < theirs).mean() + 0.5 * (ours == theirs).mean())


def _quadratic(weights: Floats, region: Floats) -> Floats:
    return np.asarray(((weights @ region) * weights).sum(axis=1), dtype=np.float64)
