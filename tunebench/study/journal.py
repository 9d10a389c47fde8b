"""The journal: Optuna's JournalStorage, one Optuna study per arm, the one record of truth of a run.

Only the driver writes it, through `JournalWriter`; everybody may read it at any time with `read_trials`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._storage import JournalOperation  # no public name for the entries of a journal
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from tunebench.study.errors import RunError
from tunebench.study.journal_form import check_trial, damaged_line, planned_trials
from tunebench.study.record import JOURNAL, Reason, Stage, TrialKey, TrialRecord

_log = logging.getLogger(__name__)

_LATE = "decision"
_AFFORDED = "afforded"
_AT_ONCE = 1000  # entries of a long batch that are held in memory
_STATES = {Reason.FINISHED: TrialState.COMPLETE, Reason.STOPPED_ASHA: TrialState.PRUNED}


def read_trials(run: Path) -> list[TrialRecord]:
    """All trials of a run, arm by arm in the order they were planned; an unfinished run is read as it is.

    Raises:
        FileNotFoundError: the run has no journal.
        RunError: the journal is damaged.
    """
    path = _journal_file(run)
    with _reading(path):
        planned = planned_trials(path)  # before the trials are read: a driver may add some in between
        return _records(_storage(_backend(path)), planned)


def read_afforded(run: Path) -> dict[str, dict[int, int]]:
    """What `JournalWriter.afford` has written: by arm and number of configurations wanted, how many are paid for.

    Raises:
        FileNotFoundError: the run has no journal.
        RunError: the journal is damaged.
    """
    path = _journal_file(run)
    with _reading(path):
        studies = _storage(_backend(path)).get_all_studies()
        return {study.study_name: _afforded(study.user_attrs) for study in studies}


def read_passages(run: Path) -> list[tuple[str, int | None]]:
    """Every rung that a trial reached, as (trial id, step), and every end, as (trial id, None), in the order written.

    Raises:
        FileNotFoundError: the run has no journal.
        RunError: the journal is damaged.
    """
    path = _journal_file(run)
    trials: list[str] = []  # Optuna numbers trials as they come
    passages: list[tuple[str, int | None]] = []
    with _reading(path):
        for entry in _backend(path).read_logs(0):
            match entry["op_code"]:
                case JournalOperation.CREATE_TRIAL:
                    trials.append(entry["user_attrs"]["trial_id"])
                case JournalOperation.SET_TRIAL_INTERMEDIATE_VALUE:
                    passages.append((trials[entry["trial_id"]], entry["step"]))
                case JournalOperation.SET_TRIAL_STATE_VALUES if TrialState(entry["state"]).is_finished():
                    passages.append((trials[entry["trial_id"]], None))
    return passages


class JournalWriter:
    """Writes the journal of one run. Every method may be repeated with the same arguments.

    Trials are planned before they start, so that a resumed run knows what is missing. Each method waits for the disk,
    but inside of `batch`.
    """

    def __init__(self, run: Path) -> None:
        self._path = path = run / JOURNAL
        # A driver killed while it wrote leaves Optuna's lock, which Optuna would wait out for 30 s. The run's own lock
        # lets one driver in at a time and goes with its process, so what lies here is stale.
        path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
        self._load()

    def _load(self) -> None:
        path = self._path
        mend_torn_tail(path)
        self._backend = _BatchBackend(path)
        with _reading(path):
            planned = planned_trials(path) if path.exists() else 0
            self._storage = _storage(self._backend)
            _records(self._storage, planned)  # refuses what is damaged: what a driver adds to it would not mend it
        self._studies = {study.study_name: study._study_id for study in self._storage.get_all_studies()}
        self._trials: dict[str, int] = {}
        for study_id in self._studies.values():
            for trial in self._storage.get_all_trials(study_id, deepcopy=False):
                self._trials[trial.user_attrs["trial_id"]] = trial._trial_id

    @contextmanager
    def batch(self) -> Iterator[None]:
        """What is written inside is on the disk at the end of the block, for which it waits once, or a few times.

        It is written in its order. Where that fails, this writer knows what is on the disk and nothing else.
        """
        try:
            with self._backend.batch(seen_at_once=True):
                yield
        except BaseException:
            self._load()
            raise

    def trials(self) -> list[TrialRecord]:
        """What `read_trials` would return, without parsing the file again."""
        return _records(self._storage, planned=0)

    def add_arm(self, arm: str, attributes: Mapping[str, Any]) -> None:
        """Create the arm's Optuna study, named WORKLOAD/OPTIMIZER, with its attributes, unless they are there."""
        if arm not in self._studies:
            self._studies[arm] = self._storage.create_new_study([StudyDirection.MINIMIZE], study_name=arm)
        written = self._storage.get_study_user_attrs(self._studies[arm])
        for name in attributes.keys() - written.keys():  # a kill may have come between the study and its attributes
            self._storage.set_study_user_attr(self._studies[arm], name, attributes[name])

    def afford(self, arm: str, wanted: int, count: int) -> None:
        """Write how many of the configurations that are wanted for an arm its device-seconds pay for."""
        self._storage.set_study_user_attr(self._studies[arm], f"{_AFFORDED} {wanted}", count)

    def afforded(self, arm: str, wanted: int) -> int | None:
        """What `afford` has written; None before that."""
        return _afforded(self._storage.get_study_user_attrs(self._studies[arm])).get(wanted)

    def afforded_before(self, arm: str, wanted: int) -> dict[int, int]:
        """What `afford` has written for smaller numbers of configurations wanted, before the run was extended."""
        written = _afforded(self._storage.get_study_user_attrs(self._studies[arm]))
        return {number: written[number] for number in sorted(written) if number < wanted}

    def plan(
        self,
        key: TrialKey,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        seeds: Mapping[str, int],
        data_hash: str | None = None,
        *,
        sentinel: bool = False,
        point: Mapping[str, float] | None = None,
    ) -> None:
        """Enter a trial that waits to be started; `point` is where in the unit cube its hyperparameters come from."""
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
                "sentinel": sentinel,
                "point": dict(point or {}),
            },
        )
        self._trials[key.trial_id] = self._storage.create_new_trial(self._studies[key.arm], template)

    def start(
        self,
        key: TrialKey,
        groups: list[dict[str, Any]] | None = None,
        engine: str | None = None,
        device: str | None = None,
    ) -> None:
        """Mark a trial as running and, once known, write its engine, kind of device and realised parameter groups."""
        trial = self._trial(key)
        with self._backend.batch():
            if trial.state == TrialState.WAITING:
                self._storage.set_trial_state_values(self._trials[key.trial_id], TrialState.RUNNING)
            if engine and trial.user_attrs.get("engine") != engine:
                self._set(key, "engine", engine)
            if device is not None and trial.user_attrs.get("device") != device:
                self._set(key, "device", device)
            if groups and not trial.user_attrs.get("groups"):
                self._set(key, "groups", groups)

    def decide(self, key: TrialKey, decision: Mapping[str, Any]) -> None:
        """Write what a rung said of a trial; a rung decides once.

        A sentinel may have ended before its rung is decided. Optuna lets nobody change a trial that has ended, so its
        decision is kept with its arm.
        """
        trial, study = self._trial(key), self._studies[key.arm]
        written = _decisions(trial, _late_decisions(self._storage.get_study_user_attrs(study)))
        if any(earlier["rung"] == decision["rung"] for earlier in written):
            return
        if trial.state.is_finished():
            self._storage.set_study_user_attr(study, _late(key.trial_id, decision["rung"]), dict(decision))
        else:
            self._set(key, "decisions", [*trial.user_attrs.get("decisions", []), dict(decision)])

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
        state = _STATES.get(reason, TrialState.FAIL)
        values = None if value is None or state == TrialState.FAIL else [value]
        with self._backend.batch():
            for name, content in {"detail": detail, "ledger": ledger, "result": result}.items():
                self._set(key, name, dict(content))
            self._set(key, "reason", reason.value)
            self._storage.set_trial_state_values(self._trials[key.trial_id], state, values)

    def _trial(self, key: TrialKey) -> FrozenTrial:
        return self._storage.get_trial(self._trials[key.trial_id])

    def _set(self, key: TrialKey, name: str, value: Any) -> None:
        self._storage.set_trial_user_attr(self._trials[key.trial_id], name, value)


class _BatchBackend(JournalFileBackend):
    """Writes the entries of a batch at once: each write waits for the disk, and a trial's end is five entries.

    Nobody else writes, so the file is read once; after that what is appended is what there is to read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), lock_obj=JournalFileOpenLock(str(path)))
        self._held: list[dict[str, Any]] | None = None
        self._seen_at_once = self._was_read = False
        self._unread: list[dict[str, Any]] = []

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        if not self._was_read:
            self._was_read = True
            return super().read_logs(log_number_from)
        unread, self._unread = self._unread, []
        return iter(unread)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self._held is None:
            self._write(logs)
            self._show(logs)
            return
        self._held += logs
        if self._seen_at_once:
            self._show(logs)
            if len(self._held) >= _AT_ONCE:
                self._write(self._held)
                self._held = []

    @contextmanager
    def batch(self, *, seen_at_once: bool = False) -> Iterator[None]:
        """Hold back what is written inside; a batch in a batch is part of it.

        Args:
            seen_at_once: whether readers see it before it is on the disk, in parts where it is long; otherwise nothing
                of it is seen or reaches the disk if the block fails.
        """
        if self._held is not None:
            yield
            return
        self._held, self._seen_at_once = [], seen_at_once
        try:
            yield
            held, self._held = self._held, None
            if held:
                self._write(held)
                if not seen_at_once:
                    self._show(held)
        finally:
            self._held = None

    def _write(self, logs: list[dict[str, Any]]) -> None:
        super().append_logs(logs)

    def _show(self, logs: list[dict[str, Any]]) -> None:
        self._unread += [json.loads(json.dumps(log)) for log in logs]  # as they come back from the file


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


def _journal_file(run: Path) -> Path:
    path = run / JOURNAL
    if not path.is_file():  # Optuna would create it
        raise FileNotFoundError(f"{path}: no journal here, allowed: a run directory written by `tunebench run`")
    return path


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a damaged journal does to its reader into one line."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # Optuna trusts its files, and fails in any way where one does not deserve it
        line = damaged_line(path)
        what = f"line {line} is no entry" if line else " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise RunError(f"{path}: found an unreadable journal ({what}), allowed: Optuna's journal") from error


def _storage(backend: JournalFileBackend) -> JournalStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return JournalStorage(backend)


def _backend(path: Path) -> JournalFileBackend:
    return JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path)))


def _records(storage: JournalStorage, planned: int) -> list[TrialRecord]:
    """All trials arm by arm.

    Raises:
        ValueError: one that no driver could have written, or fewer than were planned.
    """
    trials = [
        _record(trial, late, study.study_name)
        for study in storage.get_all_studies()
        for late in [_late_decisions(study.user_attrs)]
        for trial in storage.get_all_trials(study._study_id, deepcopy=False)
    ]
    if len(trials) < planned:  # Optuna leaves out what does not fit what came before
        raise ValueError(f"{len(trials)} of {planned} trials can be read")
    return trials


def _afforded(arm: Mapping[str, Any]) -> dict[int, int]:
    """Numbers of configurations that an arm's device-seconds pay for, by the number wanted."""
    return {int(name.split()[1]): int(count) for name, count in arm.items() if name.startswith(f"{_AFFORDED} ")}


def _late(trial_id: str, rung: int) -> str:
    return f"{_LATE} {rung} {trial_id}"


def _late_decisions(arm: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Decisions kept with an arm, by trial."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, decision in arm.items():
        if name.startswith(f"{_LATE} "):
            found.setdefault(decision["trial"], []).append(decision)
    return found


def _decisions(trial: FrozenTrial, late: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Decisions about a trial, in the order of the rungs."""
    own, after = trial.user_attrs.get("decisions", []), late.get(trial.user_attrs["trial_id"], [])
    return sorted([*own, *after], key=lambda decision: int(decision["rung"]))


def _record(trial: FrozenTrial, late: Mapping[str, list[dict[str, Any]]], arm: str) -> TrialRecord:
    attributes = trial.user_attrs
    check_trial(attributes, late.get(attributes["trial_id"], []), trial.values, trial.intermediate_values)
    key = TrialKey(**{**attributes["key"], "stage": Stage(attributes["key"]["stage"])})
    if (key.trial_id, key.arm) != (attributes["trial_id"], arm):
        raise ValueError(f"a trial {attributes['trial_id']!r} of arm {arm!r} with the key of {key.trial_id!r}")
    reason = attributes.get("reason")
    return TrialRecord(
        key=key,
        number=trial.number,
        state=trial.state.name,
        reason=Reason(reason) if reason and trial.state.is_finished() else None,
        detail=attributes.get("detail", {}),
        value=trial.value if trial.values else None,
        params=dict(trial.params),
        rungs=dict(trial.intermediate_values),
        seeds=attributes["seeds"],
        ledger=attributes.get("ledger", {}),
        decisions=_decisions(trial, late),
        sentinel=attributes.get("sentinel", False),
        point=attributes.get("point", {}),
        data_hash=attributes.get("data_hash"),
        groups=attributes.get("groups", []),
        engine=attributes.get("engine"),
        device=attributes.get("device"),
        result=attributes.get("result", {}),
    )
