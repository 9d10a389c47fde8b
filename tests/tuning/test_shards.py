"""A study that several drivers share comes to what one driver comes to, though one of them is killed on the way."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.tuning.conftest import TRIALS, ended
from tests.tuning.driver import RECEPTION, Driver
from tests.tuning.test_kill import curves_of, decisions, order_of_arms, paid, trains_beyond
from tunebench.cli import DONE, run_command
from tunebench.study.journal import read_trials
from tunebench.tuning.driver import TUNE
from tunebench.tuning.trial_log import LOGS

SHARD = "ray::Shard"


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A run by two drivers, of which one was killed, that three were to bring to its end; there are two arms.

    Attributes:
        code, said: of the first start. kept: the run as that left it. left: its processes that outlived it.
        drivers: processes of both starts.
    """

    run: Path
    code: int
    said: str
    kept: Path
    left: list[int]
    drivers: list[int]


@pytest.fixture(scope="module")
def shared(finished_study: Path, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    run = tmp_path_factory.mktemp("shared") / "run"
    first = Driver(finished_study, run, "--drivers", "2")
    try:
        first.wait(lambda: trains_beyond(first, 6))
        drivers = [len(first.processes(SHARD))]
        os.kill(first.processes(SHARD)[0], signal.SIGKILL)
        code, said = first.finish(120.0)
        left = [process for kind in (SHARD, RECEPTION) for process in first.processes(kind)]
        kept = run.with_name("kept")
        shutil.copytree(run, kept, ignore=shutil.ignore_patterns(TUNE, "tensorboard", LOGS))
        second = Driver(run, run, "--drivers", "3")
        try:
            second.wait(lambda: len(second.processes(SHARD)) == 2)
            drivers.append(len(second.processes(SHARD)))
            assert second.finish()[0] == 0
        finally:
            second.end()
    finally:
        first.end()
    assert run_command(["report", str(run)]) == DONE
    return Shared(run=run, code=code, said=said, kept=kept, left=left, drivers=drivers)


def test_a_driver_that_dies_ends_the_run_with_one_line(shared: Shared) -> None:
    assert shared.code == 1
    line = shared.said.strip().splitlines()[-1]
    assert "the process of driver" in line
    assert line.endswith("of 2 has died; run again to go on")
    assert shared.left == []
    assert len(ended(shared.kept)) < TRIALS


def test_decisions_survivors_and_ranking_are_those_of_one_driver(shared: Shared, finished_run: Path) -> None:
    assert shared.drivers == [2, 2], "arms are not split"
    assert decisions(shared.run) == decisions(finished_run)
    assert order_of_arms(shared.run) == order_of_arms(finished_run)
    one = {trial.key.trial_id: trial.rungs for trial in read_trials(finished_run)}
    for trial in read_trials(shared.run):
        assert trial.rungs == pytest.approx(one[trial.key.trial_id], rel=1e-3)


def test_nothing_that_was_paid_is_paid_again(shared: Shared) -> None:
    after, before = ended(shared.run), ended(shared.kept)
    assert all(after[name] == trial for name, trial in before.items())
    compared = 0
    for trial, part in paid(shared.kept).items():
        merged = part.merge(curves_of(shared.run, trial), how="left", indicator=True)
        assert (merged["_merge"] == "both").all(), trial
        compared += len(part)
    assert compared


def test_nothing_is_left_of_tune_and_each_driver_has_its_log(shared: Shared) -> None:
    assert not (shared.run / TUNE).exists()
    assert {f"driver-{number}.log" for number in (1, 2)} <= {file.name for file in (shared.run / LOGS).iterdir()}
