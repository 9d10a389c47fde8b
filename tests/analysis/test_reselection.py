from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.nested_bootstrap import Statistic, difference_interval, pooled, probability_of_lead, redraw
from analysis.reselection import EXCESS, Search, joint_places, paired_search_variance, search_variance

INF = math.inf


def same(error: float, seeds: int = 5) -> dict[int, float]:
    return dict.fromkeys(range(seeds), error)


def constant(error: float) -> Search:
    return Search(order=(0,), confirmed=(same(error),), tuned=())


def test_two_configurations_by_hand() -> None:
    # Drawing twice from {0, 1}: both in 2 of 4 draws, 0 alone in 1, 1 alone in 1. The arms prefer opposite ones.
    found = joint_places(np.array([0, 1]), np.array([1, 0]), 2, 2)
    np.testing.assert_allclose(found, [[0.5, 0.25], [0.25, 0.0]])


def test_equal_orders_pick_the_same_place() -> None:
    found = joint_places(np.arange(4), np.arange(4), 4, 4)
    # The best of four is drawn in 1 - (3/4)^4, the best of the rest in (3/4)^4 - (2/4)^4, ...
    np.testing.assert_allclose(np.diag(found), [175 / 256, 65 / 256, 15 / 256, 1 / 256])
    assert found.sum() == pytest.approx(1.0)


def test_places_beyond_the_last_one_are_added_to_it() -> None:
    full = joint_places(np.arange(5), np.arange(5)[::-1], 5, 5)
    short = joint_places(np.arange(5), np.arange(5)[::-1], 5, 2)
    assert short[0, 0] == pytest.approx(full[0, 0])
    assert short.sum() == pytest.approx(1.0)
    assert short[1, 1] == pytest.approx(full[1:, 1:].sum())


def test_arms_with_different_configurations_are_refused() -> None:
    with pytest.raises(ValueError, match="different configurations"):
        joint_places(np.array([0, 1]), np.array([0, 2]), 2, 2)


@given(st.permutations(range(6)), st.permutations(range(6)))
def test_closed_form_is_what_draws_give(first: list[int], second: list[int]) -> None:
    exact = joint_places(np.array(first), np.array(second), 6, 6)
    drawn = np.random.default_rng(1).integers(0, 6, size=(4000, 6))
    places = [np.argsort(order)[drawn].min(axis=1) for order in (first, second)]
    counted = np.zeros((6, 6))
    np.add.at(counted, (places[0], places[1]), 1.0 / 4000)
    assert np.abs(counted - exact).max() < 0.04


def test_search_variance_without_seed_noise_by_hand() -> None:
    weights = np.array([[0.5, 0.25], [0.25, 0.0]])
    differences = np.array([[0.0, -4.0], [4.0, 0.0]])[:, :, None] * np.ones(3)
    # Mean 0, variance 16 / 4 + 16 / 4.
    assert float(search_variance(differences, weights)) == pytest.approx(8.0)


def test_seed_noise_is_not_taken_for_luck_of_the_search() -> None:
    generator = np.random.default_rng(5)
    weights = joint_places(np.arange(8), generator.permutation(8), 8, 3)
    noise = generator.normal(size=(4000, 2, 3, 5))
    differences = noise[:, 0, :, None, :] - noise[:, 1, None, :, :]
    plain = differences.mean(axis=-1)
    naive = (weights * plain**2).sum(axis=(1, 2)) - (weights * plain).sum(axis=(1, 2)) ** 2
    found = search_variance(differences, weights)
    assert (found == 0.0).mean() > 0.3
    assert found.mean() < 0.45 * naive.mean()


def test_an_infinite_difference_that_may_be_selected_leaves_nothing_known() -> None:
    weights = np.array([[0.9, 0.1], [0.0, 0.0]])
    differences = np.zeros((2, 2, 3))
    differences[1, 1] = INF
    assert float(search_variance(differences, weights)) == 0.0
    differences[0, 1] = -INF
    assert float(search_variance(differences, weights)) == INF


def test_bootstrap_of_the_best_exaggerates_by_what_is_taken_off() -> None:
    """Best of 400 with exponential spacings, one arm against a constant one: about 4/3 of the true variance of 1."""
    generator = np.random.default_rng(8)
    weights = joint_places(np.arange(400), np.arange(400), 400, 30)
    alone = np.zeros_like(weights)
    alone[:, 0] = weights.sum(axis=1)
    best = generator.exponential(size=(3000, 30)).cumsum(axis=1)
    differences = np.repeat(np.repeat(best[:, :, None, None], 30, axis=2), 2, axis=3)
    assert search_variance(differences, np.broadcast_to(alone, (3000, 30, 30))).mean() == pytest.approx(1.345, abs=0.1)
    assert pytest.approx(1.345, rel=0.01) == EXCESS


def test_failed_seeds_make_the_search_less_certain() -> None:
    errors = ({0: 1.0, 1: 1.1, 2: 1.2, 3: 1.0, 4: 1.3}, {0: 2.0, 1: 2.1, 2: 1.9, 3: 2.0, 4: 2.2})
    plain = Search(order=(0, 1, 2), confirmed=errors, tuned=(3.0,))
    failed = Search(order=(0, 1, 2), confirmed=(errors[0], {**errors[1], 3: INF}), tuned=(3.0,))
    other = Search(order=(2, 1, 0), confirmed=errors, tuned=(3.0,))
    finite, uncertain = (paired_search_variance(search, other, (0, 1, 2, 3, 4)) for search in (plain, failed))
    assert finite is not None
    assert uncertain is not None
    assert uncertain > finite


def test_a_seed_that_blew_up_has_failed_whatever_its_number() -> None:
    sound, seeds = {0: 10.0, 1: 11.0, 2: 12.0}, (0, 1, 2)
    other = Search(order=(0, 1, 2), confirmed=(sound, {0: 13.0, 1: 14.0, 2: 15.0}), tuned=(20.0,))
    variances = [
        paired_search_variance(replace(other, confirmed=(sound, {**sound, 1: error})), other, seeds)
        for error in (math.inf, 1e7, 1001.0)
    ]
    assert len(set(variances)) == 1
    assert variances[0] is not None
    assert 0.0 < variances[0] < 100.0


def test_identical_configurations_have_no_luck_and_a_single_one_no_variance() -> None:
    search = Search(order=(0, 1, 2), confirmed=(same(1.0), same(1.0)), tuned=(2.0,))
    assert paired_search_variance(search, search, (0, 1, 2, 3, 4)) == 0.0
    single = Search(order=(0, 1, 2), confirmed=(same(1.0),), tuned=(2.0, 3.0))
    assert paired_search_variance(single, single, (0, 1, 2)) is None


def test_redrawn_best_configuration_by_hand() -> None:
    search = Search(order=(0, 1), confirmed=(same(1.0),), tuned=(3.0,))
    found = redraw({"a": search}, range(5), seed=3)
    # Configuration 0 is missed in 1 of 4 draws; then the stage-1 value of configuration 1 stands in.
    assert set(np.unique(found.values["a"])) == {1.0, 3.0}
    assert (found.values["a"] == 3.0).mean() == pytest.approx(0.25, abs=0.02)
    assert found.flagged["a"] == (found.values["a"] == 3.0).mean()


@pytest.mark.parametrize(("statistic", "expected"), [(Statistic.MEAN, {1.0}), (Statistic.MEDIAN, {1.0})])
def test_statistics_of_constant_seeds(statistic: Statistic, expected: set[float]) -> None:
    search = Search(order=(0,), confirmed=(same(1.0, 4),), tuned=())
    found = redraw({"a": search}, range(4), seed=3, statistic=statistic, draws=50)
    assert set(np.unique(found.values["a"])) == expected


def test_arms_share_configurations_and_seeds_of_every_draw() -> None:
    """Arms that differ by 1 at every configuration and seed differ by 1 in every draw."""
    generator = np.random.default_rng(2)
    errors = 9.0 + generator.normal(size=(3, 5))
    arms = {
        name: Search(
            order=(4, 2, 7, 1),
            confirmed=tuple(dict(enumerate(row + shift)) for row in errors),
            tuned=(12.0 + shift,),
        )
        for name, shift in (("a", 0.0), ("b", 1.0))
    }
    found = redraw(arms, range(5), seed=1)
    np.testing.assert_allclose(found.values["b"] - found.values["a"], 1.0)
    assert difference_interval(found, "a", "b").low == pytest.approx(-1.0)
    assert probability_of_lead(found, "a", "b") == 1.0
    logs = pooled([found], seed=1, baseline="a")
    np.testing.assert_allclose(logs["a"], 0.0)


def test_draws_do_not_depend_on_who_else_takes_part() -> None:
    search = Search(order=(0, 1, 2), confirmed=({0: 1.0, 1: 2.0, 2: 4.0}, {0: 2.0, 1: 3.0, 2: 5.0}), tuned=(7.0,))
    alone = redraw({"a": search}, range(3), seed=9, draws=500)
    together = redraw({"a": search, "copy": search}, range(3), seed=9, draws=500)
    np.testing.assert_array_equal(alone.values["a"], together.values["a"])
    np.testing.assert_array_equal(together.values["a"], together.values["copy"])


def test_failures_stay_infinite_and_two_of_them_are_no_difference() -> None:
    failed = Search(order=(0,), confirmed=(same(INF),), tuned=())
    fine = Search(order=(0,), confirmed=(same(1.0),), tuned=())
    found = redraw({"a": failed, "b": failed, "c": fine}, range(5), seed=1, draws=100)
    assert difference_interval(found, "a", "b").high == 0.0
    assert difference_interval(found, "c", "a").high == -INF
    assert probability_of_lead(found, "a", "b") == 0.5
    assert np.isposinf(pooled([found], seed=1, baseline="c")["a"]).all()


def test_six_workloads_are_drawn_and_five_are_not() -> None:
    one, other = (
        redraw({"a": constant(1.0), "b": constant(error)}, range(5), seed=1, draws=200) for error in (2.0, 8.0)
    )
    five = pooled([one] * 4 + [other], seed=1, baseline="a")["b"]
    six = pooled([one] * 5 + [other], seed=1, baseline="a")["b"]
    np.testing.assert_allclose(five, (4 * math.log(2.0) + math.log(8.0)) / 5)
    assert len(np.unique(six.round(9))) > 3


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="found no arms, seeds or configurations"):
        redraw({}, range(5), seed=1)
