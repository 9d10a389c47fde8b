"""What every engine keeps of a running trial: its curve, events, checkpoint, times, and how it ended."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tunebench.engine.board import TrialBoard
from tunebench.engine.checkpoints import checkpoint_folder, load_checkpoint, save_checkpoint
from tunebench.engine.curves import curve_rows, set_aside_curve, write_curve
from tunebench.engine.error_parts import PartRow, write_parts
from tunebench.engine.task import Errors, Evaluation, TrialTask
from tunebench.engine.trial_files import TrialFiles
from tunebench.engine.work import NOTE_EVERY_S, Note, Work, read_note, write_note
from tunebench.study.objective import objective_value, selected_readout
from tunebench.study.record import Metric, Readout, Reason, Split
from tunebench.workloads.errors import WorkloadError


class TrialBook:
    """Writes down one trial: what is decided on is written before it is reported, the rest every so many seconds.

    A trial that is killed loses at most what came after its last writing, which was at its last rung or later.

    Attributes:
        task: the trial, at the horizon of its checkpoint where that is not behind it.
        folder: where its checkpoints are.
        last: the last evaluation, step 0 before the first.
        device_s: seconds of training steps, earlier attempts included.
        groups: the realised groups, once they are known.
    """

    def __init__(self, task: TrialTask) -> None:
        self.folder = checkpoint_folder(task.run, task.key.trial_id)
        found = load_checkpoint(self.folder)
        before = _evaluation_in(found) if found else Evaluation.without_steps(attempts=0)
        kept = task.at(before.horizon) if found else None
        self.task, self._checkpoint = (kept, found) if kept else (task, None)
        if found and not kept:
            set_aside_curve(task.run, task.key.trial_id, before.horizon)
            begins = Evaluation.without_steps(attempts=before.attempts)
            before = replace(begins, earlier=before.spent, lost=before.lost)
        self.last = with_losses(replace(before, horizon=self.task.horizon), self.folder)
        self.device_s = self.last.device_s
        self.groups: list[dict[str, Any]] = []
        self._began = time.perf_counter()
        self._earlier_wall_s = self.last.wall_s
        self._noted_at = self._began
        self._attempts = self.last.attempts + 1
        self._rows = [tuple(row) for row in self._checkpoint["rows"]] if self._checkpoint else []
        self._board = TrialBoard(task.run, task.key, task.hyperparameters, self.last.step)
        self._files = TrialFiles(task.storage, task.run, task.key.trial_id)
        self._unwritten: list[Evaluation] = []
        self._parts: Sequence[PartRow] = ()
        self._written_at = -math.inf

    def take_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint to go on from, once; None for a trial that starts."""
        found, self._checkpoint = self._checkpoint, None
        return found

    @property
    def horizon_is_over(self) -> bool:
        """Whether the trial has come to the end of a horizon that is not its last."""
        return self.last.step == self.task.horizon and self.task.lengthened is not None

    @property
    def wall_s(self) -> float:
        """Seconds since the trial began at its horizon; earlier attempts count up to their last checkpoint."""
        return self._earlier_wall_s + time.perf_counter() - self._began

    def pause(self, seconds: float) -> None:
        """Leave out seconds in which the trial stood still for another one."""
        self._began += seconds

    def evaluated(
        self,
        step: int,
        errors: Errors,
        *,
        train_loss: float,
        learning_rate: float,
        save: Callable[[], dict[str, Any]],
        refinement: dict[str, Any] | None = None,
        parts: Sequence[PartRow] = (),
    ) -> Evaluation:
        """Decide whether the trial has ended; where it is due write, and keep a checkpoint unless it diverged.

        Args:
            step: finished steps.
            errors: measured errors; the objective is added to those on the validation split.
            train_loss: mean training loss since the last evaluation.
            learning_rate: of the next step.
            save: makes the engine's part of the checkpoint; called, if at all, once `last` is this evaluation.
            refinement: what a refinement did, whose errors are among the others.
            parts: errors by configuration type and element, at the end of a confirm trial.
        """
        self.judged(
            step, errors, train_loss=train_loss, learning_rate=learning_rate, refinement=refinement, parts=parts
        )
        if self.is_due:
            self.write(save() if self.last.is_sound else None)
        return self.last

    @property
    def is_due(self) -> bool:
        """Whether the last evaluation must be written now."""
        last, task = self.last, self.task
        since = time.perf_counter() - self._written_at
        return last.outcome is not None or last.step in task.rungs or since >= task.written_every_s

    def judged(
        self,
        step: int,
        errors: Errors,
        *,
        train_loss: float,
        learning_rate: float,
        refinement: dict[str, Any] | None = None,
        parts: Sequence[PartRow] = (),
    ) -> Evaluation:
        """Decide whether the trial has ended, and write nothing yet; arguments as for `evaluated`."""
        objectives = {}
        for readout, metrics in errors[Split.VAL].items():
            objectives[readout] = objective_value(metrics, self.task.objective)
            metrics[Metric.OBJECTIVE.value] = objectives[readout]
        evaluation = Evaluation(
            step=step,
            objective=objectives[str(selected_readout(objectives, self.task.objective))],
            errors=errors,
            wall_s=self.wall_s,
            device_s=self.device_s,
            train_loss=train_loss,
            learning_rate=learning_rate,
            attempts=self._attempts,
            horizon=self.task.horizon,
            at_rung=step in self.task.rungs,
            earlier=self.last.earlier,
            lost=self.last.lost,
            groups=self.groups,
            refinement=refinement,
        )
        outcome, message = self._outcome(evaluation)
        self.last = replace(evaluation, outcome=outcome, message=message)
        self._rows += curve_rows(self.task.key.trial_id, self.last)
        self._unwritten.append(self.last)
        self._parts = parts
        return self.last

    def write(self, saved: Mapping[str, Any] | None) -> None:
        """Write curve and events up to the last evaluation, and a checkpoint where the engine's part of one is given.

        Books of different trials may write at the same time in different threads.

        Raises:
            StorageError: it is written here and cannot be stored.
        """
        write_curve(self.task.run, self.task.key.trial_id, self._rows)
        for evaluation in self._unwritten:
            self._board.add(evaluation)
        self._unwritten = []
        if self._parts:
            write_parts(self.task.run, self.task.key.trial_id, self._parts)
        if saved is not None:
            own = {"evaluation": json.dumps(self.last.to_plain()), "rows": self._rows}
            save_checkpoint(self.folder, own | dict(saved))
        self._files.store()
        self._written_at = time.perf_counter()

    def keep(self, save: Callable[[], dict[str, Any]]) -> None:
        """Write a checkpoint of the last evaluation, where it has none, of a trial that leaves at it."""
        if self._unwritten:
            self.write(save())

    @property
    def note_is_due(self) -> bool:
        """Whether the last note was made some seconds ago."""
        return time.perf_counter() - self._noted_at > NOTE_EVERY_S

    def note(self, step: int) -> None:
        """Write down beside the checkpoint how far the trial has come; `device_s` must be up to date."""
        self._noted_at = time.perf_counter()
        done = Work(steps=step, wall_s=self.wall_s, device_s=self.device_s)
        write_note(self.folder, Note(horizon=self.task.horizon, done=done, lost=self.last.lost))

    def ended(self, step: int, reason: Reason, message: str) -> Evaluation:
        """The report of an end between two evaluations."""
        self.last = replace(
            self.last,
            step=step,
            objective=math.inf,
            errors={},
            at_rung=False,
            wall_s=self.wall_s,
            device_s=self.device_s,
            attempts=self._attempts,
            groups=self.groups,
            outcome=reason,
            message=message,
        )
        return self.last

    def close(self, reason: Reason | None) -> None:
        """Write what is left and close the event file; without a reason the trial may go on elsewhere."""
        if self._unwritten:
            self.write(None)
        if reason is None:
            self._board.suspend()
        else:
            self._board.close(self.last, reason)
        self._files.store()

    def _outcome(self, evaluation: Evaluation) -> tuple[Reason | None, str]:
        raw = evaluation.errors[Split.VAL][Readout.RAW][Metric.OBJECTIVE]
        if not math.isfinite(raw):
            return Reason.DIVERGED, f"validation error {raw} at step {evaluation.step}"
        if evaluation.step == self.task.workload.max_steps:
            return Reason.FINISHED, ""
        limit, wall_s = self.task.time_limit_s, evaluation.spent.wall_s
        if limit is not None and wall_s > limit:
            return Reason.TIMED_OUT, f"{wall_s:.0f} s at step {evaluation.step}, allowed: {limit:g} s"
        return None, ""


def last_evaluation(run: Path, trial_id: str) -> Evaluation | None:
    """What a trial's checkpoint had measured; None before the first."""
    checkpoint = load_checkpoint(checkpoint_folder(run, trial_id))
    return _evaluation_in(checkpoint) if checkpoint else None


REPEATABLE = (ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError, WorkloadError)
"""Errors that every further attempt from the same checkpoint would raise again."""


def crashed(task: TrialTask, error: BaseException) -> Evaluation:
    """The last report of a trial that no further attempt can help."""
    last = last_evaluation(task.run, task.key.trial_id) or Evaluation.without_steps(attempts=1)
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    ended = replace(last, objective=math.inf, errors={}, at_rung=False, outcome=Reason.CRASHED, message=message)
    return with_losses(ended, checkpoint_folder(task.run, task.key.trial_id))


def with_losses(last: Evaluation, folder: Path) -> Evaluation:
    """An evaluation with all that was lost after it, as the note in the trial's folder tells."""
    note = read_note(folder)
    return replace(last, lost=note.lost_after(last.horizon, last.done, last.lost)) if note else last


def _evaluation_in(checkpoint: Mapping[str, Any]) -> Evaluation:
    return Evaluation.from_plain(json.loads(checkpoint["evaluation"]))
