"""A running study is paused, cancelled and drained from another shell."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tuning.conftest import COMMAND, STUDY, tunebench, write_study
from tunebench.study.journal import read_trials
from tunebench.study.record import Stage

LONG = [{**STUDY["workloads"][0], "max_steps": 400, "evaluate_every_steps": 10}]
ASHA = {"grace_steps": 200, "reduction_factor": 2, "sentinels": 0}


class Driver:
    """`tunebench run` in a process of its own."""

    def __init__(self, study: Path, run: Path) -> None:
        self.run = run
        self.process = subprocess.Popen(
            [*COMMAND, "run", str(study), "--run", str(run), "--no-report"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, condition: Callable[[], object], timeout_s: float = 240.0) -> None:
        until = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < until, "it never came true"
            time.sleep(0.1)

    def end(self, timeout_s: float = 240.0) -> tuple[int, str]:
        line = self.process.communicate(timeout=timeout_s)[1]
        return self.process.returncode, line


def progress(run: Path) -> dict[str, float]:
    """Time at which each trial's checkpoint was last written."""
    return {file.parent.name: file.stat().st_mtime for file in run.glob("checkpoints/*/last.pt")}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    tune = {"trials_per_arm": 3, "asha": ASHA}
    return write_study(
        tmp_path,
        workloads=LONG,
        optimizers=["adamw"],
        tune=tune,
        confirm={"top_k": 1, "seeds": 1},
        resources={"slots": 2},
    )


def test_a_study_is_paused_resumed_cancelled_and_drained(study: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    driver = Driver(study, run)
    driver.wait_for(lambda: progress(run))
    tunebench("pause", run)
    time.sleep(3.0)
    paused = progress(run)
    time.sleep(2.0)
    assert progress(run) == paused, "a paused study trains nothing"
    assert json.loads(tunebench("status", run, "--json").stdout)["asked"] == "pause"
    tunebench("resume", run)
    driver.wait_for(lambda: progress(run) != paused)
    tunebench("cancel", run)
    code, line = driver.end()
    assert (code, "cancelled" in line) == (130, True)
    refused = tunebench("run", run, check=False)
    assert (refused.returncode, "it was cancelled" in refused.stderr) == (2, True)

    tunebench("resume", run)
    cancelled = progress(run)
    driver = Driver(study, run)
    driver.wait_for(lambda: progress(run) != cancelled)
    tunebench("drain", run)
    code, line = driver.end()
    assert (code, "drained" in line) == (130, True)
    assert any(trial.rungs for trial in read_trials(run)), "what trained went on to its rung"
    assert not any(trial.key.stage is Stage.CONFIRM for trial in read_trials(run))


def test_only_a_run_can_be_paused(tmp_path: Path) -> None:
    for verb in ("pause", "resume", "drain", "cancel"):
        done = tunebench(verb, tmp_path, check=False)
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
