"""Do two errors order the optimizers alike? Rank correlations, with intervals over optimizers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from analysis.statistics import CONFIDENCE, Floats, Interval

MINIMUM_OPTIMIZERS = 4
"""Fewer have no correlation: three ranks agree by chance once in six times."""
ADDS_NOTHING_ABOVE = 0.9
"""Spearman's correlation above which an error says what the other one says already (proposed for studies like this)."""
ADDS_NOTHING_FROM = 5
"""Optimizers that it takes to say so."""
_DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """Agreement of two rankings of the same optimizers; 1 is the same order, -1 the reverse.

    Attributes:
        optimizers: how many.
        spearman, kendall: rho and tau-b; failed optimizers share the worst rank.
        spearman_interval, kendall_interval: 95 % percentile intervals over optimizers drawn with replacement; draws in
            which one of the errors does not vary say nothing and are left out.
        adds_nothing: rho is above `ADDS_NOTHING_ABOVE` over at least `ADDS_NOTHING_FROM` optimizers.
    """

    optimizers: int
    spearman: float
    spearman_interval: Interval | None
    kendall: float
    kendall_interval: Interval | None
    adds_nothing: bool


def rank_correlation(first: Floats, second: Floats, seed: int) -> RankCorrelation | None:
    """Correlate two errors of the same optimizers, ``inf`` for failures.

    Args:
        first: shape (optimizers,).
        second: likewise.
        seed: of the bootstrap.

    Returns:
        ``None`` for fewer than `MINIMUM_OPTIMIZERS`, or where one of the errors does not vary.
    """
    ranks = np.stack([stats.rankdata(first), stats.rankdata(second)]).astype(np.float64)
    optimizers = ranks.shape[1]
    if optimizers < MINIMUM_OPTIMIZERS or not np.ptp(ranks, axis=1).all():
        return None
    chosen = np.random.default_rng(seed).integers(optimizers, size=(_DRAWS, optimizers))
    draws = ranks[0][chosen], ranks[1][chosen]
    rho, tau = float(spearman(*ranks)), float(kendall(*ranks))
    return RankCorrelation(
        optimizers=optimizers,
        spearman=rho,
        spearman_interval=_interval(spearman(*draws)),
        kendall=tau,
        kendall_interval=_interval(kendall(*draws)),
        adds_nothing=rho > ADDS_NOTHING_ABOVE and optimizers >= ADDS_NOTHING_FROM,
    )


def spearman(first: Floats, second: Floats) -> Floats:
    """Spearman's rho over the last axis, ties at their mean rank: (..., optimizers) give (...), NaN without spread."""
    ranks = [stats.rankdata(values, axis=-1) for values in (first, second)]
    own, other = (values - values.mean(axis=-1, keepdims=True) for values in ranks)
    return _ratio((own * other).sum(axis=-1), (own**2).sum(axis=-1), (other**2).sum(axis=-1))


def kendall(first: Floats, second: Floats) -> Floats:
    """Kendall's tau-b over the last axis: (..., optimizers) give (...), NaN without variation."""
    own, other = (np.sign(values[..., :, None] - values[..., None, :]) for values in (first, second))
    return _ratio((own * other).sum(axis=(-2, -1)), (own**2).sum(axis=(-2, -1)), (other**2).sum(axis=(-2, -1)))


def _ratio(joint: Floats, own: Floats, other: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.asarray(joint / np.sqrt(own * other), dtype=np.float64)


def _interval(drawn: Floats) -> Interval | None:
    known = drawn[~np.isnan(drawn)]
    if len(known) < len(drawn) // 2:
        return None
    low, high = np.quantile(known, [0.5 - 0.5 * CONFIDENCE, 0.5 + 0.5 * CONFIDENCE])
    return Interval(low=float(low), high=float(high))
