"""The driver is interrupted, killed at random moments of both stages and started again; nothing that counts may tell.

Two kills by default; TUNEBENCH_KILLS=25 makes it 25, which takes longer than a test may: pytest --timeout 0.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.tuning.conftest import TRIALS, ended, ranking_of, tunebench
from tests.tuning.driver import COHORT, KINDS, RECEPTION, Driver
from tunebench.engine.checkpoints import checkpoint_folder, load_checkpoint
from tunebench.study.journal import read_trials
from tunebench.study.record import CURVES, JOURNAL, SHORTER_CURVES, Reason, Stage
from tunebench.study.status import run_status
from tunebench.tuning.trial_log import LOGS

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


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A start of the study that a signal ended.

    Attributes:
        code: exit code of the driver.
        alive: which kinds of its processes were there before.
        left: which of them were still there a minute after.
        kept: the run as it was left.
    """

    how: signal.Signals
    code: int
    alive: set[str]
    left: set[str]
    kept: Path


@dataclass(frozen=True, kw_only=True)
class Survivor:
    """A run that was stopped again and again, and then brought to its end."""

    run: Path
    stops: list[Stop] = field(default_factory=list)

    def kills(self) -> int:
        return sum(stop.how is signal.SIGKILL for stop in self.stops)


def moments(reference: Path, kills: int, draw: np.random.Generator) -> list[int]:
    """Sizes of the journal at which the driver is killed, ascending, in both stages."""
    lines = (reference / JOURNAL).read_bytes().splitlines(keepends=True)
    ends = np.cumsum([len(line) for line in lines])
    planned = max(i for i, line in enumerate(lines) if f'"{Stage.TUNE}"'.encode() in line and b'"seeds"' in line)
    confirmed = min(i for i, line in enumerate(lines) if f'"{Stage.CONFIRM}"'.encode() in line)
    last = ends[confirmed] + int(0.8 * (ends[-1] - ends[confirmed]))  # at the very end the kill may come too late
    early, late = (kills + 1) // 2, kills // 2
    stages = ((ends[planned], ends[confirmed], early), (ends[confirmed], last, late))
    return sorted(int(size) for low, high, count in stages for size in draw.integers(low, high, size=count))


def stop_once(
    study: Path, run: Path, how: signal.Signals, when: Callable[[Driver], object], delay_s: float = 0.0
) -> Stop:
    """Start the study, and end its driver by a signal a moment after something became true."""
    driver = Driver(run if (run / JOURNAL).exists() else study, run)
    try:
        driver.wait(lambda: when(driver))
        time.sleep(delay_s)
        alive = driver.kinds()
        driver.process.send_signal(how)
        driver.process.communicate(timeout=120)
        until = time.monotonic() + 60.0  # Ray's own agents may wait for their dead server a little longer
        while (left := driver.kinds()) and time.monotonic() < until:
            time.sleep(0.2)
        kept = run.with_name(f"after-{len(list(run.parent.glob('after-*'))):02d}")
        shutil.copytree(run, kept, ignore=shutil.ignore_patterns(".tune", "tensorboard", "logs"))
        return Stop(how=how, code=driver.process.returncode, alive=alive, left=left, kept=kept)
    finally:
        driver.end()


def interrupts(study: Path, run: Path) -> Iterator[Stop]:
    """A termination while trials train, and an interrupt when some have ended and others have not."""
    yield stop_once(study, run, signal.SIGTERM, lambda driver: driver.saved() and driver.kinds() == KINDS)
    yield stop_once(study, run, signal.SIGINT, lambda driver: ended(run) and driver.kinds() == KINDS)


def kill(study: Path, run: Path, size: int, delay_s: float) -> Stop:
    """Kill the driver after it has written to the journal and that has reached a size."""
    journal = run / JOURNAL
    size = max(size, journal.stat().st_size + 1 if journal.exists() else 1)
    return stop_once(study, run, signal.SIGKILL, lambda _: journal.exists() and journal.stat().st_size >= size, delay_s)


@pytest.fixture(scope="module")
def survivors(finished_study: Path, finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Survivor]:
    """Runs of one study that were killed again and again; the first one was interrupted before that."""
    draw = np.random.default_rng(1)
    found: list[Survivor] = []
    while (missing := KILLS - sum(survivor.kills() for survivor in found)) > 0:
        run = tmp_path_factory.mktemp("stopped") / "run"
        found.append(survivor := Survivor(run=run))
        survivor.stops.extend(interrupts(finished_study, run) if len(found) == 1 else [])
        for size in moments(finished_run, min(missing, PER_RUN), draw):
            if (run / JOURNAL).exists() and run_status(run)["finished"]:
                break  # the last kill came while Tune closed the study
            survivor.stops.append(kill(finished_study, run, size, float(draw.uniform(0.0, 0.4))))
        tunebench("run", run)
    return found


def test_decisions_and_survivors_are_those_of_an_uninterrupted_run(
    survivors: list[Survivor], finished_run: Path
) -> None:
    uninterrupted = {trial.key.trial_id: trial for trial in read_trials(finished_run)}
    assert {trial.sentinel for trial in uninterrupted.values()} == {True, False}
    for survivor in survivors:
        assert decisions(survivor.run) == decisions(finished_run)
        for trial in read_trials(survivor.run):
            assert trial.rungs == pytest.approx(uninterrupted[trial.key.trial_id].rungs, rel=1e-3)


def test_the_ranking_is_that_of_an_uninterrupted_run(survivors: list[Survivor], finished_run: Path) -> None:
    uninterrupted = {trial.key.trial_id: trial for trial in read_trials(finished_run)}
    for survivor in survivors:
        assert ranking_of(survivor.run)["finished"] is True
        assert order_of_arms(survivor.run) == order_of_arms(finished_run)
        for trial in read_trials(survivor.run):
            if trial.key.stage is Stage.CONFIRM:
                assert trial.value == pytest.approx(uninterrupted[trial.key.trial_id].value, rel=1e-3)


def test_no_finished_trial_is_repeated(survivors: list[Survivor]) -> None:
    seen = set()
    for survivor in survivors:
        after = ended(survivor.run)
        assert len(after) == TRIALS
        for stop in survivor.stops:
            before = ended(stop.kept)
            assert all(after[name] == trial for name, trial in before.items()), stop.kept.name
            seen.add(len(before))
    assert any(2 <= count < TRIALS for count in seen), "some trials had ended, and others had not"


def test_no_step_up_to_a_checkpoint_is_paid_twice(survivors: list[Survivor]) -> None:
    compared = 0
    for survivor in survivors:
        for stop in survivor.stops:
            for trial, before in paid(stop.kept).items():
                after = curves_of(survivor.run, trial)
                merged = before.merge(after, how="left", indicator=True)  # wall_s and device_s tell a repeated step
                assert (merged["_merge"] == "both").all(), f"{trial} after {stop.kept.name}"
                compared += len(before)
    assert sum(survivor.kills() for survivor in survivors) == KILLS
    assert compared


def test_everything_ends_with_the_driver_however_that_ends(survivors: list[Survivor]) -> None:
    stops = [stop for survivor in survivors for stop in survivor.stops]
    for stop in stops:
        assert stop.code == (-signal.SIGKILL if stop.how is signal.SIGKILL else 130)
        assert stop.left == set(), f"still there a minute after {stop.how.name}"
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        assert KINDS in [stop.alive for stop in stops if stop.how is how], how.name


def test_an_interrupted_run_has_a_status_and_a_report_that_say_so(survivors: list[Survivor]) -> None:
    (kept,) = (stop.kept for stop in survivors[0].stops if stop.how is signal.SIGINT)
    assert json.loads(tunebench("status", kept, "--json").stdout)["finished"] is False
    tunebench("report", kept)
    assert ranking_of(kept)["finished"] is False


class TestKilledWorkers:
    """A run whose cohort was killed while trials trained beyond a rung, and later the process of all tenants."""

    @pytest.fixture(scope="class")
    def run(self, finished_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        driver = Driver(finished_study, tmp_path_factory.mktemp("bereft") / "run")
        try:
            driver.wait(lambda: trains_beyond(driver, 12))
            (reception,) = driver.processes(RECEPTION)
            assert "libtorch" not in Path(f"/proc/{reception}/maps").read_text()
            os.kill(driver.processes(COHORT)[0], signal.SIGKILL)
            killed_at = time.time()
            driver.wait(lambda: max(driver.saved().values(), default=0.0) > killed_at)
            os.kill(reception, signal.SIGKILL)
            assert driver.finish()[0] == 0
        finally:
            driver.end()
        return driver.run

    def test_they_change_no_decision(self, run: Path, finished_run: Path) -> None:
        assert decisions(run) == decisions(finished_run)
        assert {trial.engine for trial in read_trials(run)} == {"cohort"}

    def test_trials_of_a_killed_cohort_come_back(self, run: Path, finished_run: Path) -> None:
        assert [log for log in (run / LOGS).glob("*.tune.*.log") if "its cohort is gone" in log.read_text()]
        before = {trial.key.trial_id: trial.ledger["attempts"] for trial in read_trials(finished_run)}
        more = [trial.ledger["attempts"] - before[trial.key.trial_id] for trial in read_trials(run)]
        assert max(more) <= 2, "once for the cohort, once for the process of the tenants"

    def test_tenants_whose_process_was_killed_come_back(self, run: Path) -> None:
        assert "class_name: Reception" in (run / LOGS / "driver.log").read_text()
        assert {trial.reason for trial in read_trials(run)} == {Reason.FINISHED, Reason.STOPPED_ASHA}


def trains_beyond(driver: Driver, rung: int) -> bool:
    """Whether a trial has written a checkpoint since it went on from a rung."""
    files = driver.run.glob(f"{SHORTER_CURVES}/*.h{rung}.parquet")
    begun = {file.name.partition(".h")[0]: file.stat().st_mtime for file in files}
    return any(saved_at > begun.get(trial, math.inf) for trial, saved_at in driver.saved().items())
