from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.best_of_n import best_of_n, budget_grid, censored_best_of_n, stopped_bounds, u_weights

INF = math.inf


def test_best_of_n_by_hand() -> None:
    # Of 1, 2, 4: alone 7/3; pairs have the best 1, 1, 2; all three 1.
    np.testing.assert_allclose(best_of_n(np.array([2.0, 4.0, 1.0]), np.array([1, 2, 3])), [7 / 3, 4 / 3, 1.0])


@given(st.lists(st.floats(-10.0, 10.0), min_size=1, max_size=7))
def test_it_is_the_mean_over_all_subsets(errors: list[float]) -> None:
    budgets = np.arange(1, len(errors) + 1)
    expected = [np.mean([min(subset) for subset in combinations(errors, int(n))]) for n in budgets]
    np.testing.assert_allclose(best_of_n(np.array(errors), budgets), expected, atol=1e-9)


def test_weights_of_a_thousand_trials_sum_to_one() -> None:
    np.testing.assert_allclose(u_weights(1000, np.array([1, 500, 1000])).sum(axis=1), 1.0, rtol=1e-9)


def test_expectation_is_infinite_while_all_drawn_may_fail() -> None:
    found = best_of_n(np.array([INF, INF, 1.0, 2.0]), np.array([1, 2, 3, 4]))
    assert found[[0, 1, 3]].tolist() == [INF, INF, 1.0]
    # Three of four: {inf, inf, 1}, {inf, inf, 2}, {inf, 1, 2} twice.
    assert found[2] == pytest.approx((1.0 + 2.0 + 1.0 + 1.0) / 4.0)


@pytest.mark.parametrize("budget", [0, 4])
def test_more_than_all_trials_or_none_is_refused(budget: int) -> None:
    with pytest.raises(ValueError, match="allowed: 1 to 3"):
        best_of_n(np.ones(3), np.array([budget]))


def test_stopped_trials_are_bounded_from_both_sides() -> None:
    errors = np.array([0.3, INF, np.nan, np.nan])
    optimistic, pessimistic = stopped_bounds(errors, np.array([0.3, INF, 0.9, 0.2]), np.array([2, 3]))
    np.testing.assert_array_equal(pessimistic, [0.3, INF, 0.9, 0.2])
    np.testing.assert_array_equal(optimistic, [0.3, INF, 0.3, 0.2])


def test_band_holds_the_curve_and_is_reproducible() -> None:
    low, high = np.array([1.0, 2.0, 2.0, 5.0]), np.array([1.0, 2.0, 6.0, 5.0])
    found = censored_best_of_n(low, high, np.array([1, 2, 4]), seed=1)
    np.testing.assert_allclose(found.optimistic, [2.5, best_of_n(low, np.array([2]))[0], 1.0])
    for low_end, lower, upper, high_end in zip(found.low, found.optimistic, found.pessimistic, found.high, strict=True):
        assert low_end <= lower <= upper <= high_end
    assert found == censored_best_of_n(low, high, np.array([1, 2, 4]), seed=1)
    with pytest.raises(ValueError, match="above the pessimistic"):
        censored_best_of_n(high, low, np.array([1]), seed=1)


def test_grid_covers_all_trials() -> None:
    assert budget_grid(5).tolist() == [1, 2, 3, 4, 5]
    assert budget_grid(10_000)[[0, -1]].tolist() == [1, 10_000]
    assert len(budget_grid(10_000)) <= 64
