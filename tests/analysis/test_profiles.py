from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.profiles import geometric_speedup, profile, ratios, score, trapezoid_score
from analysis.stability import by_profile_score, leave_one_out
from analysis.time_to_target import MISSED, Reached, first_reach, median_reach

INF = math.inf
TIMES = np.array([[1.0, 10.0], [2.0, 5.0], [INF, INF]])


def test_ratios_profile_and_score_by_hand() -> None:
    ratio = ratios(TIMES)
    np.testing.assert_array_equal(ratio, [[1.0, 2.0], [2.0, 1.0], [INF, INF]])
    np.testing.assert_array_equal(profile(ratio, np.array([1.0, 2.0])), [[0.5, 1.0], [0.5, 1.0], [0.0, 0.0]])
    # (4 - 1) / 3 on one workload, (4 - 2) / 3 on the other.
    np.testing.assert_allclose(score(ratio), [5.0 / 6.0, 5.0 / 6.0, 0.0])
    np.testing.assert_allclose(trapezoid_score(ratio), [5.0 / 6.0, 5.0 / 6.0, 0.0], atol=0.003)


def test_workload_that_nobody_solved_gives_nobody_anything() -> None:
    ratio = ratios(np.array([[1.0, INF], [3.0, INF]]))
    np.testing.assert_allclose(score(ratio), [0.5, 1.0 / 6.0])


def test_beyond_four_times_the_fastest_is_a_miss() -> None:
    np.testing.assert_allclose(score(ratios(np.array([[1.0], [4.0], [5.0]]))), [1.0, 0.0, 0.0])


def test_geometric_speedup_by_hand() -> None:
    times = np.array([[8.0, 2.0], [2.0, 2.0], [INF, 1.0]])
    np.testing.assert_allclose(geometric_speedup(times, 0), [1.0, 2.0, 0.0])
    assert geometric_speedup(np.array([[INF, 1.0], [1.0, 1.0]]), 0)[1] == INF
    assert math.isnan(geometric_speedup(np.array([[INF, 1.0], [1.0, INF]]), 0)[1])


def test_time_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="found the time 0"):
        ratios(np.array([[0.0]]))


times = st.lists(st.tuples(*[st.floats(0.1, 100.0) | st.just(INF)] * 3), min_size=2, max_size=5)


@given(times, st.floats(0.01, 100.0))
def test_score_ignores_units_and_a_copy_of_an_optimizer(rows, unit: float) -> None:
    table = np.array(rows)
    found = score(ratios(table))
    np.testing.assert_allclose(score(ratios(unit * table)), found, atol=1e-9)
    np.testing.assert_allclose(score(ratios(np.concatenate([table, table[:1]])))[:-1], found)
    np.testing.assert_allclose(score(ratios(table[:, ::-1])), found)
    assert ((found >= 0.0) & (found <= 1.0)).all()


def test_first_evaluation_at_the_target_counts() -> None:
    steps, seconds = np.array([10.0, 20.0, 30.0]), np.array([1.0, 2.0, 3.0])
    assert first_reach(steps, seconds, np.array([np.nan, 0.5, 0.1]), 0.5) == Reached(steps=20.0, device_s=2.0)
    assert first_reach(steps, seconds, np.array([3.0, np.nan, 1.0]), 0.5) == MISSED


def test_misses_take_part_in_the_median() -> None:
    fast, slow = Reached(steps=10.0, device_s=5.0), Reached(steps=30.0, device_s=1.0)
    assert median_reach([fast, slow, MISSED]) == Reached(steps=30.0, device_s=5.0)
    assert median_reach([fast, MISSED, MISSED]) == MISSED
    assert median_reach([]) == MISSED


def test_order_that_depends_on_a_third_optimizer_is_named() -> None:
    # a and b tie without c; with c, which is fast on the second workload, b's second workload is lost.
    times = {"a": np.array([4.0, 2.0]), "b": np.array([1.0, 8.0]), "c": np.array([100.0, 0.9])}
    left = {one.without: one for one in leave_one_out(times, by_profile_score)}
    assert by_profile_score(times) == ("b", "c", "a")
    assert left["b"].order == ("a", "c")
    assert left["b"].swapped == (("c", "a"),)
    assert left["a"].swapped == ()
    assert leave_one_out({"a": times["a"], "b": times["b"]}, by_profile_score) == ()
