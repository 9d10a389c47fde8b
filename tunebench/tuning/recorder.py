"""Writes what Tune reports into the journal; the only writer, in the driver."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from tunebench.engine.checkpoints import drop_checkpoints
from tunebench.engine.task import Evaluation
from tunebench.study.errors import RunStopped
from tunebench.study.journal import JournalWriter
from tunebench.study.record import Reason, TrialKey
from tunebench.tuning.asha import Decision, PerArmAsha
from tunebench.tuning.progress import Progress
from tunebench.tuning.run_folder import disk_is_full


class Recorder(Callback):
    """Tune callback that keeps the journal, the checkpoints on disk and the progress view.

    Args:
        journal: the run's journal.
        scheduler: where the reasons of stops come from.
        keys: trial keys by trial id.
        rungs: step -> journal, per arm.
        drop: whether a finished trial's checkpoints are deleted, by key.
        progress: the view that is updated.
        engines: name of the engine of each workload.
    """

    def __init__(
        self,
        journal: JournalWriter,
        scheduler: PerArmAsha,
        keys: dict[str, TrialKey],
        rungs: dict[str, tuple[int, ...]],
        drop: Callable[[TrialKey], bool],
        progress: Progress,
        engines: Mapping[str, str],
    ) -> None:
        self._journal, self._scheduler, self._keys, self._rungs = journal, scheduler, keys, rungs
        self._drop, self._progress, self._engines = drop, progress, engines
        self._last: dict[str, Evaluation] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks, and a resumed run builds its own from the journal."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Mark the trial as running."""
        key = self._key(trial)
        self._journal.start(key, engine=self._engines[key.workload])
        self._progress.started(key)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Keep an evaluation; close the trial where it ended or was stopped."""
        key = self._key(trial)
        evaluation = Evaluation.from_plain(result)
        self._last[key.trial_id] = evaluation
        if evaluation.groups:
            self._journal.start(key, evaluation.groups)
        decision = self._scheduler.decisions.get(key.trial_id)
        if decision is not None:  # before the rung: a rung without it would mean after a kill that the trial went on
            self._journal.note(key, _detail(decision))
        if evaluation.step in self._rungs.get(key.arm, ()) and math.isfinite(evaluation.objective):
            self._journal.record_rung(key, evaluation.step, evaluation.objective)
        self._progress.evaluated(key, evaluation)
        if evaluation.outcome is not None:
            self._finish(key, evaluation.outcome, {"message": evaluation.message})
        elif decision is not None:
            self._finish(key, Reason.STOPPED_ASHA, _detail(decision))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close a trial that failed more often than the study allows.

        Raises:
            RunStopped: the disk is full; the trial stays open.
        """
        error = trial.get_error() or _error_beside_tune(trial)
        cause = getattr(error, "cause", None) or error or "the trial's process died"
        lines = str(cause).strip().splitlines() or [type(cause).__name__]  # an exception may have no text
        if disk_is_full(self._progress.run, lines[-1]):  # no fault of the trial, and every further one would crash too
            raise RunStopped(f"{self._progress.run}: the disk is full; free some space and run again")
        self._finish(self._key(trial), Reason.CRASHED, {"message": lines[-1][:500]})

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

    def _key(self, trial: Trial) -> TrialKey:
        return self._keys[trial.config["trial"]]


def _error_beside_tune(trial: Trial) -> str | None:
    """The error as Tune keeps it on this machine; `get_error` reads a copy that may be ten seconds behind."""
    file = getattr(trial, "error_file", None)
    return Path(file).read_text(encoding="utf-8") if file and Path(file).is_file() else None


def _detail(decision: Decision) -> dict[str, Any]:
    return {
        "rung": decision.rung,
        "cutoff": decision.cutoff,
        "value": decision.value,
        "recorded": decision.recorded,
    }


def _ledger(last: Evaluation | None) -> dict[str, float]:
    if last is None:
        return {"steps": 0, "wall_s": 0.0, "device_s": 0.0, "attempts": 1}
    return {"steps": last.step, "wall_s": last.wall_s, "device_s": last.device_s, "attempts": last.attempts}
