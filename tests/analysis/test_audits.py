from __future__ import annotations

from pathlib import Path

import pytest

from analysis.checks import Status
from analysis.load import load
from analysis.ranking import Ranking, rank
from tests.analysis.synthetic_run import Plan, write_run

SETTINGS = {"muon_audit": {"optimizer": "muon", "budget": 2}}
MUON = (0.02, 0.021, 0.022, 0.023, 0.024)
WORSE = (0.03, 0.031, 0.032, 0.033, 0.034)


def ranking(folder: Path, audit: tuple[float, ...], waive: dict[str, str] | None = None) -> Ranking:
    arms = {"adamw": WORSE, "muon": MUON, "muon_audit": audit}
    return rank(load(write_run(folder / "run", Plan(arms=arms, settings=SETTINGS, waive=waive or {}))))


def warnings(found: Ranking) -> list[str]:
    return [line for check in found.checks if check.status is Status.WARNING for line in check.findings]


def test_an_audit_is_shown_but_neither_ranked_nor_compared(tmp_path: Path) -> None:
    found = ranking(tmp_path, tuple(0.5 * value for value in MUON))
    (workload,) = found.workloads
    assert [(arm.optimizer, arm.rank) for arm in workload.arms] == [("muon", 1), ("adamw", 2), ("muon_audit", None)]
    assert workload.decision.winner == "muon"
    assert {c.second for c in workload.comparisons} == {"adamw"}
    assert not any("share of trials" in line for line in warnings(found))  # its budget is larger on purpose
    assert all(check.status is not Status.FAILED for check in found.checks)  # its rule is muon, whatever its name


@pytest.mark.parametrize(("factor", "undertuned"), [(0.5, True), (0.99, False), (1.5, False)])
def test_a_baseline_whose_audit_is_better_by_more_than_its_seeds_scatter_was_tuned_too_little(
    tmp_path: Path, factor: float, undertuned: bool
) -> None:
    found = ranking(tmp_path, tuple(factor * value for value in MUON))
    said = [line for line in warnings(found) if line.startswith("2 times the budget lowers")]
    assert len(said) == undertuned
    if undertuned:
        assert "of muon from 22.0 to 11.0 meV/Å" in said[0]


def test_waived_rules_stand_among_the_checks(tmp_path: Path) -> None:
    assert "F11: a test" in warnings(ranking(tmp_path, MUON, {"F11": "a test"}))
