from __future__ import annotations

import pytest

from analysis.checklist import Mark, Row, checklist
from analysis.load import load
from analysis.ranking import WorkloadRanking, rank
from tests.analysis.synthetic_run import Plan, write_run

ADAMW, SOAP = (0.03, 0.031, 0.032, 0.033, 0.034), (0.02, 0.021, 0.022, 0.023, 0.024)


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Row], WorkloadRanking]:
    plan = Plan(
        arms={"adamw": ADAMW, "soap": SOAP, "adamw-untuned": ADAMW},
        settings={"adamw-untuned": {"optimizer": "adamw", "untuned": True}},
        waive={"F11": "one configuration is a demonstration"},
        sentinels=3,
    )
    run = load(write_run(tmp_path_factory.mktemp("checklist") / "run", plan))
    ranking = rank(run)
    return {row.rule: row for row in checklist(run, ranking)}, ranking.workloads[0]


def test_every_rule_has_a_row_in_order(judged: tuple[dict[str, Row], WorkloadRanking]) -> None:
    assert list(judged[0]) == [f"F{number}" for number in range(1, 20)]
    assert all(row.before or row.after or row.mark is Mark.PASS for row in judged[0].values())


def test_a_broken_rule_with_a_reason_is_waived_and_the_reason_is_told(
    judged: tuple[dict[str, Row], WorkloadRanking],
) -> None:
    row = judged[0]["F11"]
    assert row.mark is Mark.WAIVED
    assert "(waived: one configuration is a demonstration)" in row.before


def test_what_the_run_shows_counts_beside_what_was_planned(judged: tuple[dict[str, Row], WorkloadRanking]) -> None:
    rows = judged[0]
    assert rows["F2"].mark is Mark.WARN  # planned alike, but soap's steps took longer
    assert "share of device-seconds" in rows["F2"].after
    assert rows["F13"].after.startswith("0 of 9 sentinels at the horizon")  # three of each arm
    assert "trials failed" in rows["F18"].after


def test_the_untuned_arm_is_what_tuning_is_compared_with(judged: tuple[dict[str, Row], WorkloadRanking]) -> None:
    tuned = {arm.optimizer: arm.search.tunability for arm in judged[1].arms}
    assert tuned["adamw"] is not None
    assert tuned["adamw"].default_error is not None
    assert tuned["adamw"].default_gain == pytest.approx(1.0 - tuned["adamw"].best_error / tuned["adamw"].default_error)
    assert tuned["soap"] is not None
    assert tuned["soap"].default_error is None
    assert tuned["adamw-untuned"] is not None
    assert tuned["adamw-untuned"].default_error is None
