"""A limit on the time that one property of one model may take, kept by ending the process that computes it.

A calculation that never returns may hold the interpreter, so that no thread of Python could end it. The clock is
faulthandler's: a thread without the interpreter, which writes down where every other thread stands and ends the
process. Whoever computes the model next finds that file and counts the property as failed.
"""

from __future__ import annotations

import faulthandler
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tunebench.properties.measured import PropertyFailure
from tunebench.study.record import PROPERTIES

_log = logging.getLogger(__name__)

_RUNNING = "running"


@dataclass(frozen=True, kw_only=True)
class RunningEntry:
    """An entry that a process has begun.

    Attributes:
        seconds: since then.
        ended: its clock has ended the process, and nobody has recorded that yet.
    """

    model: str
    entry: str
    seconds: float
    ended: bool


def running_entries(run: Path) -> list[RunningEntry]:
    """Entries that are being computed, the longest first; a process that was killed from outside leaves its own."""
    found = []
    for file in (run / PROPERTIES / _RUNNING).glob("*/*"):
        try:
            state = file.stat()
        except FileNotFoundError:
            continue  # done meanwhile
        seconds = max(time.time() - state.st_mtime, 0.0)
        found.append(RunningEntry(model=file.parent.name, entry=file.name, seconds=seconds, ended=state.st_size > 0))
    return sorted(found, key=lambda one: -one.seconds)


def ended_by_clock(run: Path, model: str) -> bool:
    """Whether the clock has ended the process that computed a model, and nobody has recorded that yet."""
    return any(one.ended for one in running_entries(run) if one.model == model)


@dataclass(frozen=True, kw_only=True)
class EntryClock:
    """The clock of one model's properties; it ends the process in which an entry takes too long.

    Attributes:
        run: the run directory.
        model: name.
    """

    run: Path
    model: str

    @contextmanager
    def over(self, entry: str, limit_s: float | None) -> Iterator[None]:
        """Run while a block computes an entry; None sets no limit."""
        file = self._file(entry)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w", encoding="utf-8") as stands:
            if limit_s is not None:
                faulthandler.dump_traceback_later(limit_s, exit=True, file=stands)
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()
                self.forget(entry)

    def overrun(self, entry: str, limit_s: float | None) -> PropertyFailure | None:
        """The failure of an entry over which an earlier process was ended; None of every other one."""
        file = self._file(entry)
        stood = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        if limit_s is None or not stood:
            return None
        _log.warning("%s: the process was ended after %g s\n%s", entry, limit_s, stood)
        return PropertyFailure(f"took longer than {limit_s:g} s, the time_limit_s of its section")

    def forget(self, entry: str) -> None:
        """The entry is done, or its failure recorded."""
        self._file(entry).unlink(missing_ok=True)

    def _file(self, entry: str) -> Path:
        """Empty while the entry is computed; where the threads stood, once the process has been ended over it."""
        return self.run / PROPERTIES / _RUNNING / self.model / entry
