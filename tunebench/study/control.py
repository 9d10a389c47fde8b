"""What somebody has asked of a running study, from any shell or node that sees its run directory.

The wish lies in a file of the run directory; the driver looks at it every second.
"""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path

from tunebench.study.errors import RunError
from tunebench.study.files import replacing
from tunebench.study.record import STUDY_HASH

CONTROL = "control"
_LOOK_EVERY_S = 1.0


class Wish(StrEnum):
    """What the driver is to do.

    PAUSE: every trial gives up its place at its next evaluation; the driver waits. DRAIN: nothing new starts, what
    trains goes on to its next rung or its end, then the driver ends. CANCEL: the driver ends at once and does not start
    again before it is asked to. RESUME: go on; nothing is asked.
    """

    PAUSE = "pause"
    RESUME = "resume"
    DRAIN = "drain"
    CANCEL = "cancel"


def ask(run: Path, wish: Wish) -> None:
    """Leave a wish for the driver of a run; the last one counts.

    Raises:
        RunError: no run directory, or one that cannot be written.
    """
    if not (run / STUDY_HASH).is_file():
        raise RunError(f"{run}: found no {STUDY_HASH}, allowed: a run directory written by `tunebench run`")
    try:
        if wish is Wish.RESUME:
            (run / CONTROL).unlink(missing_ok=True)
            return
        with replacing(run / CONTROL, kept_free=0) as partial:  # who cancels a run may do so for want of room
            partial.write_text(f"{wish}\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{run / CONTROL}: found {error.strerror}, allowed: a file that can be written") from error


def asked(run: Path) -> Wish:
    """What was asked of a run; RESUME where nothing was.

    Raises:
        RunError: the file holds no wish.
    """
    try:
        text = (run / CONTROL).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return Wish.RESUME
    if text not in set(Wish):
        raise RunError(f"{run / CONTROL}: found {text[:60]!r}, allowed: {', '.join(Wish)}")
    return Wish(text)


class Control:
    """A run's wish, read again at most once a second."""

    def __init__(self, run: Path) -> None:
        self._run, self._wish, self._read_at = run, Wish.RESUME, -_LOOK_EVERY_S

    def wish(self) -> Wish:
        """What is asked now."""
        now = time.monotonic()
        if now - self._read_at >= _LOOK_EVERY_S:
            self._wish, self._read_at = asked(self._run), now
        return self._wish
