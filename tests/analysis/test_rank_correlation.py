"""Rank correlations by hand, their intervals, and the rule by which an error adds nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from analysis.rank_correlation import RankCorrelation, kendall, rank_correlation, spearman

FORCES = np.array([0.01, 0.02, 0.03, 0.04, 0.05, 0.06])


def correlated(second: list[float], first: list[float] | None = None, seed: int = 1) -> RankCorrelation:
    own = np.array(second, dtype=np.float64)
    found = rank_correlation(FORCES[: len(own)] if first is None else np.array(first, dtype=np.float64), own, seed)
    assert found is not None
    return found


def test_correlations_by_hand() -> None:
    found = correlated([1.0, 3.0, 2.0, 4.0])
    assert found.spearman == pytest.approx(1.0 - 6.0 * 2.0 / (4.0 * 15.0))
    assert found.kendall == pytest.approx((5.0 - 1.0) / 6.0)
    assert correlated([4.0, 3.0, 2.0, 1.0]).spearman == pytest.approx(-1.0)


def test_the_same_order_over_five_optimizers_adds_nothing_and_over_four_one_cannot_say() -> None:
    assert correlated([1.0, 10.0, 100.0, 1000.0, 1e4]).adds_nothing
    assert not correlated([1.0, 10.0, 100.0, 1000.0]).adds_nothing
    assert not correlated([2.0, 1.0, 3.0, 5.0, 4.0]).adds_nothing  # 0.8


@pytest.mark.parametrize("optimizers", [4, 7, 12])
def test_both_agree_with_scipy_ties_included(optimizers: int) -> None:
    rng = np.random.default_rng(optimizers)
    first, second = rng.integers(5, size=(2, 50, optimizers)).astype(np.float64)
    for own, other, rho, tau in zip(first, second, spearman(first, second), kendall(first, second), strict=True):
        if np.ptp(own) and np.ptp(other):
            assert rho == pytest.approx(stats.spearmanr(own, other).statistic)
            assert tau == pytest.approx(stats.kendalltau(own, other).statistic)
        else:
            assert math.isnan(rho)
            assert math.isnan(tau)


def test_optimizers_that_failed_share_the_worst_rank() -> None:
    both = correlated([1.0, 2.0, math.inf, math.inf])
    assert both.spearman == pytest.approx(correlated([1.0, 2.0, 3.5, 3.5]).spearman)


def test_too_few_optimizers_and_an_error_that_does_not_vary_have_none() -> None:
    assert rank_correlation(FORCES[:3], FORCES[:3], 1) is None
    assert rank_correlation(FORCES, np.full(6, 2.0), 1) is None
    assert rank_correlation(FORCES, np.full(6, math.inf), 1) is None


def test_the_interval_is_seeded_and_holds_the_correlation() -> None:
    one, same = (correlated([2.0, 1.0, 3.0, 5.0, 4.0, 6.0], seed=3) for _ in range(2))
    assert one == same
    assert one.spearman_interval is not None
    assert one.spearman_interval.low < one.spearman <= one.spearman_interval.high
    assert one.kendall_interval is not None
    assert -1.0 <= one.kendall_interval.low < one.kendall


def test_intervals_of_independent_errors_hold_zero_about_as_often_as_they_say() -> None:
    """Percentile intervals over eight optimizers are too narrow; this is how much."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(60):
        found = rank_correlation(rng.normal(size=8), rng.normal(size=8), seed)
        assert found is not None
        assert found.spearman_interval is not None
        held += found.spearman_interval.low <= 0.0 <= found.spearman_interval.high
    assert held >= 48
