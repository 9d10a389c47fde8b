"""What a start of a study plans, without training anything."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from tests.study.test_step_times import solo_step, table
from tests.tuning.conftest import STUDY, write_study
from tunebench.study.errors import RunError
from tunebench.study.journal import JournalWriter, read_trials
from tunebench.study.record import Reason, Stage, TrialRecord
from tunebench.study.resolve import ResolvedStudy, load_run, resolve
from tunebench.study.search_space import SearchSpace
from tunebench.study.spec import StudyError
from tunebench.study.step_times import add_tables
from tunebench.tuning.runner import RunOptions, run_study
from tunebench.workloads.data import PreparedData

SPENT = {"steps": 12, "wall_s": 2.0, "device_s": 1.0, "attempts": 1}

Start = Callable[..., str]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Starts the study as far as its plan; returns what was said. A second start goes on with the run."""
    monkeypatch.setattr("tunebench.tuning.runner._Run._run_stage", lambda run, stage: None)
    monkeypatch.setattr("tunebench.tuning.runner._check_arms", lambda *start: None)

    def start(extend: int = 0, **changes: Any) -> str:
        run, said = tmp_path / "run", io.StringIO()
        resolved = load_run(run) if (run / "journal.log").exists() else resolve(write_study(tmp_path, **changes))
        if "tune" in changes and changes["tune"].get("device_seconds_per_arm"):
            run.mkdir(exist_ok=True)
            add_tables(run, resolved.hash, [table(solo_step("adamw", [1.0]), solo_step("schedule_free", [2.5]))])
        run_study(resolved, RunOptions(run=run, extend=extend), Console(file=said, width=200))
        return said.getvalue()

    return start


def planned(run: Path, optimizer: str = "adamw", stage: Stage = Stage.TUNE) -> list[TrialRecord]:
    return [t for t in read_trials(run) if t.key.optimizer == optimizer and t.key.stage is stage]


def test_an_arm_that_is_refused_while_ray_starts_leaves_no_plan_and_no_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, run = resolve(write_study(tmp_path)), tmp_path / "run"
    refused = StudyError(resolved.file, "workloads[0].model", "one", "another")

    def refuse(resolved: ResolvedStudy, data: Mapping[str, PreparedData]) -> None:
        raise refused

    monkeypatch.setattr("tunebench.tuning.runner.check_arms", refuse)
    with pytest.raises(StudyError) as found:
        run_study(resolved, RunOptions(run=run), Console(file=io.StringIO()))
    assert found.value is refused
    assert not (run / "journal.log").exists()
    assert not ray.is_initialized()


def test_an_arm_whose_device_seconds_are_used_up_has_fewer_configurations_of_the_common_sequence(
    start: Start, tmp_path: Path
) -> None:
    # of three trials a rung at step 6 leaves one: 3 x 6 + 12 steps of 1 s, or, on one schedule, 3 x 6 + 6 of 2.5 s
    tune = {**STUDY["tune"], "asha": {"grace_steps": 6, "sentinels": 0}, "device_seconds_per_arm": 50.0}
    said = start(optimizers=["adamw", "schedule_free"], tune=tune)
    assert "ethanol/schedule_free: 50 device-seconds pay for 2 of 3 configurations, 0 of them sentinels" in said
    adamw, free = planned(tmp_path / "run"), planned(tmp_path / "run", "schedule_free")
    assert (len(adamw), len(free)) == (3, 2)
    for one, other in zip(adamw, free, strict=False):
        assert one.point["learning_rate"] == other.point["learning_rate"]
    assert "pay for" not in start()
    assert len(planned(tmp_path / "run", "schedule_free")) == 2


def finish(run: Path, share: float) -> float:
    """End the trials of AdamW so that the best is nearest to a share of its range; returns its learning rate."""
    journal = JournalWriter(run)
    trials = sorted(planned(run), key=lambda t: (t.point["weight_decay"] > 0.8, abs(t.point["learning_rate"] - share)))
    for index, trial in enumerate(trials):
        journal.finish(trial.key, Reason.FINISHED, value=1.0 + index, detail={}, ledger=SPENT, result={})
    return float(trials[0].params["learning_rate"])


def test_an_extension_widens_the_range_whose_best_lies_at_its_edge_and_leaves_planned_trials_as_they_are(
    start: Start, tmp_path: Path
) -> None:
    run, rates = tmp_path / "run", SearchSpace.load("adamw").parameters["learning_rate"]
    start(tune={"trials_per_arm": 16, "asha": None})
    before, best = planned(run), finish(run, 0.0)
    assert rates.unit_of(best) < 0.1
    said = start(extend=16)
    assert (
        f"adamw: its best learning_rate lies at the edge of its range, which now goes from {rates.low / 10:g}" in said
    )
    after = planned(run)
    assert [t.params for t in after[:16]] == [t.params for t in before]
    assert len(after) == len(planned(run, "soap")) == 32, "every arm gets as many more"
    assert min(t.params["learning_rate"] for t in after[16:]) < rates.low
    soap = SearchSpace.load("soap").parameters["learning_rate"]
    assert min(t.params["learning_rate"] for t in planned(run, "soap")) >= soap.low
    for one, other in zip(after, planned(run, "soap"), strict=True):
        assert one.point["learning_rate"] == other.point["learning_rate"]


def test_an_extension_of_a_run_whose_best_lies_inside_widens_nothing(start: Start, tmp_path: Path) -> None:
    start(tune={"trials_per_arm": 16, "asha": None})
    finish(tmp_path / "run", 0.5)
    assert "edge" not in start(extend=2)
    assert load_run(tmp_path / "run").spaces == resolve(tmp_path / "study.yaml").spaces


def test_only_a_run_that_has_begun_is_extended(start: Start) -> None:
    with pytest.raises(RunError, match=r"allowed: --extend for a run that has begun"):
        start(extend=2)
