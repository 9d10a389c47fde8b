"""The simulated studies at reduced size; docs/analysis.md has the full one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from analysis.comparison import Contender
from analysis.reselection import Search
from analysis.statistics import iqm
from analysis.verdict import Verdict, decide
from benchmarks.verdict_calibration import TOP_K, Cell, Noise, Studies, cell_report, judge, simulate

STUDIES = 250
"""Of 8 workloads each: 2000 verdicts per cell, so a rate of 5 % is known to 0.5 %."""


def report(**cell: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"difference": 0.0, "noise": Noise.NORMAL, "stopped": False, "seeds": 5}
    return cell_report(Cell(**{**settings, **cell}), STUDIES, 3, overall=False)


def contenders(studies: Studies, row: int) -> list[Contender]:
    found = [
        Contender(
            optimizer=str(arm),
            values=dict(enumerate(studies.errors[row, arm, 0].tolist())),
            search=Search(
                order=tuple(studies.orders[row, arm].tolist()),
                confirmed=tuple(dict(enumerate(values.tolist())) for values in studies.errors[row, arm]),
                tuned=(30.0,) * (studies.orders.shape[-1] - TOP_K),
            ),
        )
        for arm in range(studies.errors.shape[1])
    ]
    return sorted(found, key=lambda arm: float(iqm(np.array(list(arm.values.values())))))


@pytest.mark.parametrize(
    ("noise", "seeds", "difference", "expected"),
    [
        (Noise.NORMAL, 10, 0.2, Verdict.TIE),
        (Noise.DIVERGING, 5, 3.0, Verdict.WINNER),
        (Noise.DIVERGING, 8, 3.0, Verdict.WINNER),
    ],
)
def test_simulation_judges_as_the_report_does(noise: Noise, seeds: int, difference: float, expected: Verdict) -> None:
    generator = np.random.default_rng(4)
    cell = Cell(difference=difference, noise=noise, stopped=True, seeds=seeds, arms=3)
    studies = simulate(cell, 40, generator)
    judged = judge(studies, generator)
    verdicts = set()
    for row in range(40):
        decision, _ = decide(
            contenders(studies, row), exploratory=False, missing=(), failed_checks=(), seed=lambda a, b: 1
        )
        assert decision.winner == (str(judged.winner[row]) if judged.winner[row] >= 0 else None)
        assert (decision.verdict is Verdict.TIE) == judged.tie[row]
        verdicts.add(decision.verdict)
    assert {expected, Verdict.UNRESOLVED} <= verdicts


@pytest.mark.parametrize("noise", Noise)
@pytest.mark.parametrize(("stopped", "seeds"), [(False, 5), (True, 8), (True, 10)])
def test_under_a_tie_hardly_ever_a_winner(noise: Noise, stopped: bool, seeds: int) -> None:
    found = report(noise=noise, stopped=stopped, seeds=seeds)
    assert found["winner_wrong"] <= 0.055
    assert 0.93 <= found["coverage_found"] <= 0.98
    assert 0.94 <= found["coverage"] <= 0.99
    assert found["best single trial: wrong"] == 1.0


def test_percentile_intervals_hold_less_than_they_promise() -> None:
    found = report(seeds=3)
    assert found["coverage_percentile"] < 0.85
    assert found["coverage_found"] > 0.93
    assert found["winner_wrong"] == 0.0


def test_four_equal_arms_have_no_winner_either() -> None:
    assert report(arms=4)["winner_wrong"] <= 0.05


def test_large_differences_are_named_and_never_for_the_wrong_arm() -> None:
    found = report(difference=2.0, seeds=10)
    assert found["winner_right"] > 0.75
    assert found["winner_right"] <= found["power_limit"]
    assert found["winner_wrong"] == 0.0
    assert found["tie_claimed"] < 0.01


def test_difference_of_a_whole_seed_deviation_is_hardly_ever_called_a_tie() -> None:
    assert report(difference=1.0, seeds=10)["tie_claimed"] <= 0.05


def test_over_workloads_that_disagree_seeds_as_data_sets_make_false_winners() -> None:
    cell = Cell(difference=0.0, noise=Noise.NORMAL, stopped=False, seeds=5, scatter=2.0)
    rows = cell_report(cell, 60, 3, overall=True)["overall"]
    assert isinstance(rows, list)
    eight = rows[-1]
    assert eight["welch_wrong"] > 0.2
    assert eight["wrong"] <= 0.12
