"""Ends a process whose training shows no sign of life, which nothing else would notice: a call that never returns.

Such a call may hold the interpreter, so that no thread of Python could look after it. The clock is faulthandler's: a
thread without the interpreter, which writes down where every other thread stands and ends the process.
"""

from __future__ import annotations

import faulthandler
import statistics
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TextIO

STALLED = "no sign of life for"
"""Begins what is said of a process that was ended."""
_STEPS = 100
_FIRST = 4.0  # times the limit while a model is traced and compiled
_REMEMBERED = 101  # steps that the median is taken of
_ARM_EVERY_S = 1.0  # arming starts a thread, which a step of some milliseconds would feel


class Watchdog:
    """Looks after one process; it rests until the first sign of life.

    The limit is the larger of `limit_s` and 100 times the median time between two signs of life. After each `prepare`
    it is four times `limit_s` until the second step: the first traces and compiles, and tells nothing of the others.

    Args:
        limit_s: seconds; None never ends anything.
        file: takes where the threads stood when the process was ended; empty or absent as long as it lives.
    """

    def __init__(self, limit_s: float | None = None, file: Path | None = None) -> None:
        self._limit_s, self._path = limit_s, file
        self._file: TextIO | None = None
        if limit_s is not None and file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = file.open("w", encoding="utf-8")
        self._between_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._first_is_over = False
        self._seen_at: float | None = None
        self._armed_at: float | None = None

    def __enter__(self) -> Watchdog:
        """The watchdog."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop looking, and leave no empty file."""
        self.rest()
        if self._file is not None and self._path is not None:
            self._file.close()
            self._file = None
            with suppress(FileNotFoundError):
                self._path.unlink()

    @property
    def limit_s(self) -> float | None:
        """Seconds without a sign of life after which the process is ended."""
        if self._limit_s is None:
            return None
        if not self._between_s:
            return _FIRST * self._limit_s
        return max(self._limit_s, _STEPS * statistics.median(self._between_s))

    def prepare(self) -> None:
        """Other steps than those seen so far are to come, and something long before them, such as a trace."""
        self._between_s.clear()
        self._first_is_over = False
        self.rest()
        self.beat()

    def beat(self) -> None:
        """A sign of life: a step or a part of an evaluation is done."""
        now = time.monotonic()
        if self._seen_at is not None:
            if self._first_is_over:
                self._between_s.append(now - self._seen_at)
            self._first_is_over = True
        self._seen_at = now
        if self._armed_at is None or now - self._armed_at >= _ARM_EVERY_S:
            self._arm(now)

    def rest(self) -> None:
        """From now on somebody else is waited for."""
        self._seen_at = self._armed_at = None
        if self._file is not None:
            faulthandler.cancel_dump_traceback_later()

    def _arm(self, now: float) -> None:
        self._armed_at = now
        limit_s = self.limit_s
        if self._file is not None and limit_s is not None:
            faulthandler.dump_traceback_later(limit_s, file=self._file, exit=True)


def why_ended(file: Path) -> str:
    """One line about a process that its watchdog has ended; empty where it has not.

    Args:
        file: that of its `Watchdog`.
    """
    try:
        first, *_ = file.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    except FileNotFoundError:
        return ""
    lasted = first.removeprefix("Timeout (").removesuffix(")!")  # as faulthandler writes it: Timeout (0:15:00)!
    return f"{STALLED} {lasted}, see {file.name}" if first else ""
