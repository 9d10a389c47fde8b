"""What becomes of a stage's trials, as entries in their order: drivers hand them over, one clerk writes them down."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunebench.engine.checkpoints import drop_checkpoints
from tunebench.study.journal import JournalWriter
from tunebench.study.record import Reason, TrialKey
from tunebench.study.run_copy import RunCopy
from tunebench.tuning.progress import Progress


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """Something that became of a trial."""

    key: TrialKey


@dataclass(frozen=True, kw_only=True)
class Called(_Entry):
    """It was handed to Tune, or was promoted: it has a place or waits for one."""


@dataclass(frozen=True, kw_only=True)
class Started(_Entry):
    """It runs, trained by this engine."""

    engine: str


@dataclass(frozen=True, kw_only=True)
class Realised(_Entry):
    """What its optimizer's groups are, and the kind of its device, where they are known."""

    groups: Sequence[Mapping[str, Any]]
    device: str | None


@dataclass(frozen=True, kw_only=True)
class Reached(_Entry):
    """It came to a rung, with a finite objective."""

    step: int
    objective: float


@dataclass(frozen=True, kw_only=True)
class Decided(_Entry):
    """A rung has said something of it, in the plain form of a `Decision`."""

    decision: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Evaluated(_Entry):
    """It was evaluated."""

    objective: float


@dataclass(frozen=True, kw_only=True)
class Waiting(_Entry):
    """It has given up its place.

    Attributes:
        for_rung: until its rung decides; otherwise it needs a place again as soon as there is one.
    """

    for_rung: bool


@dataclass(frozen=True, kw_only=True)
class Ended(_Entry):
    """It is over; fields as in `JournalWriter.finish`."""

    reason: Reason
    value: float | None
    detail: Mapping[str, Any]
    ledger: Mapping[str, float]
    result: Mapping[str, Any]


Entry = Called | Started | Realised | Reached | Decided | Evaluated | Waiting | Ended
Write = Callable[[Sequence[Entry]], None]
"""Takes entries in their order; those that bind are on the disk when it returns."""


def binds(entry: Entry) -> bool:
    """Whether an entry must be on the disk before anybody acts on what follows from it.

    A rung comes before what it decides, and a decision before it is carried out: what a kill leaves out is decided
    again from the rungs. The others tell what would come about again.
    """
    return isinstance(entry, Reached | Decided | Ended)


class Clerk:
    """Writes entries to the journal, shows them, and deletes what trials that ended no longer need.

    Args:
        journal: of the run.
        progress: the view that is updated.
        drop: whether a finished trial's checkpoints are deleted, by key.
        copy: of the run, where trials keep their files in a storage.
    """

    def __init__(
        self, journal: JournalWriter, progress: Progress, drop: Callable[[TrialKey], bool], copy: RunCopy
    ) -> None:
        self._journal, self._progress, self._drop, self._copy = journal, progress, drop, copy

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles the queue that leads here, and a resumed run makes its own."""
        return {}

    def write(self, entries: Sequence[Entry]) -> None:
        """Write entries in their order, all with one wait for the disk; they are there when it returns."""
        with self._journal.batch():
            for entry in entries:
                self._enter(entry)
        for entry in entries:
            self._show(entry)

    def _enter(self, entry: Entry) -> None:
        match entry:
            case Started(key=key, engine=engine):
                self._journal.start(key, engine=engine)
            case Realised(key=key, groups=groups, device=device):
                self._journal.start(key, list(map(dict, groups)), device=device)
            case Reached(key=key, step=step, objective=objective):
                self._journal.record_rung(key, step, objective)
            case Decided(key=key, decision=decision):
                self._journal.decide(key, decision)
            case Ended(key=key, reason=reason, value=value, detail=detail):
                self._journal.finish(key, reason, value=value, detail=detail, ledger=entry.ledger, result=entry.result)

    def _show(self, entry: Entry) -> None:
        match entry:
            case Started(key=key):
                self._progress.started(key)
            case Evaluated(key=key, objective=objective):
                self._progress.evaluated(key, objective)
            case Waiting(key=key):
                self._progress.waits(key)
            case Ended(key=key, reason=reason):
                self._progress.finished(key, reason)
                if self._drop(key):  # only now: the journal says that it has ended
                    drop_checkpoints(self._progress.run, key.trial_id)
                    self._copy.drop_checkpoints(key.trial_id)
