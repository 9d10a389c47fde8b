from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study_overhead import EVALUATIONS, GRACE, HORIZON, Cost, mock_trial, plan_trials, ratio, study_of
from tunebench.engine.task import Evaluation
from tunebench.study.journal import read_trials
from tunebench.study.plan import plan_arms
from tunebench.study.record import Reason
from tunebench.tuning.ray_environment import TUNE_ENVIRONMENT
from tunebench.tuning.tenancy import evaluation_of


def test_a_mock_trial_goes_on_where_it_was_paused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Evaluation] = []

    def pause_at_the_rung(plain: dict[str, Any]) -> None:
        reported.append(Evaluation.from_plain(evaluation_of(plain)))
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


def test_the_ratio_is_that_of_the_medians() -> None:
    def costs(*driver_s: float) -> list[Cost]:
        return [Cost(trials=10, reports=100, driver_s=each, wall_s=1.0) for each in driver_s]

    found = ratio({"tunebench": costs(1.0, 3.0, 90.0), "plain Tune": costs(2.0, 2.0, 2.0)})
    assert found == "tunebench over plain Tune, 3 repeat(s): 1.50 a trial, 1.50 a report"


def test_the_whole_stack_runs_to_its_end() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "study_overhead.py"
    command = [sys.executable, script, "--side", "tunebench", "--trials", "30"]
    environment = {**os.environ, **TUNE_ENVIRONMENT, "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    cost = Cost(**json.loads(done.stdout.splitlines()[-1]))
    assert (cost.trials, len(cost.memory_bytes)) == (30, 30)
    assert cost.reports >= 30 * EVALUATIONS * GRACE / HORIZON
    assert cost.journal_bytes > 0
