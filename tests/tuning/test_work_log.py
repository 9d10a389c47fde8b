from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tunebench.tuning.trial_log import log_to
from tunebench.tuning.work_log import WorkLog, on_gpu, read_work


class Hours:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_work_is_told_at_once_then_every_few_seconds_and_at_its_end() -> None:
    clock, lines = Hours(), list[str]()
    work = WorkLog(lines.append, clock)
    for now in (4.0, 8.0, 12.0, 16.0):
        clock.now = now
        work.worked(3.0, 100, evaluating_s=0.5, writing_s=0.25)
        work.obeyed(0.125)
    clock.now = 17.0
    work.rest()
    work.rest()
    assert lines == [
        "worked 2.750 of 3.000 s (evaluations 0.500 s), files 0.250 s, orders 0.000 s, 100 trial-steps",
        "worked 8.250 of 12.000 s (evaluations 1.500 s), files 0.750 s, orders 0.375 s, 300 trial-steps",
    ]


def test_a_rest_is_on_no_line() -> None:
    clock, lines = Hours(), list[str]()
    work = WorkLog(lines.append, clock)
    for now in (4.0, 1000.0):
        clock.now = now
        work.worked(3.0, 100)
        work.rest()
        work.obeyed(2.0)
    told = "worked 3.000 of 3.000 s (evaluations 0.000 s), files 0.000 s, orders 0.000 s, 100 trial-steps"
    assert lines == [told] * 2


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = tmp_path / "cohort-3.log"
    with log_to(file):
        WorkLog().worked(2.5, 64, evaluating_s=1.0, writing_s=0.5)
    gpu, (line,) = read_work(file)
    assert (gpu, line.worked_s, line.evaluating_s, line.writing_s, line.trial_steps) == (None, 2.0, 1.0, 0.5, 64)
    assert line.ended - line.began == timedelta(seconds=2.5)


@pytest.mark.parametrize("index", ["0", "7", "GPU-1c7f2f3e"])
def test_a_cohort_names_its_gpu(tmp_path: Path, index: str) -> None:
    file = tmp_path / "cohort-0.log"
    file.write_text(f"2026-11-23 01:00:00,000 WARNING a: {on_gpu(0, index)}\n")
    assert read_work(file) == (index, [])
