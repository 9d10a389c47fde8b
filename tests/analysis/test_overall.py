from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.overall import Overall, WorkloadErrors, decide_overall
from analysis.pareto import pareto_front
from analysis.verdict import Decision, Verdict

INF = math.inf


def decision(verdict: Verdict = Verdict.UNRESOLVED, winner: str | None = None, *, tied=(), barred=False) -> Decision:
    return Decision(
        verdict=verdict, winner=winner, tied=tied, sentence="", budget="", resolve=(), barred=barred, smallest_n=5
    )


def workload(name: str, errors: dict[str, float], made: Decision | None = None) -> WorkloadErrors:
    return WorkloadErrors(
        workload=name,
        errors=errors,
        runs={optimizer: error * np.array([0.98, 1.0, 1.02]) for optimizer, error in errors.items()},
        deviation=dict.fromkeys(errors, 0.02),
        decision=made or decision(),
    )


def overall(*errors: dict[str, float], made: Decision | None = None) -> Overall:
    return decide_overall([workload(f"w{i}", row, made) for i, row in enumerate(errors)], seed=1)


BETTER = [{"soap": 1.0 + 0.1 * i, "adamw": (1.2 + 0.01 * i) * (1.0 + 0.1 * i)} for i in range(8)]


def test_optimizer_that_is_better_on_every_one_of_eight_workloads_wins() -> None:
    found = overall(*BETTER)
    assert (found.verdict, found.winner) == (Verdict.WINNER, "soap")
    (comparison,) = found.comparisons
    assert comparison.wilcoxon_p == comparison.holm_p == pytest.approx(2.0**-7)
    expected = float(np.exp(-np.mean(np.log(1.2 + 0.01 * np.arange(8)))))
    assert comparison.ratio == pytest.approx(expected)
    assert found.ratios == pytest.approx({"soap": 1.0, "adamw": 1.0 / expected})
    assert comparison.bayes.first_better > 0.99
    assert comparison.improvement == 1.0
    assert found.stable


def test_five_workloads_cannot_show_what_holds_beyond_them() -> None:
    found = overall(*BETTER[:5])
    assert found.verdict is Verdict.UNRESOLVED
    assert found.comparisons[0].wilcoxon_p is None
    winning = overall(*BETTER[:5], made=decision(Verdict.WINNER, "soap"))
    assert (winning.verdict, winning.winner) == (Verdict.WINNER, "soap")
    assert "nothing is claimed beyond them" in winning.sentence


def test_workloads_that_disagree_are_unresolved_and_named() -> None:
    rows = [workload("a", {"soap": 1.0, "muon": 2.0}, decision(Verdict.WINNER, "soap"))]
    rows.append(workload("b", {"soap": 1.3, "muon": 1.0}, decision(Verdict.WINNER, "muon")))
    found = decide_overall(rows, seed=1)
    assert found.verdict is Verdict.UNRESOLVED
    assert "a: soap; b: muon" in found.sentence


def test_a_single_workload_answers_for_the_study_and_calls_for_no_others() -> None:
    unresolved = dataclasses.replace(decision(), sentence="Unresolved: muon is not separated from soap.")
    found = overall({"soap": 1.1, "muon": 1.0}, made=unresolved)
    assert found.verdict is Verdict.UNRESOLVED
    assert found.sentence == f"{unresolved.sentence} With one workload nothing is claimed beyond it."
    assert found.resolve == ()
    assert found.comparisons[0].workloads_to_resolve is None
    tie = overall({"soap": 1.1, "muon": 1.0}, made=decision(Verdict.TIE, tied=("muon", "soap")))
    assert (tie.verdict, tie.winner, tie.tied) == (Verdict.TIE, None, ("muon", "soap"))
    assert overall(BETTER[0], made=decision(Verdict.WINNER, "soap")).winner == "soap"


def test_workloads_without_an_answer_do_not_disagree() -> None:
    found = overall(*BETTER[:3])
    assert found.sentence.startswith("Unresolved on each of 3 workloads.")


def test_advice_is_on_open_pairs_alone_and_asks_for_more_workloads_than_there_are() -> None:
    changes = (0.05, 0.0, 0.06, 0.0, 0.0, 0.07, 0.05, 0.0)
    found = overall(*[{"soap": 1.0, "sgd": 2.0, "muon": 1.0 + change} for change in changes])
    (open_pair,) = [comparison for comparison in found.comparisons if comparison.second == "muon"]
    assert open_pair.workloads_to_resolve is not None
    (advice,) = found.resolve
    assert advice.startswith(f"soap and muon: about {max(open_pair.workloads_to_resolve, 9)} workloads")
    assert "8 so far" in advice


def test_ties_of_the_same_optimizers_on_few_workloads_are_a_tie() -> None:
    found = overall(*[{"soap": 1.0, "muon": 1.001}] * 3, made=decision(Verdict.TIE, tied=("soap", "muon")))
    assert (found.verdict, found.tied) == (Verdict.TIE, ("muon", "soap"))


def test_differences_far_below_a_seed_deviation_are_a_tie_over_eight_workloads() -> None:
    rows = [{"soap": 1.0, "muon": 1.0 + 0.001 * (-1.0) ** i} for i in range(8)]
    found = overall(*rows)
    assert found.verdict is Verdict.TIE
    assert set(found.tied) == {"soap", "muon"}


def test_mixed_signs_are_unresolved_and_say_what_would_help() -> None:
    rows = [{"soap": 1.0, "muon": 1.0 + change} for change in (0.3, -0.2, 0.2, 0.3, -0.1, 0.25)]
    found = overall(*rows)
    assert found.verdict is Verdict.UNRESOLVED
    (advice,) = found.resolve
    assert "workloads would show a general difference" in advice
    assert found.comparisons[0].workloads_to_resolve is not None
    assert found.comparisons[0].workloads_to_resolve > 6


def test_one_forbidden_workload_forbids_the_general_claim() -> None:
    rows = [workload(f"w{i}", row, decision(barred=i == 3)) for i, row in enumerate(BETTER)]
    found = decide_overall(rows, seed=1)
    assert found.verdict is Verdict.UNRESOLVED
    assert "no verdict is allowed on w3" in found.sentence


def test_failed_arm_loses_and_two_failed_arms_are_alike() -> None:
    found = overall(*[{"soap": 1.0, "sgd": INF, "lamb": INF}] * 7)
    assert found.winner == "soap"
    twice = overall(*[{"sgd": INF, "lamb": INF}] * 7)
    assert twice.winner is None
    assert twice.comparisons[0].ratio == 1.0


def test_exploratory_studies_and_single_optimizers_claim_nothing() -> None:
    assert overall(*BETTER, made=decision(Verdict.EXPLORATORY)).verdict is Verdict.EXPLORATORY
    assert overall({"soap": 1.0}).verdict is Verdict.UNRESOLVED


errors = st.floats(0.5, 2.0).map(lambda x: round(x, 3))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(errors, errors, errors), min_size=6, max_size=8),
    st.floats(0.01, 100.0),
    st.randoms(use_true_random=False),
)
def test_units_and_the_order_of_workloads_change_no_verdict(rows, unit, random) -> None:
    table = [dict(zip(("a", "b", "c"), row, strict=True)) for row in rows]
    changed = [{name: unit * value for name, value in row.items()} for row in table]
    random.shuffle(changed)
    first, second = overall(*table), overall(*changed)
    if len({round(math.fsum(math.log(row[n]) for row in table), 9) for n in "abc"}) == 3:
        assert first.winner == second.winner
        assert first.ratios == pytest.approx(second.ratios)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(errors, errors), min_size=6, max_size=8))
def test_a_copy_of_an_optimizer_keeps_ratios_and_never_makes_a_winner(rows) -> None:
    alone = overall(*[{"a": a, "b": b} for a, b in rows])
    together = overall(*[{"a": a, "b": b, "copy": a} for a, b in rows])
    assert together.ratios["b"] / together.ratios["a"] == pytest.approx(alone.ratios["b"] / alone.ratios["a"])
    assert together.ratios["copy"] == pytest.approx(together.ratios["a"])
    assert together.winner in {alone.winner, None}
    assert together.winner != "a"


def test_pareto_front_by_hand() -> None:
    points = pareto_front(
        {"fast": 3.0, "slow": 1.0, "bad": 4.0, "same": 1.0, "broken": INF},
        {"fast": 1.0, "slow": 5.0, "bad": 2.0, "same": 5.0, "broken": 0.5},
        calibrated=True,
        alone=True,
    )
    assert [point.optimizer for point in points] == ["broken", "fast", "bad", "same", "slow"]
    assert {point.optimizer for point in points if point.on_front} == {"fast", "slow", "same"}
    assert {point.optimizer: point.dominated_by for point in points}["bad"] == ("fast",)
    assert pareto_front({"a": 1.0}, {}, calibrated=False, alone=False) == ()
