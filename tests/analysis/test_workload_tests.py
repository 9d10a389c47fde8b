from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from analysis.workload_tests import bayesian_signed_rank, holm, probability_of_improvement, wilcoxon

INF = math.inf


def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx((0.06, 0.03, 0.06))
    assert holm([0.9, 0.6]) == (1.0, 1.0)


@pytest.mark.parametrize(("workloads", "smallest"), [(4, 0.125), (5, 0.0625), (6, 0.03125), (8, 0.0078125)])
def test_smallest_p_of_wilcoxon(workloads: int, smallest: float) -> None:
    assert wilcoxon(-np.arange(1.0, workloads + 1)) == pytest.approx(smallest)


def test_wilcoxon_takes_failures_with_the_largest_ranks_and_drops_ties() -> None:
    assert wilcoxon(np.array([-1.0, -2.0, -INF, -3.0, -4.0, -5.0])) == pytest.approx(0.03125)
    assert wilcoxon(np.zeros(7)) == 1.0


def test_bayesian_signed_rank_by_closed_forms() -> None:
    # One workload at -1, rope 0.1: weight w of the workload. Sums: (0,0) alike; the others -0.5 or -1, better.
    # Better gets 1 - (1 - w)^2, alike (1 - w)^2; better leads where 1 - w < sqrt(1/2), and w ~ Beta(1, 0.5).
    found = bayesian_signed_rank(np.array([-1.0]), 0.1, seed=1, draws=100_000)
    expected = float(stats.beta.sf(1.0 - math.sqrt(0.5), 1.0, 0.5))
    assert found.first_better == pytest.approx(expected, abs=0.006)
    assert found.second_better == 0.0
    assert found.first_better + found.alike == pytest.approx(1.0)


def test_clear_cases_of_the_bayesian_test() -> None:
    better = bayesian_signed_rank(-np.ones(8), 0.1, seed=1)
    assert better.first_better > 0.99
    alike = bayesian_signed_rank(np.full(8, 0.01), 0.1, seed=1)
    assert alike.alike > 0.99
    even = bayesian_signed_rank(np.array([1.0, -1.0, 1.0, -1.0]), 0.1, seed=1, draws=50_000)
    assert even.first_better == pytest.approx(even.second_better, abs=0.02)


def test_a_failure_counts_and_does_not_swallow_the_rest() -> None:
    found = bayesian_signed_rank(np.array([-INF, INF, -1.0, -1.0, -1.0]), 0.1, seed=1)
    assert found.first_better > found.second_better


def test_bayesian_test_refuses_nothing_to_test() -> None:
    with pytest.raises(ValueError, match="found 0 workloads"):
        bayesian_signed_rank(np.array([]), 0.1, seed=1)


@given(st.lists(st.floats(-5.0, 5.0).map(lambda x: round(x, 3)), min_size=1, max_size=8), st.floats(0.01, 100.0))
def test_units_do_not_matter_and_signs_mirror(values: list[float], unit: float) -> None:
    rope = 0.5005  # no half sum of the values lies on it
    first = bayesian_signed_rank(np.array(values), rope, seed=3, draws=200)
    scaled = bayesian_signed_rank(unit * np.array(values), unit * rope, seed=3, draws=200)
    turned = bayesian_signed_rank(-np.array(values), rope, seed=3, draws=200)
    assert scaled.first_better == pytest.approx(first.first_better, abs=0.02)
    assert turned.second_better == pytest.approx(first.first_better)


def test_probability_of_improvement_by_hand() -> None:
    first, second = [np.array([1.0, 2.0]), np.array([INF])], [np.array([2.0, 3.0]), np.array([INF])]
    # First workload: 3 of 4 pairs better and one tie; second: one tie.
    assert probability_of_improvement(first, second) == pytest.approx((3.5 / 4 + 0.5) / 2)
    with pytest.raises(ValueError, match="found 1 and 0 workloads"):
        probability_of_improvement(first[:1], [])
