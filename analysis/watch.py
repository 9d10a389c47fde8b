"""Write a run's report anew whenever its journal has grown, until the run is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from analysis.load import load
from analysis.ranking import Ranking, rank
from analysis.report import write_pages
from tunebench.study.record import JOURNAL, REPORT

EVERY_S = 30


def watch(
    folder: Path, out: Path | None = None, every_s: int = EVERY_S, wait: Callable[[float], None] = time.sleep
) -> Iterator[tuple[Ranking, Path]]:
    """Yield ranking and page after every report; the last one is that of the finished run.

    The page of a run that goes on tells browsers to read it anew after `every_s`; it takes the place of the page before
    at once, so no reader sees half of it.

    Args:
        folder: the run directory.
        out: folder of the report; left out, RUN/report.
        every_s: seconds between two looks at the journal.
        wait: passes that time.

    Raises:
        RunError: there is no run in `folder`, or its journal cannot be read.
        StudyError: its study is not valid, or was edited after the start.
        OSError: the report cannot be written.
    """
    out = out or folder / REPORT
    seen = -1
    while True:
        journal = folder / JOURNAL
        size = journal.stat().st_size if journal.is_file() else 0  # the analysis says what is missing
        if size != seen:
            seen = size
            run = load(folder)
            ranking = rank(run)
            written = write_pages(run, ranking, out, refresh_s=None if ranking.finished else every_s)
            yield ranking, written.page
            if ranking.finished:
                return
        wait(every_s)
