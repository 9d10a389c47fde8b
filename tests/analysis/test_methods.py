"""The methods section says what a run did, and nothing that it did not do."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.load import load
from analysis.methods import methods
from analysis.ranking import rank
from tests.analysis.synthetic_run import Plan, write_run

ADAMW = (0.03, 0.031, 0.032, 0.033, 0.034)
SOAP = (0.02, 0.021, 0.022, 0.023, 0.024)
MUON = (0.025, 0.026, 0.027, 0.028, 0.029)


def text(folder: Path, plan: Plan) -> str:
    run = load(write_run(folder / "run", plan))
    return " ".join(methods(run, rank(run)).paragraphs)


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One confirmed configuration, no sentinel, two optimizers, one workload."""
    return text(tmp_path_factory.mktemp("little"), Plan(arms={"adamw": ADAMW, "soap": SOAP}))


@pytest.fixture(scope="module")
def much(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two confirmed configurations, sentinels, a cap, arms beside the competing ones, two schedules and workloads."""
    plan = Plan(
        arms={"adamw": ADAMW, "soap": SOAP, "muon": MUON, "adamw-twice": ADAMW, "adamw-plain": ADAMW},
        workloads=("ethanol-nequip", "ethanol-allegro"),
        top_k=2,
        sentinels=2,
        settings={
            "soap": {"schedule": {"kind": "constant"}},
            "adamw-twice": {"optimizer": "adamw", "budget": 2},
            "adamw-plain": {"optimizer": "adamw", "untuned": True},
        },
        afforded={"soap": 5},
        waive={"F7": "other schedules on purpose"},
    )
    return text(tmp_path_factory.mktemp("much"), plan)


def test_a_run_without_sentinels_does_not_know_how_often_it_erred(little: str, much: str) -> None:
    assert "No trial was exempt from it, so how often it erred is not known." in little
    assert "false-stop" not in little
    assert "20 sentinels chosen before the start ran to the horizon" in much
    assert "tell how often it erred; each competing arm had 2 of them." in much
    assert "failure and false-stop rates have" in much


def test_the_luck_of_the_search_is_in_the_intervals_only_where_it_was_known(little: str, much: str) -> None:
    assert "the luck of the search is not in them" in little
    assert "and hold the luck of the search, by re-selection" in much


def test_two_optimizers_leave_nothing_to_leave_out(little: str, much: str) -> None:
    assert "left out" not in little
    assert "when any one of them was left out" in much


def test_a_test_over_workloads_needs_workloads(little: str, much: str) -> None:
    assert "Over" not in little
    assert "Over 2 workloads, too few for a significance test, a Bayesian" in much


def test_budgets_that_differ_are_told(little: str, much: str) -> None:
    assert "Each arm, a pair of workload and optimizer, was given 6 configurations" in little
    assert "device-seconds" not in little
    assert "Each arm that competes, a pair" in much
    assert "adamw-twice, an audit, was given 12 configurations." in much
    assert "adamw-plain was not tuned: one configuration with every default." in much
    assert "in part: ethanol-nequip/soap 5 of 6, ethanol-allegro/soap 5 of 6." in much


def test_the_fidelity_of_the_rungs_is_told_by_arm(little: str, much: str) -> None:
    assert "Each rung ended a complete schedule of its own length" in little
    assert "cut the schedule" not in little
    assert "Each rung of soap cut the schedule of the full horizon." in much


def test_a_study_without_halving_stopped_nothing(tmp_path: Path) -> None:
    found = text(tmp_path, Plan(arms={"adamw": ADAMW}, asha=False))
    assert "No trial was stopped early." in found
    assert "Each rung" not in found
    assert "No arms were compared." in found
