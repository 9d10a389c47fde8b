"""What the driver of a run waits for or works at while no trial trains, for `tunebench status`.

It lies in a file of the run directory: the journal, which tells of trials, has none to tell of yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tunebench.study.files import replacing

NOTICE = "notice"


@contextmanager
def posting(run: Path) -> Iterator[Callable[[str], None]]:
    """Takes one line after the other, each in place of the one before; none is left at the end."""

    def post(line: str) -> None:
        if posted(run) != line:
            with replacing(run / NOTICE) as partial:
                partial.write_text(f"{line}\n", encoding="utf-8")

    try:
        yield post
    finally:
        take_down(run)


def posted(run: Path) -> str:
    """The line that the driver of a run has posted last, empty where there is none."""
    try:
        return (run / NOTICE).read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return ""


def take_down(run: Path) -> None:
    """Remove what a driver has posted that was killed."""
    (run / NOTICE).unlink(missing_ok=True)
