"""The journal: Optuna's JournalStorage, one Optuna study per arm, the one record of truth of a run.

Only the driver writes it, through `JournalWriter`; everybody may read it at any time with `read_trials`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from tunebench.study.record import JOURNAL, Reason, Stage, TrialKey, TrialRecord

_log = logging.getLogger(__name__)

_STATES = {Reason.FINISHED: TrialState.COMPLETE, Reason.STOPPED_ASHA: TrialState.PRUNED}


def read_trials(run: Path) -> list[TrialRecord]:
    """All trials of a run, arm by arm in the order they were planned; an unfinished run is read as it is.

    Raises:
        FileNotFoundError: the run has no journal.
    """
    path = run / JOURNAL
    if not path.is_file():  # Optuna would create it
        raise FileNotFoundError(f"{path}: no journal here, allowed: a run directory written by `tunebench run`")
    storage = _open(path)
    studies = storage.get_all_studies()
    return [_record(trial) for study in studies for trial in storage.get_all_trials(study._study_id, deepcopy=False)]


class JournalWriter:
    """Writes the journal of one run. Every method may be repeated with the same arguments.

    Trials are planned before they start, so that a resumed run knows what is missing.
    """

    def __init__(self, run: Path) -> None:
        path = run / JOURNAL
        # A driver killed while it wrote leaves Optuna's lock, which Optuna would wait out for 30 s. The run's own lock
        # lets one driver in at a time and goes with its process, so what lies here is stale.
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
        mend_torn_tail(path)
        self._storage = _open(path)
        self._studies = {study.study_name: study._study_id for study in self._storage.get_all_studies()}
        self._trials: dict[str, int] = {}
        for study_id in self._studies.values():
            for trial in self._storage.get_all_trials(study_id, deepcopy=False):
                self._trials[trial.user_attrs["trial_id"]] = trial._trial_id

    def add_arm(self, arm: str, attributes: Mapping[str, Any]) -> None:
        """Create the arm's Optuna study, named WORKLOAD/OPTIMIZER, with its attributes, unless they are there."""
        if arm not in self._studies:
            self._studies[arm] = self._storage.create_new_study([StudyDirection.MINIMIZE], study_name=arm)
        written = self._storage.get_study_user_attrs(self._studies[arm])
        for name in attributes.keys() - written.keys():  # a kill may have come between the study and its attributes
            self._storage.set_study_user_attr(self._studies[arm], name, attributes[name])

    def plan(
        self,
        key: TrialKey,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        seeds: Mapping[str, int],
        data_hash: str | None = None,
    ) -> None:
        """Enter a trial that waits to be started."""
        if key.trial_id in self._trials:
            return
        template = create_trial(
            state=TrialState.WAITING,
            params=dict(params),
            distributions=dict(distributions),
            user_attrs={
                "trial_id": key.trial_id,
                "key": asdict(key),
                "stage": key.stage.value,
                "seeds": dict(seeds),
                "data_hash": data_hash,
            },
        )
        self._trials[key.trial_id] = self._storage.create_new_trial(self._studies[key.arm], template)

    def start(self, key: TrialKey, groups: list[dict[str, Any]] | None = None, engine: str | None = None) -> None:
        """Mark a trial as running and, once known, write its engine and its realised parameter groups."""
        if self._trial(key).state == TrialState.WAITING:
            self._storage.set_trial_state_values(self._trials[key.trial_id], TrialState.RUNNING)
        if engine and self._trial(key).user_attrs.get("engine") != engine:
            self._set(key, "engine", engine)
        if groups and not self._trial(key).user_attrs.get("groups"):
            self._set(key, "groups", groups)

    def note(self, key: TrialKey, detail: Mapping[str, Any]) -> None:
        """Write why a trial is about to be closed."""
        self._set(key, "detail", dict(detail))

    def record_rung(self, key: TrialKey, step: int, objective: float) -> None:
        """Write the objective that ASHA compares at a rung."""
        if self._trial(key).intermediate_values.get(step) != objective:
            self._storage.set_trial_intermediate_value(self._trials[key.trial_id], step, objective)

    def finish(
        self,
        key: TrialKey,
        reason: Reason,
        *,
        value: float | None,
        detail: Mapping[str, Any],
        ledger: Mapping[str, float],
        result: Mapping[str, Any],
    ) -> None:
        """Close a trial; what is closed stays as it is."""
        if self._trial(key).state.is_finished():
            return
        self.start(key)
        for name, content in {"detail": detail, "ledger": ledger, "result": result}.items():
            self._set(key, name, dict(content))
        self._set(key, "reason", reason.value)
        state = _STATES.get(reason, TrialState.FAIL)
        values = None if value is None or state == TrialState.FAIL else [value]
        self._storage.set_trial_state_values(self._trials[key.trial_id], state, values)

    def _trial(self, key: TrialKey) -> FrozenTrial:
        return self._storage.get_trial(self._trials[key.trial_id])

    def _set(self, key: TrialKey, name: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._trials[key.trial_id], name, value)


def mend_torn_tail(path: Path) -> None:
    """Cut off a last line that a kill or a full disk left unfinished; Optuna refuses a journal that holds one."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        lines = file.read()
        whole = lines.rfind(b"\n") + 1
        if whole < len(lines):
            _log.warning("%s: dropped an unfinished last entry of %d bytes", path.name, len(lines) - whole)
            file.truncate(whole)


def _open(path: Path) -> JournalStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))


def _record(trial: FrozenTrial) -> TrialRecord:
    attributes = trial.user_attrs
    key = attributes["key"]
    reason = attributes.get("reason")
    return TrialRecord(
        key=TrialKey(**{**key, "stage": Stage(key["stage"])}),
        number=trial.number,
        state=trial.state.name,
        reason=Reason(reason) if reason and trial.state.is_finished() else None,
        detail=attributes.get("detail", {}),
        value=trial.value if trial.values else None,
        params=dict(trial.params),
        rungs=dict(trial.intermediate_values),
        seeds=attributes["seeds"],
        ledger=attributes.get("ledger", {}),
        data_hash=attributes.get("data_hash"),
        groups=attributes.get("groups", []),
        engine=attributes.get("engine"),
        result=attributes.get("result", {}),
    )
