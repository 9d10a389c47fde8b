"""A driver of some of a stage's arms, in a process of its own: an actor that tells the main process what happens.

Only the main process writes the journal. It asks each shard for entries by `take`, over and over, one call at a time,
and a call says as well that the entries of the one before are on the disk and how many places the shard has now.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tunebench.study.errors import Interrupted, RunError, RunStopped
from tunebench.tuning.driver import DriverWork, drive
from tunebench.tuning.driver_log import log_driver
from tunebench.tuning.entries import Entry, binds
from tunebench.tuning.handle import Handle

TELL_EVERY_S = 0.5
"""A shard tells what has come together after so many seconds, and what binds at once."""
_SAID_AS_THEY_ARE = (Interrupted, RunError, RunStopped)

log = logging.getLogger("ray.tune")  # whose messages the driver keeps


@dataclass(frozen=True, kw_only=True)
class Lease:
    """Places that a shard has.

    Attributes:
        tenants: for trials of the cohort engine. others: for others; None where Ray's resources alone bound them.
    """

    tenants: int
    others: int | None


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a shard tells.

    Attributes:
        entries: in their order.
        ended: whether nothing more comes.
        error: why it ended, where not all of its trials have ended.
    """

    entries: Sequence[Entry]
    ended: bool = False
    error: Exception | None = None


class Outbox:
    """Entries on their way to the main process: Tune's thread puts them in, the actor's thread takes them out."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._entries: list[Entry] = []
        self._put = self._taken = self._written = self._bound = 0  # numbers of entries, from the first one on
        self._ended = False
        self._error: Exception | None = None
        self._lease = Lease(tenants=0, others=0)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles the queue that leads here, and a resumed run makes its own."""
        return {}

    def write(self, entries: Sequence[Entry]) -> None:
        """Hand entries over in their order; returns when they are on the disk if one of them binds."""
        with self._changed:
            self._entries += entries
            self._put += len(entries)
            if any(map(binds, entries)):
                self._bound = self._put
                self._changed.notify_all()
                number = self._put
                self._changed.wait_for(lambda: self._written >= number)

    def end(self, error: Exception | None) -> None:
        """Nothing more will come."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def take(self, lease: Lease) -> Told:
        """What has been put in since the last call, whose entries are on the disk by now; waits a moment for it."""
        with self._changed:
            self._lease, self._written = lease, self._taken
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._bound > self._taken or self._ended, timeout=TELL_EVERY_S)
            entries, self._entries = self._entries, []
            self._taken = self._put
            return Told(entries=entries, ended=self._ended, error=self._error)

    @property
    def lease(self) -> Lease:
        """The places that the shard has now."""
        with self._changed:
            return self._lease


class LeasedRoom:
    """The room for a shard's trials: the places that it was given of a pool that it shares with others.

    Attributes:
        actor: the pool; None where no trial needs one.
    """

    def __init__(self, actor: Handle | None, outbox: Outbox) -> None:
        self.actor, self._outbox = actor, outbox

    def capacity(self) -> int:
        """Trials that can be in slots at once."""
        return self._outbox.lease.tenants

    def others(self) -> int | None:
        """Trials of other engines that can train at once."""
        return self._outbox.lease.others

    def vacate(self, trial: str, visit: str) -> None:
        """Free the slot of a trial that waits at a rung or was stopped."""
        if self.actor is not None:
            self.actor.vacate.remote(trial, visit)


class Shard:
    """The actor. Its main thread answers `take`; Tune has a thread of its own."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._outbox = Outbox()

    def begin(self, work: DriverWork, pool: Handle | None) -> None:
        """Start to work; the one before has ended."""
        log_driver(work.run, f"driver-{self._number}.log")
        self._outbox = outbox = Outbox()
        threading.Thread(
            target=_work, args=(work, LeasedRoom(pool, outbox), outbox), name="driver", daemon=True
        ).start()

    def take(self, lease: Lease) -> Told:
        """See `Outbox.take`."""
        return self._outbox.take(lease)


def _work(work: DriverWork, room: LeasedRoom, outbox: Outbox) -> None:
    try:
        drive(work, room, outbox.write)
    except _SAID_AS_THEY_ARE as error:
        outbox.end(error)
    except Exception as error:  # of any class, which the main process may not be able to load
        log.exception("the driver failed")
        outbox.end(RuntimeError(f"{type(error).__name__}: {error}"))
    else:
        outbox.end(None)
