"""What a kill takes between two checkpoints is counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from tests.engine.conftest import Reports
from tests.engine.test_cohort import CrystalTrials, crystal_trials, measured, run_cohort
from tunebench.engine.book import TrialBook, last_evaluation
from tunebench.engine.lightning import run_trial
from tunebench.engine.task import Evaluation, TrialTask
from tunebench.engine.work import NOTE, Note, Work, read_note, write_note
from tunebench.study.record import CURVES


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> CrystalTrials:
    return crystal_trials(tmp_path_factory.mktemp("crystals"))


@pytest.fixture
def kill_after(monkeypatch: pytest.MonkeyPatch):
    """Lets every step make a note, and kills the trial after that of a step at a horizon."""
    note = TrialBook.note
    moment = [(0, 0)]

    def noted(book: TrialBook, step: int) -> None:
        note(book, step)
        if (book.task.horizon, step) == moment[0]:
            raise SystemExit

    monkeypatch.setattr("tunebench.engine.book.NOTE_EVERY_S", 0.0)
    monkeypatch.setattr(TrialBook, "note", noted)
    return lambda *at: moment.__setitem__(0, at)


def train(trials: CrystalTrials, task: TrialTask, engine: str) -> Evaluation:
    if engine == "cohort":
        return run_cohort(trials.cohort(1, task), [task])[task.key.trial_id][-1]
    return run_trial(task, Reports())


@pytest.mark.parametrize("engine", ["lightning", "cohort"])
def test_steps_that_two_kills_took_are_counted_once_each_and_change_nothing(
    trials: CrystalTrials, kill_after, engine: str
) -> None:
    task, other = trials.task(), trials.task()
    for step in (6, 7):  # the checkpoint is that of step 4
        kill_after(8, step)
        with pytest.raises(SystemExit):
            train(trials, task, engine)
    kill_after()
    last, undisturbed = train(trials, task, engine), train(trials, other, engine)
    assert (last.lost.steps, last.spent.steps) == (2 + 3, 8)
    assert last.lost.wall_s > 0.0
    assert measured(last) == measured(undisturbed)
    assert undisturbed.lost == Work()


@pytest.mark.parametrize("engine", ["lightning", "cohort"])
def test_evaluations_that_were_not_written_are_made_again_after_a_kill(
    trials: CrystalTrials, kill_after, engine: str
) -> None:
    seldom = replace(trials, written_every_s=3600.0)
    task, other = (seldom.task(evaluation_steps=(2, 4, 6, 8)) for _ in range(2))
    kill_after(8, 7)  # the checkpoint is that of step 2
    with pytest.raises(SystemExit):
        train(seldom, task, engine)
    kill_after()
    last, undisturbed = train(seldom, task, engine), train(seldom, other, engine)
    assert (last.lost.steps, last.spent.steps) == (5, 8)
    assert measured(last) == measured(undisturbed)
    for one in (task, other):
        curve = pd.read_parquet(one.run / CURVES / f"{one.key.trial_id}.parquet")
        assert sorted(curve.step.unique()) == [2, 4, 6, 8]
        assert not curve.duplicated(["step", "split", "metric", "readout"]).any()


def test_a_kill_before_the_first_evaluation_at_a_longer_horizon_takes_what_was_done_there(
    trials: CrystalTrials, kill_after
) -> None:
    task = replace(trials.task(evaluation_steps=(3, 8)), rungs=(3,), horizons=(3, 8))
    kill_after(8, 2)
    with pytest.raises(SystemExit):
        train(trials, task, "lightning")
    before = last_evaluation(task.run, task.key.trial_id)
    assert before is not None
    assert (before.horizon, before.lost) == (3, Work())
    kill_after()
    last = train(trials, task, "cohort")
    assert (last.lost.steps, last.spent.steps) == (2, 3 + 8)


def test_a_note_that_cannot_be_read_counts_nothing(tmp_path: Path) -> None:
    assert read_note(tmp_path) is None
    note = Note(horizon=8, done=Work(steps=5, wall_s=2.0, device_s=1.0), lost=Work(steps=1))
    write_note(tmp_path, note)
    assert read_note(tmp_path) == note
    text = (tmp_path / NOTE).read_text()
    for end in range(len(text)):
        (tmp_path / NOTE).write_text(text[:end])
        assert read_note(tmp_path) is None
