"""What every engine keeps of a running trial: its curve, events, checkpoint, times, and how it ended."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tunebench.engine.board import TrialBoard
from tunebench.engine.checkpoints import checkpoint_folder, load_checkpoint, save_checkpoint
from tunebench.engine.curves import curve_rows, write_curve
from tunebench.engine.task import Errors, Evaluation, TrialTask
from tunebench.study.objective import objective_value, selected_readout
from tunebench.study.record import Metric, Readout, Reason, Split


class TrialBook:
    """Writes down one trial: what is decided on is written before it is reported, the rest every so many seconds.

    A trial that is killed loses at most what came after its last writing, which was at its last rung or later.

    Attributes:
        task: the trial.
        folder: where its checkpoints are.
        last: the last evaluation, step 0 before the first.
        device_s: seconds of training steps, earlier attempts included.
        groups: the realised groups, once they are known.
    """

    def __init__(self, task: TrialTask) -> None:
        self.task = task
        self.folder = checkpoint_folder(task.run, task.key.trial_id)
        self._checkpoint = load_checkpoint(self.folder)
        self.last = _evaluation_before(self._checkpoint)
        self.device_s = self.last.device_s
        self.groups: list[dict[str, Any]] = []
        self._began = time.perf_counter()
        self._earlier_wall_s = self.last.wall_s
        self._attempts = self.last.attempts + 1
        self._rows = [tuple(row) for row in self._checkpoint["rows"]] if self._checkpoint else []
        self._board = TrialBoard(task.run, task.key, task.hyperparameters, self.last.step)
        self._unwritten: list[Evaluation] = []
        self._written_at = -math.inf

    def take_checkpoint(self) -> dict[str, Any] | None:
        """The checkpoint to go on from, once; None for a trial that starts."""
        found, self._checkpoint = self._checkpoint, None
        return found

    @property
    def wall_s(self) -> float:
        """Seconds since the trial began; earlier attempts count up to their last checkpoint."""
        return self._earlier_wall_s + time.perf_counter() - self._began

    def evaluated(
        self, step: int, errors: Errors, *, train_loss: float, learning_rate: float, save: Callable[[], dict[str, Any]]
    ) -> Evaluation:
        """Decide whether the trial has ended; where it is due write, and keep a checkpoint unless it diverged.

        Args:
            step: finished steps.
            errors: measured errors; the objective is added to those on the validation split.
            train_loss: mean training loss since the last evaluation.
            learning_rate: of the next step.
            save: makes the engine's part of the checkpoint; called, if at all, once `last` is this evaluation.
        """
        self.judged(step, errors, train_loss=train_loss, learning_rate=learning_rate)
        if self.is_due:
            self.write(save() if self.last.is_sound else None)
        return self.last

    @property
    def is_due(self) -> bool:
        """Whether the last evaluation must be written now."""
        last, task = self.last, self.task
        since = time.monotonic() - self._written_at
        return last.outcome is not None or last.step in task.rungs or since >= task.written_every_s

    def judged(self, step: int, errors: Errors, *, train_loss: float, learning_rate: float) -> Evaluation:
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
            groups=self.groups,
        )
        outcome, message = self._outcome(evaluation)
        self.last = replace(evaluation, outcome=outcome, message=message)
        self._rows += curve_rows(self.task.key.trial_id, self.last)
        self._unwritten.append(self.last)
        return self.last

    def write(self, saved: Mapping[str, Any] | None) -> None:
        """Write curve and events up to the last evaluation, and a checkpoint where the engine's part of one is given.

        Books of different trials may write at the same time in different threads.
        """
        write_curve(self.task.run, self.task.key.trial_id, self._rows)
        for evaluation in self._unwritten:
            self._board.add(evaluation)
        self._unwritten = []
        if saved is not None:
            own = {"evaluation": json.dumps(self.last.to_plain()), "rows": self._rows}
            save_checkpoint(self.folder, own | dict(saved))
        self._written_at = time.monotonic()

    def ended(self, step: int, reason: Reason, message: str) -> Evaluation:
        """The report of an end between two evaluations."""
        self.last = replace(
            self.last,
            step=step,
            objective=math.inf,
            errors={},
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

    def _outcome(self, evaluation: Evaluation) -> tuple[Reason | None, str]:
        raw = evaluation.errors[Split.VAL][Readout.RAW][Metric.OBJECTIVE]
        if not math.isfinite(raw):
            return Reason.DIVERGED, f"validation error {raw} at step {evaluation.step}"
        if evaluation.step == self.task.workload.max_steps:
            return Reason.FINISHED, ""
        limit = self.task.time_limit_s
        if limit is not None and evaluation.wall_s > limit:
            return Reason.TIMED_OUT, f"{evaluation.wall_s:.0f} s at step {evaluation.step}, allowed: {limit:g} s"
        return None, ""


def _evaluation_before(checkpoint: dict[str, Any] | None) -> Evaluation:
    """What the checkpoint had measured; step 0 where there is none."""
    if checkpoint:
        return Evaluation.from_plain(json.loads(checkpoint["evaluation"]))
    return Evaluation.without_steps(attempts=0)
