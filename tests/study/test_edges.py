from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.study.test_plan import resolved
from tunebench.study.edges import Side, Widening, outer_side, widenings
from tunebench.study.extension import extend, extended
from tunebench.study.plan import plan_arms
from tunebench.study.record import Reason, Stage, TrialKey, TrialRecord
from tunebench.study.resolve import load_run
from tunebench.study.search_space import SearchSpace

ADAMW = SearchSpace.load("adamw").parameters
RATE = ADAMW["learning_rate"]


def record(
    index: int, rate: float, value: float | None, stage: Stage = Stage.TUNE, seed: int = 0, **changes: Any
) -> TrialRecord:
    key = TrialKey(
        workload=changes.pop("workload", "ethanol"), optimizer="adamw", stage=stage, config_index=index, seed_index=seed
    )
    content: dict[str, Any] = {
        "number": index, "state": "COMPLETE", "reason": Reason.FINISHED, "detail": {}, "rungs": {}, "seeds": {},
        "params": {"learning_rate": RATE.value_at(rate), "weight_decay": 1e-4}, "ledger": {},
    }  # fmt: skip
    return TrialRecord(key=key, value=value, **{**content, **changes})


@pytest.mark.parametrize(
    ("parameter", "share", "side"),
    [
        ("learning_rate", 0.09, Side.LOW),
        ("learning_rate", 0.11, None),
        ("learning_rate", 0.89, None),
        ("learning_rate", 0.91, Side.HIGH),
        ("weight_decay", 0.95, Side.HIGH),
        ("weight_decay", 0.01, None),  # less is as good as none
    ],
)
def test_the_outer_tenth_of_a_range_is_its_edge(parameter: str, share: float, side: Side | None) -> None:
    assert outer_side(ADAMW[parameter], ADAMW[parameter].value_at(share)) is side


def test_settings_that_trade_cost_and_choices_have_no_edge() -> None:
    soap = SearchSpace.load("soap").parameters
    for name in ("precondition_frequency", "beta2", "fctp_view"):
        assert outer_side(soap[name], soap[name].value_at(0.0)) is None
        assert outer_side(soap[name], soap[name].value_at(1.0)) is None


def test_three_decades_become_four_at_the_end_where_the_best_lies(tmp_path: Path) -> None:
    study = resolved(tmp_path)
    found = widenings(study, [record(0, 0.95, 0.1), record(1, 0.5, 0.2)])
    low, high = RATE.low, RATE.high
    assert found == [Widening(optimizer="adamw", parameter="learning_rate", low=low, high=pytest.approx(10 * high))]
    assert widenings(study, [record(0, 0.95, 0.2), record(1, 0.5, 0.1)]) == []


def test_confirmed_configurations_say_more_than_those_of_the_search(tmp_path: Path) -> None:
    search = [record(0, 0.95, 0.1), record(1, 0.5, 0.2)]
    confirmed = [
        record(i, rate, v, Stage.CONFIRM, seed) for i, rate, v in ((0, 0.95, 0.4), (1, 0.5, 0.3)) for seed in (0, 1)
    ]
    assert widenings(resolved(tmp_path), search + confirmed) == []
    failed = record(1, 0.5, None, Stage.CONFIRM, 2, reason=Reason.DIVERGED)
    assert len(widenings(resolved(tmp_path), [*search, *confirmed, failed])) == 1


def test_an_edge_in_one_workload_widens_the_space_for_all_and_on_both_sides_where_they_disagree(tmp_path: Path) -> None:
    trials = [record(0, 0.95, 0.1), record(0, 0.05, 0.1, workload="benzene")]
    (found,) = widenings(resolved(tmp_path), trials)
    assert found.low == pytest.approx(RATE.low / 10)
    assert found.high == pytest.approx(RATE.high * 10)


def test_a_run_without_a_finished_trial_has_no_edges(tmp_path: Path) -> None:
    assert widenings(resolved(tmp_path), [record(0, 0.95, None, reason=Reason.CRASHED)]) == []


def test_a_widened_run_draws_further_configurations_from_the_wider_range_and_keeps_its_hash(tmp_path: Path) -> None:
    study, run = resolved(tmp_path), tmp_path / "run"
    study.write(run)
    for _ in range(2):  # the second time the same value is far from the end of the range
        extend(study, run, 3, widenings(extended(study, run), [record(0, 1.0, 0.1)]))
    again = load_run(run)
    adamw, schedule_free = plan_arms(again)
    assert (adamw.trials, schedule_free.trials) == (15, 15)
    assert adamw.space.parameters["learning_rate"].high == pytest.approx(10 * RATE.high)
    assert schedule_free.space == study.spaces["schedule_free"]
    assert again.hash == study.hash
    assert extended(again, run) == again
