"""Writes what Tune reports into the journal; the only writer, in the driver."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from tunebench.engine.book import last_evaluation, with_losses
from tunebench.engine.checkpoints import checkpoint_folder, drop_checkpoints
from tunebench.engine.task import Evaluation
from tunebench.engine.trial_files import TrialFiles
from tunebench.engine.watchdog import why_ended
from tunebench.study.decision import Decision, Fate
from tunebench.study.errors import RunStopped
from tunebench.study.journal import JournalWriter
from tunebench.study.record import Reason, TrialKey
from tunebench.study.run_copy import RunCopy
from tunebench.tuning.asha import PerArmAsha
from tunebench.tuning.failures import reason_of
from tunebench.tuning.progress import Progress
from tunebench.tuning.run_folder import outside_the_study
from tunebench.tuning.tenancy import DEVICE, evaluation_of
from tunebench.tuning.trial_log import stall_file


class Recorder(Callback):
    """Tune callback that keeps the journal, the checkpoints on disk and the progress view.

    Args:
        journal: the run's journal.
        scheduler: where the reasons of stops come from.
        keys: trial keys by trial id.
        drop: whether a finished trial's checkpoints are deleted, by key.
        progress: the view that is updated.
        engines: name of the engine of each workload.
        left: called with a trial that waits or was stopped at a rung and with what came with its report, so that its
            slot gets free at once.
        stopped: called with the key of a trial that was stopped and its last evaluation.
        obey: called after every step of Tune with what counts the trials that train or are about to.
        copy: of the run, where trials keep their files in a storage.
    """

    def __init__(
        self,
        journal: JournalWriter,
        scheduler: PerArmAsha,
        keys: dict[str, TrialKey],
        drop: Callable[[TrialKey], bool],
        progress: Progress,
        engines: Mapping[str, str],
        left: Callable[[str, Mapping[str, Any]], None] = lambda trial, result: None,
        stopped: Callable[[TrialKey, Evaluation], None] = lambda key, last: None,
        obey: Callable[[Callable[[], int]], None] = lambda active: None,
        copy: RunCopy | None = None,
    ) -> None:
        self._copy = copy or RunCopy(progress.run, None)
        self._left, self._stopped, self._obey = left, stopped, obey
        self._journal, self._scheduler, self._keys = journal, scheduler, keys
        self._drop, self._progress, self._engines = drop, progress, engines
        self._last: dict[str, Evaluation] = {}
        self._closed: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks, and a resumed run builds its own from the journal."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Mark the trial as running."""
        key = self._key(trial)
        stall_file(self._progress.run, key.trial_id).unlink(missing_ok=True)  # of an attempt before
        self._journal.start(key, engine=self._engines[key.workload])
        self._progress.started(key)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Keep an evaluation; close the trial where it ended or was stopped."""
        key = self._key(trial)
        evaluation = Evaluation.from_plain(evaluation_of(result))
        self._last[key.trial_id] = evaluation
        if evaluation.groups or result.get(DEVICE) is not None:
            self._journal.start(key, evaluation.groups, device=result.get(DEVICE))
        if evaluation.at_rung and math.isfinite(evaluation.objective):
            self._journal.record_rung(key, evaluation.step, evaluation.objective)
        self._write_decisions()  # after the rung: what a kill leaves out is decided again from the rungs
        self._progress.evaluated(key, evaluation)
        if evaluation.outcome is not None:
            refinement = {"refinement": evaluation.refinement} if evaluation.refinement else {}
            self._finish(key, evaluation.outcome, {"message": evaluation.message, **refinement})
        elif evaluation.at_rung or key.trial_id in self._scheduler.waiting:
            self._settle(key, result)

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Do what was asked of the run.

        Raises:
            Interrupted: it was asked to end.
        """
        self._obey(lambda: self._active(trials))

    def _active(self, trials: list[Trial]) -> int:
        waiting = self._scheduler.waiting
        going = (t for t in trials if t.status in (Trial.RUNNING, Trial.PENDING))
        return sum(trial.config["trial"] not in waiting for trial in going)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close a trial that was stopped while it waited at its rung."""
        self._close_stopped(self._key(trial))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close a trial that failed more often than the study allows.

        Raises:
            RunStopped: the disk is full or the storage failed; the trial stays open.
        """
        key = self._key(trial)
        error, line = self._why_failed(trial)
        self._scheduler.gave_up(key.trial_id)
        self._write_decisions()
        self._count_crash(key)
        self._finish(key, reason_of(error), {"message": line[:500]})

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Do not try again what no attempt can mend.

        Raises:
            RunStopped: as `on_trial_error`.
        """
        self._why_failed(trial)

    def _why_failed(self, trial: Trial) -> tuple[object, str]:
        """The error of a trial's last attempt, and a line about it."""
        stall = why_ended(stall_file(self._progress.run, self._key(trial).trial_id))
        error = stall or _error_beside_tune(trial) or trial.get_error()
        cause = getattr(error, "cause", None) or error or "the trial's process died"
        lines = str(cause).strip().splitlines() or [type(cause).__name__]  # an exception may have no text
        if why := outside_the_study(self._progress.run, lines[-1]):  # and every further trial would crash too
            raise RunStopped(why)
        return error, lines[-1]

    def _count_crash(self, key: TrialKey) -> None:
        """Take in what a trial had done when it crashed, in this start of the study and in earlier ones."""
        run, name = self._progress.run, key.trial_id
        TrialFiles(self._copy.storage, run, name).fetch()
        last = self._last.get(name) or last_evaluation(run, name) or Evaluation.without_steps(attempts=1)
        self._last[name] = with_losses(last, checkpoint_folder(run, name))

    def _write_decisions(self) -> None:
        for decision in self._scheduler.new_decisions():
            self._journal.decide(self._keys[decision.trial], decision.to_plain())

    def _settle(self, key: TrialKey, result: Mapping[str, Any]) -> None:
        """A trial at its rung, or in a paused run, waits, is stopped, or goes on."""
        waits = key.trial_id in self._scheduler.waiting
        if waits:
            self._progress.waits(key)
        if self._close_stopped(key) or waits:
            self._left(key.trial_id, result)

    def _close_stopped(self, key: TrialKey) -> bool:
        decision = self._scheduler.decision(key.trial_id)
        if decision is None or decision.fate is not Fate.STOP:
            return False
        if key.trial_id not in self._closed:  # Tune tells of a stop twice: with its report and as a completion
            self._closed.add(key.trial_id)
            self._finish(key, Reason.STOPPED_ASHA, _detail(decision))
            self._stopped(key, self._last[key.trial_id])
        return True

    def _finish(self, key: TrialKey, reason: Reason, detail: dict[str, Any]) -> None:
        last = self._last.get(key.trial_id)
        self._journal.finish(
            key,
            reason,
            value=last.objective if last and math.isfinite(last.objective) else None,
            detail=detail,
            ledger=_ledger(last),
            result=last.errors if last else {},
        )
        self._progress.finished(key, reason)
        if self._drop(key):
            drop_checkpoints(self._progress.run, key.trial_id)
            self._copy.drop_checkpoints(key.trial_id)

    def _key(self, trial: Trial) -> TrialKey:
        return self._keys[trial.config["trial"]]


def _error_beside_tune(trial: Trial) -> str | None:
    """The last error as Tune keeps it on this machine, one after the other.

    `get_error` reads a copy that may be of an earlier failure.
    """
    file = getattr(trial, "error_file", None)
    if not file or not Path(file).is_file():
        return None
    return Path(file).read_text(encoding="utf-8").rpartition("Failure # ")[2]


def _detail(decision: Decision) -> dict[str, Any]:
    return {
        "rung": decision.rung,
        "cutoff": decision.cutoff,
        "value": decision.value,
        "recorded": decision.competitors,
    }


def _ledger(last: Evaluation | None) -> dict[str, float]:
    if last is None:
        last = Evaluation.without_steps(attempts=1)
    refined = last.refinement or {}
    return {
        **asdict(last.spent + replace(last.lost, steps=0)),
        "lost_steps": last.lost.steps,
        "attempts": last.attempts,
        **{entry: refined[entry] for entry in ("refine_steps", "refine_device_s") if entry in refined},
    }
