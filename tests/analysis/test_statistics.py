from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import trim_mean

from analysis.statistics import (
    best_so_far,
    iqm,
    median,
    paired_differences,
    percentile_interval,
    random_order_band,
)

INF = math.inf


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0], 7.0),
        ([1.0, 2.0, 6.0], 3.0),  # nothing is cut from three: the plain mean
        ([1.0, 2.0, 4.0, 100.0], 3.0),  # one cut at each end
        ([9.0, 1.0, 2.0, 3.0, -50.0], 2.0),
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 80.0], 4.5),  # two cut at each end
    ],
)
def test_iqm_by_hand(values: list[float], expected: float) -> None:
    assert float(iqm(np.array(values, dtype=np.float64))) == pytest.approx(expected)


@pytest.mark.parametrize("runs", [1, 2, 3, 4, 5, 7, 8, 12, 13])
def test_iqm_is_scipys_quarter_trimmed_mean(runs: int) -> None:
    values = np.random.default_rng(runs).normal(size=(3, runs))
    np.testing.assert_allclose(iqm(values), trim_mean(values, 0.25, axis=-1), rtol=1e-12)


def test_iqm_of_no_run_is_refused() -> None:
    with pytest.raises(ValueError, match="found 0 runs"):
        iqm(np.array([], dtype=np.float64))


def test_one_failure_of_five_is_cut_but_one_of_three_is_fatal() -> None:
    assert float(iqm(np.array([1.0, 2.0, 3.0, 4.0, INF]))) == pytest.approx(3.0)
    assert float(iqm(np.array([1.0, 2.0, INF]))) == INF
    assert float(iqm(np.array([1.0, 2.0, 3.0, INF, INF]))) == INF


def test_median_keeps_failures() -> None:
    assert median(np.array([3.0, 1.0, 2.0])) == 2.0
    assert median(np.array([1.0, 2.0, INF, INF])) == INF
    assert median(np.array([1.0, 3.0, 2.0, INF])) == 2.5


def test_percentile_interval_cuts_250_of_10000_samples_at_each_end() -> None:
    interval = percentile_interval(np.arange(10_000, dtype=np.float64))
    assert (interval.low, interval.high) == (250.0, 9749.0)


def test_unequal_numbers_of_runs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found shapes \(3,\) and \(4,\)"):
        paired_differences(np.zeros(3), np.zeros(4))


def test_two_failures_are_no_difference_and_one_is_an_infinite_one() -> None:
    differences = paired_differences(np.array([INF, 1.0, INF, 3.0]), np.array([INF, INF, 1.0, 1.0]))
    assert differences.tolist() == [0.0, -INF, INF, 2.0]


def test_best_so_far_never_rises() -> None:
    np.testing.assert_array_equal(best_so_far(np.array([INF, 3.0, 4.0, 1.0])), [INF, 3.0, 3.0, 1.0])


def test_random_orders_end_at_the_best_trial() -> None:
    low, high = random_order_band(np.array([5.0, 1.0, INF, 3.0]), seed=2)
    assert low[-1] == high[-1] == 1.0
    assert low[0] == 1.0
    assert high[0] == INF
    assert np.all(np.diff(high[np.isfinite(high)]) <= 0.0)
