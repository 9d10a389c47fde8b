from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.comparison import Contender, compare
from analysis.reselection import Search
from analysis.statistics import iqm
from analysis.verdict import Decision, Verdict, decide

INF = math.inf


def contender(name: str, *values: float) -> Contender:
    return Contender(optimizer=name, values=dict(enumerate(values)))


def verdict(*contenders: Contender, **changes: object) -> Decision:
    settings: dict[str, object] = {"exploratory": False, "missing": (), "failed_checks": (), "seed": lambda a, b: 1}
    decision, _ = decide(contenders, **{**settings, **changes})  # type: ignore[arg-type]
    return decision


GOOD = contender("soap", 0.020, 0.021, 0.020, 0.022, 0.021)
BAD = contender("adamw", 0.030, 0.031, 0.030, 0.032, 0.031)


def test_large_effect_with_five_seeds_has_a_winner() -> None:
    decision = verdict(GOOD, BAD)
    assert (decision.verdict, decision.winner) == (Verdict.WINNER, "soap")
    assert "−10.0 [−10.0, −10.0] (n = 5)" in decision.sentence  # noqa: RUF001


def test_four_seeds_never_have_a_winner_and_the_sentence_says_how_many_there_are() -> None:
    decision = verdict(contender("soap", 0.02, 0.02, 0.02, 0.02), BAD)
    assert (decision.verdict, decision.winner, decision.smallest_n) == (Verdict.UNRESOLVED, None, 4)
    assert "the smallest number of paired seeds is 4, a winner needs 5" in decision.sentence


def test_overlapping_arms_are_unresolved_and_named() -> None:
    decision = verdict(
        contender("soap", 0.020, 0.024, 0.020, 0.024, 0.020), contender("muon", 0.021, 0.020, 0.024, 0.021, 0.023), BAD
    )
    assert decision.verdict is Verdict.UNRESOLVED
    assert "soap is not separated from muon" in decision.sentence
    assert "to adamw" not in decision.sentence


def test_unfinished_study_has_no_winner() -> None:
    decision = verdict(GOOD, BAD, missing=("w/adamw: 4 of 5 confirm trials have ended",))
    assert decision.winner is None
    assert "unfinished" in decision.sentence


def test_failed_check_forbids_a_winner() -> None:
    decision = verdict(GOOD, BAD, failed_checks=("arms share seeds (F9)",))
    assert decision.winner is None
    assert "arms share seeds (F9)" in decision.sentence


def test_arm_without_seeds_keeps_the_others_from_winning() -> None:
    decision = verdict(GOOD, BAD, contender("muon"))
    assert decision.winner is None
    assert "no confirm trial of muon has ended" in decision.sentence


def test_arms_that_differ_by_less_than_a_seed_tie_and_worse_ones_are_told_apart() -> None:
    first = contender("soap", 0.020, 0.022, 0.024, 0.026, 0.028)
    alike = contender("muon", 0.0203, 0.0221, 0.0243, 0.0261, 0.0283)
    decision = verdict(first, alike, contender("adamw", 0.030, 0.031, 0.035, 0.036, 0.038))
    assert (decision.verdict, decision.winner) == (Verdict.WINNER, "soap")
    mixed = contender("muon", 0.0204, 0.0218, 0.0244, 0.0258, 0.0284)
    decision = verdict(first, mixed, contender("adamw", 0.030, 0.031, 0.035, 0.036, 0.038), budget="8 configurations")
    assert (decision.verdict, decision.winner, decision.tied) == (Verdict.TIE, None, ("soap", "muon"))
    assert decision.sentence.startswith("Tie at 8 configurations: soap, muon differ by less than one seed")
    assert not decision.resolve


def test_budget_is_part_of_the_claim() -> None:
    assert verdict(GOOD, BAD, budget="16 configurations").sentence.startswith("soap wins at 16 configurations. ")


def test_unresolved_says_how_many_seeds_would_resolve_it() -> None:
    decision = verdict(
        contender("soap", 0.020, 0.024, 0.020, 0.024, 0.020), contender("muon", 0.021, 0.022, 0.024, 0.023, 0.023)
    )
    (advice,) = decision.resolve
    assert re.fullmatch(r"soap and muon: about \d+ paired seeds would show .* \(80 % power; 5 so far\)\.", advice)
    assert not decision.barred


def test_luck_of_the_search_that_no_seed_can_beat_is_named() -> None:
    first, second = (
        Contender(
            optimizer=name,
            values={seed: level + 1e-4 * (seed + place) for seed in range(5)},
            search=Search(
                order=order,
                confirmed=tuple({seed: error + 1e-4 * (seed + place) for seed in range(5)} for error in errors),
                tuned=(0.09,) * 3,
            ),
        )
        for place, (name, level, order, errors) in enumerate(
            [("soap", 0.02, (0, 1, 2, 3, 4), (0.02, 0.05)), ("muon", 0.021, (3, 1, 0, 2, 4), (0.021, 0.04))]
        )
    )
    decision, (comparison,) = decide(
        [first, second], exploratory=False, missing=(), failed_checks=(), seed=lambda a, b: 1
    )
    assert decision.verdict is Verdict.UNRESOLVED
    assert comparison.seeds_interval is not None
    assert comparison.seeds_interval.high < 0.0
    assert comparison.interval is not None
    assert comparison.interval.high > 0.0
    assert comparison.limited_by_search
    assert "more seeds cannot resolve it" in decision.resolve[0]
    assert comparison.redrawn is not None
    assert comparison.redrawn.high > 0.0
    assert comparison.redrawn_unconfirmed is not None
    assert 0.0 < comparison.redrawn_unconfirmed < 0.3


def test_single_arm_wins_nothing() -> None:
    assert verdict(GOOD).winner is None


def test_arm_that_failed_at_every_seed_can_be_beaten() -> None:
    assert verdict(GOOD, contender("sgd", *[INF] * 5)).winner == "soap"


def test_all_arms_failed_is_unresolved() -> None:
    assert verdict(contender("sgd", *[INF] * 5), contender("soap", *[INF] * 5)).verdict is Verdict.UNRESOLVED


def test_exploratory_study_orders_nothing() -> None:
    decision, comparisons = decide([GOOD, BAD], exploratory=True, missing=(), failed_checks=(), seed=lambda a, b: 1)
    assert decision.verdict is Verdict.EXPLORATORY
    assert comparisons == ()


def test_only_common_seeds_are_compared() -> None:
    first = Contender(optimizer="soap", values={0: 1.0, 2: 1.0, 3: 1.0, 4: 1.0})
    second = Contender(optimizer="muon", values={0: 2.0, 1: 50.0, 2: 2.0, 3: 2.0})
    comparison = compare(first, second, seed=1)
    assert comparison.n_pairs == 3
    assert comparison.difference == pytest.approx(-1.0)


errors = st.lists(st.floats(0.5, 2.0).map(lambda x: round(x, 2)), min_size=5, max_size=5)


def ordered(*arms: tuple[str, list[float]]) -> list[Contender]:
    found = [contender(name, *values) for name, values in arms]
    return sorted(found, key=lambda arm: (float(iqm(np.array(list(arm.values.values())))), arm.optimizer))


@given(errors, errors, st.floats(0.001, 1000.0), st.permutations(range(5)))
def test_units_and_the_numbering_of_seeds_change_no_verdict(
    first: list[float], second: list[float], unit: float, places: list[int]
) -> None:
    plain = verdict(*ordered(("soap", first), ("muon", second)))
    changed = verdict(
        *ordered(
            *(
                (name, [unit * values[place] for place in places])
                for name, values in (("soap", first), ("muon", second))
            )
        )
    )
    if not math.isclose(float(iqm(np.array(first))), float(iqm(np.array(second)))):
        assert (changed.verdict, changed.winner) == (plain.verdict, plain.winner)


@given(errors, errors)
def test_a_copy_of_an_arm_ties_with_it_and_never_wins(first: list[float], second: list[float]) -> None:
    alone = verdict(*ordered(("soap", first), ("muon", second)))
    together = verdict(*ordered(("soap", first), ("copy", first), ("muon", second)))
    assert together.winner in {None, "muon"}
    if alone.winner == "soap":
        assert together.verdict in {Verdict.TIE, Verdict.UNRESOLVED}
        assert set(together.tied) <= {"soap", "copy"}


@pytest.mark.parametrize(("arms", "highest"), [(2, 0.07), (4, 0.05)])
def test_false_winners_are_as_rare_as_the_report_says(arms: int, highest: float) -> None:
    generator = np.random.default_rng(17)
    studies, named = 600, 0
    for study in range(studies):
        errors = 1.0 + 0.1 * generator.normal(size=5) + 0.1 * generator.normal(size=(arms, 5))
        named += _simulated(errors, study).winner is not None
    assert named / studies <= highest


def test_large_true_difference_is_nearly_always_named() -> None:
    generator = np.random.default_rng(18)
    winners = []
    for study in range(60):
        errors = 1.0 + 0.1 * generator.normal(size=5) + 0.1 * generator.normal(size=(4, 5))
        errors[2] -= 0.5
        winners.append(_simulated(errors, study).winner)
    assert winners.count("arm2") >= 54
    assert set(winners) <= {"arm2", None}


def _simulated(errors: np.ndarray, study: int) -> Decision:
    order = np.argsort(np.sort(errors, axis=1)[:, 1:4].mean(axis=1))
    contenders = [contender(f"arm{index}", *map(float, errors[index])) for index in order]
    return verdict(*contenders, seed=lambda a, b: study)
