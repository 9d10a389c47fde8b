from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.seed_intervals import (
    Estimate,
    bounded_differences,
    bounds,
    ends,
    estimate,
    p_value,
    seed_interval,
    widened,
)
from analysis.statistics import Interval, paired_differences

INF = math.inf


def test_three_runs_have_students_interval() -> None:
    found = estimate(np.array([1.0, 2.0, 6.0]))
    # Mean 3, deviation sqrt(7).
    assert float(found.centre) == 3.0
    assert float(found.error) == pytest.approx(math.sqrt(7.0 / 3.0))
    interval = seed_interval(np.array([1.0, 2.0, 6.0]))
    assert interval is not None
    assert interval.high - 3.0 == pytest.approx(4.302653 * math.sqrt(7.0 / 3.0))
    assert float(p_value(found)) == pytest.approx(stats.ttest_1samp([1.0, 2.0, 6.0], 0.0).pvalue)


@pytest.mark.parametrize("runs", [1, 2])
def test_one_or_two_runs_have_no_interval(runs: int) -> None:
    assert seed_interval(np.ones(runs)) is None
    with pytest.raises(ValueError, match=f"found {runs} runs"):
        estimate(np.ones(runs))


@pytest.mark.parametrize("runs", [3, 4, 5, 6, 8, 10])
def test_normal_errors_are_covered_in_95_of_100_studies(runs: int) -> None:
    low, high = bounds(estimate(np.random.default_rng(runs).normal(size=(20_000, runs))))
    assert 0.945 <= ((low <= 0.0) & (high >= 0.0)).mean() <= 0.955


@pytest.mark.parametrize("runs", [3, 5, 10])
def test_heavy_tails_are_covered_too(runs: int) -> None:
    low, high = bounds(estimate(np.random.default_rng(runs).standard_t(3, size=(20_000, runs))))
    assert 0.945 <= ((low <= 0.0) & (high >= 0.0)).mean() <= 0.975


def test_a_failure_that_is_cut_leaves_a_finite_but_wide_interval() -> None:
    values = np.array([1.0, 2.0, 3.0, 4.0, INF])
    found = estimate(values)
    # Left: 2, 3, 4; winsorised 2, 2, 3, 4, 4 with deviation 1; error 1 * sqrt(4 / (3 * 2)), two degrees of freedom.
    assert (float(found.centre), float(found.degrees)) == (3.0, 2.0)
    assert float(found.error) == pytest.approx(math.sqrt(4.0 / 6.0))


def test_failures_inside_the_interquartile_range() -> None:
    assert seed_interval(np.array([1.0, 2.0, INF])) == Interval(low=-INF, high=INF)
    assert seed_interval(np.array([-INF, -INF, -1.0, -2.0, -3.0])) == Interval(low=-INF, high=INF)


def test_failures_of_one_arm_bounded_by_the_worst_finite_error_leave_its_side_open() -> None:
    first, second = np.array([1.0, 1.1, 1.2, 1.0, 1.1]), np.array([4.0, INF, INF, 5.0, 4.5])
    bounded = bounded_differences(first, second)
    np.testing.assert_allclose(bounded, [-3.0, -3.9, -3.8, -4.0, -3.4])
    differences = paired_differences(first, second)
    low, high = ends(estimate(differences), differences, estimate(bounded))
    assert float(low) == -INF
    assert float(high) == pytest.approx(float(bounds(estimate(bounded))[1]))
    turned = [float(end) for end in ends(estimate(-differences), -differences, estimate(-bounded))]
    assert turned == [-float(high), INF]
    mixed = np.array([-INF, INF, -1.0])
    assert [float(end) for end in ends(estimate(mixed), mixed, estimate(np.zeros(3)))] == [-INF, INF]


def test_runs_that_all_agree_are_certain() -> None:
    assert seed_interval(np.full(4, -INF)) == Interval(low=-INF, high=-INF)
    assert seed_interval(np.full(4, 2.0)) == Interval(low=2.0, high=2.0)
    assert float(p_value(estimate(np.full(4, -INF)))) == 0.0
    assert float(p_value(estimate(np.zeros(4)))) == 1.0


def test_failures_of_both_signs_say_nothing() -> None:
    assert seed_interval(np.array([-INF, INF, 1.0])) == Interval(low=-INF, high=INF)


def test_an_added_variance_by_hand() -> None:
    own = Estimate(centre=np.array(1.0), error=np.array(3.0), degrees=np.array(4.0))
    wider = widened(own, np.array(16.0), 2.0)
    # 9 + 16 = 5^2; degrees 625 / (81 / 4 + 256 / 2).
    assert (float(wider.error), float(wider.degrees)) == (5.0, pytest.approx(625.0 / 148.25))
    same = widened(own, np.array(0.0), 2.0)
    assert (float(same.error), float(same.degrees)) == (3.0, 4.0)


def test_an_infinite_added_variance_knows_nothing() -> None:
    own = Estimate(centre=np.array(1.0), error=np.array(3.0), degrees=np.array(4.0))
    assert [float(end) for end in bounds(widened(own, np.array(INF), 2.0))] == [-INF, INF]


finite = st.floats(-100.0, 100.0, allow_subnormal=False).map(lambda x: round(x, 6))


@given(st.lists(finite, min_size=3, max_size=10), st.floats(0.001, 1000.0), st.randoms(use_true_random=False))
def test_intervals_scale_with_units_and_ignore_the_order_of_runs(values, unit, random) -> None:
    shuffled = values.copy()
    random.shuffle(shuffled)
    first, second = seed_interval(np.array(values)), seed_interval(unit * np.array(shuffled))
    assert first is not None
    assert second is not None
    scale = unit * max(map(abs, values))
    assert second.low == pytest.approx(unit * first.low, rel=1e-9, abs=1e-9 * scale)
    assert second.high == pytest.approx(unit * first.high, rel=1e-9, abs=1e-9 * scale)


@given(st.lists(finite, min_size=3, max_size=10))
def test_turning_the_sign_turns_the_interval(values) -> None:
    first, second = seed_interval(np.array(values)), seed_interval(-np.array(values))
    assert first is not None
    assert second is not None
    assert (second.low, second.high) == pytest.approx((-first.high, -first.low), abs=1e-9)
