"""Turns what Tune reports of trials into entries for the journal and the view, in the order it happens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial

from tunebench.engine.book import last_evaluation, with_losses
from tunebench.engine.checkpoints import checkpoint_folder
from tunebench.engine.task import Evaluation
from tunebench.engine.trial_files import TrialFiles
from tunebench.engine.watchdog import why_ended
from tunebench.study.decision import Decision, Fate
from tunebench.study.errors import RunStopped
from tunebench.study.record import Reason, TrialKey
from tunebench.study.storage import Storage
from tunebench.tuning.asha import PerArmAsha
from tunebench.tuning.entries import Decided, Ended, Entry, Evaluated, Reached, Realised, Started, Waiting, Write
from tunebench.tuning.failures import reason_of
from tunebench.tuning.run_folder import outside_the_study
from tunebench.tuning.tenancy import DEVICE, evaluation_of
from tunebench.tuning.trial_log import stall_file


class Recorder(Callback):
    """Tune callback that turns what Tune reports into entries of the journal and the progress view.

    Args:
        write: takes the entries.
        scheduler: where the reasons of stops come from.
        keys: trial keys by trial id.
        run: the run directory.
        engines: name of the engine of each workload.
        left: called with a trial that waits or was stopped at a rung and with what came with its report, so that its
            slot gets free at once.
        stopped: called with the key of a trial that was stopped and its last evaluation.
        obey: called after every step of Tune with what counts the trials that train or are about to.
        storage: of the run, where trials keep their files in one.
    """

    def __init__(
        self,
        write: Write,
        scheduler: PerArmAsha,
        keys: Mapping[str, TrialKey],
        run: Path,
        engines: Mapping[str, str],
        left: Callable[[str, Mapping[str, Any]], None] = lambda trial, result: None,
        stopped: Callable[[TrialKey, Evaluation], None] = lambda key, last: None,
        obey: Callable[[Callable[[], int]], None] = lambda active: None,
        storage: Storage | None = None,
    ) -> None:
        self._left, self._stopped, self._obey = left, stopped, obey
        self._write, self._scheduler, self._keys = write, scheduler, keys
        self._run, self._engines, self._storage = run, engines, storage
        self._last: dict[str, Evaluation] = {}
        self._realised: dict[str, tuple[bool, str | None]] = {}
        self._closed: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its callbacks, and a resumed run builds its own from the journal."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Mark the trial as running."""
        key = self._key(trial)
        stall_file(self._run, key.trial_id).unlink(missing_ok=True)  # of an attempt before
        self._write([Started(key=key, engine=self._engines[key.workload])])

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Keep an evaluation; close the trial where it ended or was stopped."""
        key = self._key(trial)
        evaluation = Evaluation.from_plain(evaluation_of(result))
        self._last[key.trial_id] = evaluation
        new = self._as_realised(key, evaluation, result.get(DEVICE))
        if evaluation.at_rung and math.isfinite(evaluation.objective):
            new.append(Reached(key=key, step=evaluation.step, objective=evaluation.objective))
        new += self._decisions()  # after the rung: what a kill leaves out is decided again from the rungs
        new.append(Evaluated(key=key, objective=evaluation.objective))
        if evaluation.outcome is not None:
            refinement = {"refinement": evaluation.refinement} if evaluation.refinement else {}
            self._write([*new, self._end(key, evaluation.outcome, {"message": evaluation.message, **refinement})])
        elif evaluation.at_rung or key.trial_id in self._scheduler.waiting:
            self._settle(key, result, new)
        else:
            self._write(new)

    def _as_realised(self, key: TrialKey, evaluation: Evaluation, device: str | None) -> list[Entry]:
        """What is known of a trial's groups and device, where that is new."""
        known = bool(evaluation.groups), device
        if known == (False, None) or self._realised.get(key.trial_id) == known:
            return []
        self._realised[key.trial_id] = known
        return [Realised(key=key, groups=evaluation.groups, device=device)]

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
        self._close_stopped(self._key(trial), [])

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Close a trial that failed more often than the study allows.

        Raises:
            RunStopped: the disk is full or the storage failed; the trial stays open.
        """
        key = self._key(trial)
        error, line = self._why_failed(trial)
        self._scheduler.gave_up(key.trial_id)
        decisions = self._decisions()
        self._count_crash(key)
        self._write([*decisions, self._end(key, reason_of(error), {"message": line[:500]})])

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        """Do not try again what no attempt can mend.

        Raises:
            RunStopped: as `on_trial_error`.
        """
        self._why_failed(trial)

    def _why_failed(self, trial: Trial) -> tuple[object, str]:
        """The error of a trial's last attempt, and a line about it."""
        stall = why_ended(stall_file(self._run, self._key(trial).trial_id))
        error = stall or _error_beside_tune(trial) or trial.get_error()
        cause = getattr(error, "cause", None) or error or "the trial's process died"
        lines = str(cause).strip().splitlines() or [type(cause).__name__]  # an exception may have no text
        if why := outside_the_study(self._run, lines[-1]):  # and every further trial would crash too
            raise RunStopped(why)
        return error, lines[-1]

    def _count_crash(self, key: TrialKey) -> None:
        """Take in what a trial had done when it crashed, in this start of the study and in earlier ones."""
        run, name = self._run, key.trial_id
        TrialFiles(self._storage, run, name).fetch()
        last = self._last.get(name) or last_evaluation(run, name) or Evaluation.without_steps(attempts=1)
        self._last[name] = with_losses(last, checkpoint_folder(run, name))

    def _decisions(self) -> list[Entry]:
        new = self._scheduler.new_decisions()
        return [Decided(key=self._keys[decision.trial], decision=decision.to_plain()) for decision in new]

    def _settle(self, key: TrialKey, result: Mapping[str, Any], new: list[Entry]) -> None:
        """A trial at its rung, or in a paused run, waits, is stopped, or goes on."""
        waits = key.trial_id in self._scheduler.waiting
        if waits:
            new.append(Waiting(key=key, for_rung=self._scheduler.waits_for_rung(key.trial_id)))
        if self._close_stopped(key, new) or waits:
            self._left(key.trial_id, result)

    def _close_stopped(self, key: TrialKey, new: list[Entry]) -> bool:
        """Write what is new, with the end of the trial if it was stopped; whether it was."""
        decision = self._scheduler.decision(key.trial_id)
        if decision is None or decision.fate is not Fate.STOP:
            self._write(new)
            return False
        first = key.trial_id not in self._closed  # Tune tells of a stop twice: with its report and as a completion
        self._closed.add(key.trial_id)
        self._write([*new, self._end(key, Reason.STOPPED_ASHA, _detail(decision))] if first else new)
        if first:
            self._stopped(key, self._last[key.trial_id])
        return True

    def _end(self, key: TrialKey, reason: Reason, detail: dict[str, Any]) -> Ended:
        last = self._last.get(key.trial_id)
        return Ended(
            key=key,
            reason=reason,
            value=last.objective if last and math.isfinite(last.objective) else None,
            detail=detail,
            ledger=_ledger(last),
            result=last.errors if last else {},
        )

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
