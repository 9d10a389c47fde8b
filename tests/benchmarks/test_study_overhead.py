from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.study_overhead import HORIZON, Cost, mock_trial, plan_trials, study_of
from tunebench.engine.task import Evaluation
from tunebench.study.journal import read_trials
from tunebench.study.plan import plan_arms
from tunebench.study.record import Reason


def test_a_mock_trial_goes_on_where_it_was_paused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Evaluation] = []

    def pause_at_the_rung(plain: dict[str, Any]) -> None:
        reported.append(Evaluation.from_plain(plain))
        if reported[-1].step == 100:
            raise SystemExit

    monkeypatch.setattr("benchmarks.study_overhead.tune.report", pause_at_the_rung)
    with pytest.raises(SystemExit):
        mock_trial({"trial": "a"}, tmp_path)
    mock_trial({"trial": "a"}, tmp_path)
    assert [evaluation.step for evaluation in reported] == list(range(20, HORIZON + 1, 20))
    assert [evaluation.outcome for evaluation in reported[-2:]] == [None, Reason.FINISHED]
    assert reported[0].objective > reported[-1].objective


def test_the_study_has_the_trials_that_are_asked_for(tmp_path: Path) -> None:
    resolved = study_of(tmp_path, 30)
    plan_trials(tmp_path, plan_arms(resolved), resolved)
    assert len(read_trials(tmp_path)) == 30


def test_growth_is_of_the_second_half_over_the_first() -> None:
    assert Cost(trials=4, reports=4, driver_s=1.0, wall_s=1.0, memory_bytes=[1, 1, 2, 2]).growth == 2.0
