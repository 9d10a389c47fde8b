from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.engine.conftest import MakeTask, Reports
from tunebench.engine.book import TrialBook
from tunebench.engine.checkpoints import checkpoint_folder, load_checkpoint
from tunebench.engine.cohort import Cohort
from tunebench.engine.curves import set_aside_curve, write_curve
from tunebench.engine.lightning import run_trial
from tunebench.engine.task import TrialTask
from tunebench.engine.work import Note, Work
from tunebench.study.record import CURVES, SHORTER_CURVES, Reason

STEPS = (2, 4, 6, 8)


@pytest.fixture
def task(make_task: MakeTask) -> TrialTask:
    """A trial that is decided on at step 6 and whose files are written every hour."""
    return replace(make_task(family="allegro", evaluation_steps=STEPS), rungs=(6,), written_every_s=3600.0)


def evaluate(book: TrialBook, *steps: int) -> list[int]:
    """Evaluate at these steps; returns those at which a checkpoint was made."""
    saved: list[int] = []

    def save() -> dict[str, Any]:
        saved.append(book.last.step)
        return {}

    for step in steps:
        book.evaluated(step, {"val": {"raw": {"forces_mae": 0.5}}}, train_loss=1.0, learning_rate=0.1, save=save)
    return saved


def written_steps(task: TrialTask) -> set[int]:
    """Steps in the curve on the disk."""
    return set(pd.read_parquet(task.run / CURVES / f"{task.key.trial_id}.parquet")["step"])


def checkpoint_of(task: TrialTask) -> int:
    """Step of the checkpoint on the disk."""
    kept = load_checkpoint(checkpoint_folder(task.run, task.key.trial_id))
    assert kept is not None
    return int(json.loads(kept["evaluation"])["step"])


def test_the_first_evaluation_is_written_and_the_next_waits(task: TrialTask) -> None:
    assert evaluate(TrialBook(task), 2, 4) == [2]
    assert written_steps(task) == {2}


def test_what_is_decided_on_is_written_before_anybody_hears_of_it(task: TrialTask) -> None:
    assert evaluate(TrialBook(task), 2, 4, 6) == [2, 6]
    assert written_steps(task) == {2, 4, 6}


def test_the_end_is_written(task: TrialTask) -> None:
    assert evaluate(TrialBook(task), *STEPS) == [2, 6, 8]
    assert written_steps(task) == set(STEPS)


def test_a_trial_that_leaves_writes_what_it_measured_and_goes_on_from_its_checkpoint(task: TrialTask) -> None:
    book = TrialBook(task)
    evaluate(book, 2, 4)
    book.close(None)
    assert written_steps(task) == {2, 4}
    assert checkpoint_of(task) == 2


def test_a_trial_that_diverges_between_two_evaluations_keeps_its_curve(task: TrialTask) -> None:
    book = TrialBook(task)
    evaluate(book, 2, 4)
    book.ended(5, Reason.DIVERGED, "training loss not finite by step 5")
    book.close(Reason.DIVERGED)
    assert written_steps(task) == {2, 4}


def test_a_curve_goes_on_from_the_checkpoint_without_gap_or_repetition(task: TrialTask) -> None:
    evaluate(TrialBook(task), 2, 4)  # and its process dies
    evaluate(TrialBook(task), 4, 6)
    curve = pd.read_parquet(task.run / CURVES / f"{task.key.trial_id}.parquet")
    assert not curve.duplicated(["step", "split", "metric", "readout"]).any()
    assert set(curve["step"]) == {2, 4, 6}


def test_everything_is_written_at_once_where_no_time_may_pass(task: TrialTask) -> None:
    every = replace(task, written_every_s=0.0)
    assert evaluate(TrialBook(every), *STEPS) == list(STEPS)
    assert load_checkpoint(checkpoint_folder(Path(every.run), every.key.trial_id)) is not None


def test_a_trial_that_is_paused_at_an_evaluation_goes_on_from_there_in_a_cohort(task: TrialTask) -> None:
    cohort, name = Cohort(task, 1, compiled=False), task.key.trial_id
    cohort.join(task)
    for _ in range(2):
        cohort.advance()
        cohort.go_on(name)
    assert checkpoint_of(task) == 2
    cohort.leave(name)
    assert checkpoint_of(task) == 4


def test_a_trial_that_is_paused_at_an_evaluation_goes_on_from_there_alone(task: TrialTask) -> None:
    with pytest.raises(SystemExit):
        run_trial(task, Reports(stop_after=2))
    assert checkpoint_of(task) == 4


def test_the_curve_of_a_shorter_horizon_is_set_aside_once(tmp_path: Path) -> None:
    (tmp_path / CURVES).mkdir()
    for value in (0.5, 0.7):  # the second is of the longer horizon, whose first checkpoint was never written
        write_curve(tmp_path, "trial", [("trial", 4, 0.0, 0.0, "val", "objective", "raw", value)])
        set_aside_curve(tmp_path, "trial", 4)
    assert pd.read_parquet(tmp_path / SHORTER_CURVES / "trial.h4.parquet")["value"].tolist() == [0.5]


def test_a_note_that_is_older_than_the_checkpoint_counts_nothing_twice() -> None:
    note = Note(horizon=200, done=Work(steps=100), lost=Work())
    first = note.lost_after(200, Work(steps=4), Work())
    assert first.steps == 96
    assert note.lost_after(200, Work(steps=50), first).steps == 96
