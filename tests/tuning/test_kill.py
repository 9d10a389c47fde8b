"""The driver is killed at random moments of both stages and started again; nothing that counts may tell.

Two kills by default; TUNEBENCH_KILLS=25 makes it 25, which takes longer than a test may: pytest --timeout 0.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.tuning.conftest import ended, killed, ranking_of, tunebench, write_study
from tests.tuning.test_pool import COHORT, TENANT, Driver
from tunebench.engine.checkpoints import checkpoint_folder, load_checkpoint
from tunebench.study.journal import read_trials
from tunebench.study.record import CURVES, JOURNAL, SHORTER_CURVES, Stage
from tunebench.study.status import run_status

KILLS = int(os.environ.get("TUNEBENCH_KILLS", "2"))
PER_RUN = 5  # the study is small: after some kills more it has ended


def decisions(run: Path) -> dict[str, Any]:
    """Configuration, seeds, end and decisions of every trial; values are left out."""
    return {
        trial.key.trial_id: (
            trial.reason,
            trial.params,
            trial.seeds,
            trial.sentinel,
            trial.ledger["steps"],
            [(d["rung"], d["competitors"], d["goes_on"], d["sentinel"]) for d in trial.decisions],
        )
        for trial in read_trials(run)
    }


def order_of_arms(run: Path) -> list[Any]:
    """What the report concludes: ranks and verdicts, without the numbers."""
    return [
        [workload["decision"]["verdict"], [(arm["optimizer"], arm["rank"]) for arm in workload["arms"]]]
        for workload in ranking_of(run)["workloads"]
    ]


def curves_of(run: Path, trial: str) -> pd.DataFrame:
    """What was measured of a trial, at all its horizons."""
    name = trial.partition(".h")[0]
    shorter = (run / SHORTER_CURVES).glob(f"{name}.h*.parquet")
    return pd.concat([pd.read_parquet(file) for file in (run / CURVES / f"{name}.parquet", *shorter)])


def paid(run: Path) -> dict[str, pd.DataFrame]:
    """By trial, the part of its curve that nobody may have to pay again: that up to its checkpoint, or to its end."""
    finished, parts = (
        ended(run),
        {file.stem: pd.read_parquet(file) for file in (run / SHORTER_CURVES).glob("*.parquet")},
    )
    for file in (run / CURVES).glob("*.parquet"):
        curve = pd.read_parquet(file)
        checkpoint = load_checkpoint(checkpoint_folder(run, file.stem))
        kept = json.loads(checkpoint["evaluation"])["step"] if checkpoint else 0
        parts[file.stem] = curve if file.stem in finished else curve[curve.step <= kept]
    return parts


def moments(reference: Path, kills: int, draw: np.random.Generator) -> list[int]:
    """Sizes of the journal at which the driver is killed, ascending, in both stages."""
    lines = (reference / JOURNAL).read_bytes().splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines])
    planned = max(i for i, line in enumerate(lines) if f'"{Stage.TUNE}"'.encode() in line and b'"seeds"' in line)
    confirmed = min(i for i, line in enumerate(lines) if f'"{Stage.CONFIRM}"'.encode() in line)
    early, late = (kills + 1) // 2, kills // 2
    stages = ((ends[planned], ends[confirmed], early), (ends[confirmed], int(0.95 * ends[-1]), late))
    return sorted(int(size) for low, high, count in stages for size in draw.integers(low, high, size=count))


def kill_once(study: Path, run: Path, size: int, delay_s: float) -> None:
    """Start the study and kill its driver a moment after the journal has reached a size."""
    journal = run / JOURNAL
    began = journal.stat().st_size if journal.exists() else 0

    def now() -> bool:
        there = journal.exists() and journal.stat().st_size >= max(size, began + 1)
        if there:
            time.sleep(delay_s)
        return there

    assert killed(["run", study, "--run", run], now, signal.SIGKILL) == -signal.SIGKILL


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms of three trials, one of them a sentinel, two at a time: few processes, so that starts are quick."""
    asha = {"grace_steps": 3, "reduction_factor": 2, "sentinels": 1}
    return write_study(
        tmp_path_factory.mktemp("study"),
        tune={"trials_per_arm": 3, "asha": asha},
        confirm={"top_k": 1, "seeds": 1},
        resources={"concurrent_trials": 2, "slots": 2, "cpus_per_trial": os.cpu_count()},
    )


@pytest.fixture(scope="module")
def whole(study: Path) -> Path:
    """The study run without interruption."""
    tunebench("run", study, "--run", study.parent / "whole")
    return study.parent / "whole"


@pytest.fixture(scope="module")
def survivors(study: Path, whole: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs of the same study, killed again and again, each beside copies of what it had paid for at its kills."""
    draw = np.random.default_rng(1)
    runs: list[Path] = []
    kills = 0
    while kills < KILLS:
        folder = tmp_path_factory.mktemp("killed")
        runs.append(run := folder / "run")
        for size in moments(whole, min(KILLS - kills, PER_RUN), draw):
            if (run / JOURNAL).exists() and run_status(run)["finished"]:
                break  # the last kill came while the report was written
            kill_once(study, run, size, float(draw.uniform(0.0, 0.4)))
            left_out = shutil.ignore_patterns(".tune", "tensorboard", "logs")
            shutil.copytree(run, folder / f"after-{kills:02d}", ignore=left_out)
            kills += 1
        tunebench("run", study, "--run", run)
    return runs


def test_decisions_and_survivors_are_those_of_an_uninterrupted_run(survivors: list[Path], whole: Path) -> None:
    uninterrupted = {trial.key.trial_id: trial for trial in read_trials(whole)}
    for survivor in survivors:
        assert decisions(survivor) == decisions(whole)
        for trial in read_trials(survivor):
            assert trial.rungs == pytest.approx(uninterrupted[trial.key.trial_id].rungs, rel=1e-3)


def test_the_ranking_is_that_of_an_uninterrupted_run(survivors: list[Path], whole: Path) -> None:
    uninterrupted = {trial.key.trial_id: trial for trial in read_trials(whole)}
    for survivor in survivors:
        assert order_of_arms(survivor) == order_of_arms(whole)
        for trial in read_trials(survivor):
            if trial.key.stage is Stage.CONFIRM:
                assert trial.value == pytest.approx(uninterrupted[trial.key.trial_id].value, rel=1e-3)


def test_a_killed_cohort_and_a_killed_trial_change_no_decision(study: Path, whole: Path, tmp_path: Path) -> None:
    driver = Driver(study, tmp_path / "run", tmp_path)
    try:
        driver.wait(driver.trains)
        for name in (COHORT, TENANT):
            driver.wait(lambda name=name: driver.processes(name))
            os.kill(driver.processes(name)[0], signal.SIGKILL)
        assert driver.finish() == 0
    finally:
        driver.end()
    assert decisions(driver.run) == decisions(whole)


def test_no_step_up_to_a_checkpoint_is_paid_twice(survivors: list[Path]) -> None:
    kills = [kill for survivor in survivors for kill in sorted(survivor.parent.glob("after-*"))]
    assert len(kills) == KILLS
    compared = 0
    for kill in kills:
        for trial, before in paid(kill).items():
            after = curves_of(kill.parent / "run", trial)
            merged = before.merge(after, how="left", indicator=True)  # wall_s and device_s tell a repeated step
            assert (merged["_merge"] == "both").all(), f"{trial} after {kill.name}"
            compared += len(before)
    assert compared
