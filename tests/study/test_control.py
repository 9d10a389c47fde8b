from __future__ import annotations

from pathlib import Path

import pytest

from tunebench.study.control import CONTROL, Control, Wish, ask, asked
from tunebench.study.errors import RunError
from tunebench.study.record import STUDY_HASH


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / STUDY_HASH).write_text("0" * 64)
    return tmp_path


def test_the_last_wish_counts_and_resume_takes_it_back(run: Path) -> None:
    assert asked(run) is Wish.RESUME
    for wish in (Wish.PAUSE, Wish.DRAIN, Wish.CANCEL):
        ask(run, wish)
        assert asked(run) is wish
    ask(run, Wish.RESUME)
    assert asked(run) is Wish.RESUME
    ask(run, Wish.RESUME)


def test_only_a_run_can_be_asked(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="allowed: a run directory"):
        ask(tmp_path, Wish.PAUSE)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_holds_no_wish_is_named(run: Path) -> None:
    (run / CONTROL).write_text("stop!\n")
    with pytest.raises(RunError, match="found 'stop!', allowed: pause, resume, drain, cancel"):
        asked(run)


def test_a_driver_sees_a_wish_within_a_second(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("tunebench.study.control.time.monotonic", lambda: now[0])
    control = Control(run)
    assert control.wish() is Wish.RESUME
    ask(run, Wish.DRAIN)
    assert control.wish() is Wish.RESUME
    now[0] += 1.0
    assert control.wish() is Wish.DRAIN
