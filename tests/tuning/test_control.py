"""A running study is paused, cancelled and drained from another shell."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.tuning.conftest import STUDY, tunebench, write_study
from tests.tuning.driver import Driver
from tunebench.study.journal import read_trials
from tunebench.study.record import Stage

LONG = [{**STUDY["workloads"][0], "max_steps": 300, "evaluate_every_steps": 10}]
ASHA = {"grace_steps": 150, "reduction_factor": 2, "sentinels": 0}


@pytest.fixture
def study(tmp_path: Path) -> Path:
    tune = {"trials_per_arm": 3, "asha": ASHA}
    return write_study(
        tmp_path,
        workloads=LONG,
        optimizers=["adamw"],
        tune=tune,
        confirm={"top_k": 1, "seeds": 1},
        resources={"slots": 2, "concurrent_trials": 2, "cpus_per_trial": os.cpu_count()},
    )


@pytest.fixture
def drive(study: Path, tmp_path: Path) -> Iterator[Callable[[], Driver]]:
    """Starts a driver of the study; none outlives the test."""
    drivers: list[Driver] = []

    def start() -> Driver:
        drivers.append(Driver(study, tmp_path / "run"))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.end()


def cpu_s(process: int) -> float:
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_study_is_paused_resumed_cancelled_and_drained(drive: Callable[[], Driver], tmp_path: Path) -> None:
    run = tmp_path / "run"
    driver = drive()
    driver.wait(driver.saved)
    tunebench("pause", run)

    def all_are_held() -> bool:
        saved = driver.saved()
        time.sleep(15.0)
        return driver.saved() == saved  # each that has begun comes as far as its next evaluation

    driver.wait(all_are_held)
    paused, computed_s = driver.saved(), cpu_s(driver.process.pid)
    time.sleep(4.0)
    assert driver.process.poll() is None
    assert driver.saved() == paused, "a paused study trains nothing"
    assert cpu_s(driver.process.pid) - computed_s < 2.0, "and computes next to nothing"
    assert json.loads(tunebench("status", run, "--json").stdout)["asked"] == "pause"
    tunebench("resume", run)
    driver.wait(lambda: driver.saved() != paused)
    tunebench("cancel", run)
    code, said = driver.finish()
    assert (code, "cancelled" in said.splitlines()[-1]) == (130, True)
    refused = tunebench("run", run, check=False)
    assert (refused.returncode, "it was cancelled" in refused.stderr) == (2, True)

    tunebench("resume", run)
    driver = drive()
    cancelled = driver.saved()
    driver.wait(lambda: driver.saved() != cancelled)
    tunebench("drain", run)
    code, said = driver.finish()
    assert (code, "drained" in said.splitlines()[-1]) == (130, True)
    assert any(trial.rungs for trial in read_trials(run)), "what trained went on to its rung"
    assert not any(trial.key.stage is Stage.CONFIRM for trial in read_trials(run))


def test_only_a_run_can_be_paused(tmp_path: Path) -> None:
    for verb in ("pause", "resume", "drain", "cancel"):
        done = tunebench(verb, tmp_path, check=False)
        assert (done.returncode, len(done.stderr.strip().splitlines())) == (2, 1)
