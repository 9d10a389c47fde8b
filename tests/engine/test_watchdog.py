"""What ends a process that does not train any more, and what does not."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tunebench.engine.watchdog import STALLED, Watchdog, why_ended

HANGS = {
    "asleep": "time.sleep(60)",
    "with the interpreter": "ctypes.PyDLL(None).sleep(60)",  # which no thread of Python gets past
}


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
def test_a_process_that_hangs_is_ended_and_tells_where(tmp_path: Path, hang: str) -> None:
    script = (
        "import ctypes, sys, time; from pathlib import Path; from tunebench.engine.watchdog import Watchdog\n"
        "watchdog = Watchdog(0.2, Path(sys.argv[1]))\n"
        "def step():\n"
        f"    {hang}\n"
        "watchdog.beat(); watchdog.beat(); watchdog.beat(); step()\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "stalled"], timeout=50, check=False)
    assert (done.returncode, time.monotonic() - began < 45) == (1, True)
    assert "in step" in (tmp_path / "stalled").read_text()
    assert why_ended(tmp_path / "stalled").startswith(f"{STALLED} 0:00:0")


def test_a_process_that_waits_for_others_or_beats_lives_on_and_leaves_nothing(tmp_path: Path) -> None:
    with Watchdog(0.3, tmp_path / "stalled") as watchdog:
        watchdog.prepare()
        for _ in range(4):
            watchdog.beat()
            time.sleep(0.2)
        watchdog.rest()
        time.sleep(0.5)
    assert why_ended(tmp_path / "stalled") == ""
    assert not (tmp_path / "stalled").exists()


def test_the_limit_follows_the_steps_and_is_longer_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("tunebench.engine.watchdog.time.monotonic", lambda: clock[0])
    with Watchdog(900.0, tmp_path / "stalled") as watchdog:
        watchdog.prepare()
        assert watchdog.limit_s == 3600.0
        for seconds, limit_s in ((200.0, 3600.0), (1.0, 900.0), (30.0, 1550.0), (30.0, 3000.0)):
            clock[0] += seconds
            watchdog.beat()
            assert watchdog.limit_s == limit_s
        watchdog.rest()
        clock[0] += 1e6
        watchdog.beat()
        assert watchdog.limit_s == 3000.0, "a wait is no step"
        watchdog.prepare()
        assert watchdog.limit_s == 3600.0


def test_without_a_limit_nothing_is_ever_ended(tmp_path: Path) -> None:
    watchdog = Watchdog(None, tmp_path / "stalled")
    watchdog.prepare()
    assert watchdog.limit_s is None
    assert not (tmp_path / "stalled").exists()
