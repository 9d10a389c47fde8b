from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from tunebench.study.record import Reason, Stage, TrialKey
from tunebench.tuning.progress import Progress


def key(index: int, optimizer: str = "adamw") -> TrialKey:
    return TrialKey(workload="ethanol", optimizer=optimizer, stage=Stage.TUNE, config_index=index, seed_index=0)


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)


def last_line(progress: Progress, screen: Console) -> str:
    """The line that leaving the view prints where no terminal is attached."""
    with progress:
        pass
    return screen.file.getvalue().splitlines()[-1]


@pytest.fixture
def screen() -> Console:
    return console(terminal=False)


@pytest.fixture
def progress(tmp_path: Path, screen: Console) -> Progress:
    """The view of four planned trials of one arm."""
    view = Progress(tmp_path, Stage.TUNE, screen)
    for index in range(4):
        view.planned(key(index), None, None)
    return view


def test_trials_are_counted_by_how_they_ended(progress: Progress, screen: Console) -> None:
    for index, reason in enumerate((Reason.FINISHED, Reason.STOPPED_ASHA, Reason.DIVERGED)):
        progress.started(key(index))
        progress.finished(key(index), reason)
    progress.started(key(3))
    line = last_line(progress, screen)
    assert "tune stage: 3 of 4 trials ended (1 stopped early, 1 failed), 1 running" in line


def test_a_trial_that_is_started_again_runs_once(progress: Progress, screen: Console) -> None:
    for _ in range(3):
        progress.started(key(0))
    assert "0 of 4 trials ended (0 stopped early, 0 failed), 1 running" in last_line(progress, screen)
    progress.finished(key(0), Reason.CRASHED)
    assert "1 of 4 trials ended (0 stopped early, 1 failed), 0 running" in last_line(progress, screen)


def test_a_process_that_fails_after_its_trial_has_ended_is_not_counted(progress: Progress, screen: Console) -> None:
    progress.started(key(0))
    progress.finished(key(0), Reason.FINISHED)
    progress.finished(key(0), Reason.CRASHED)
    assert "1 of 4 trials ended (0 stopped early, 0 failed), 0 running" in last_line(progress, screen)


def test_trials_that_ended_in_an_earlier_start_are_counted(tmp_path: Path, screen: Console) -> None:
    progress = Progress(tmp_path, Stage.TUNE, screen)
    progress.planned(key(0), Reason.FINISHED, 0.5)
    progress.planned(key(1), Reason.OOM, None)
    progress.planned(key(2), None, None)
    assert "2 of 3 trials ended (0 stopped early, 1 failed), 0 running" in last_line(progress, screen)


def test_the_view_on_a_terminal_shows_each_arm_with_its_best_objective(tmp_path: Path) -> None:
    screen = console(terminal=True)
    with Progress(tmp_path, Stage.TUNE, screen) as progress:
        for optimizer in ("adamw", "soap"):
            progress.planned(key(0, optimizer), None, None)
            progress.started(key(0, optimizer))
        for objective in (math.nan, 0.75, 0.25, 0.5, math.nan, -math.inf):
            progress.evaluated(key(0), objective)
        progress.evaluated(key(0, "soap"), math.inf)
    rows = [line.split() for line in screen.file.getvalue().splitlines() if "ethanol/" in line]
    adamw, soap = rows[-2:]
    assert ("ethanol/adamw" in adamw, "0.25" in adamw) == (True, True)
    assert "ethanol/soap" in soap
    assert not {"inf", "nan"} & {*adamw, *soap}


def test_without_a_terminal_lines_are_rare(progress: Progress, screen: Console) -> None:
    with progress:
        for _ in range(200):
            progress.evaluated(key(0), 0.5)
    assert len(screen.file.getvalue().splitlines()) == 2
