from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.distributions import FloatDistribution

from tests.tuning.conftest import write_study
from tunebench.cli import BAD_INPUT, DONE, run_command
from tunebench.study.journal import JournalWriter
from tunebench.study.lock import LOCK
from tunebench.study.record import Stage, TrialKey
from tunebench.study.resolve import load_run, resolve
from tunebench.study.step_times import CALIBRATION, add_tables, read_calibration
from tunebench.tuning.calibration import searched_by_arm

QUICK = ("--rounds", "2", "--seconds", "0.01")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a study of the lightning engine that nobody has run, calibrated."""
    threads = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("calibrated")
    optimizers = ["adamw", {"name": "soap", "fixed": {"fctp_view": "flat"}}]
    study = write_study(folder, engine="lightning", optimizers=optimizers)
    assert run_command(["calibrate", str(study), "--run", str(folder / "run"), *QUICK]) == DONE
    torch.set_num_threads(threads)
    return folder / "run"


def test_settings_are_those_of_the_runs_trials(tmp_path: Path) -> None:
    assert searched_by_arm(tmp_path) == {}
    journal = JournalWriter(tmp_path)
    journal.add_arm("w/adamw", {})
    for index, rate in enumerate((0.01, 0.1)):
        key = TrialKey(workload="w", optimizer="adamw", stage=Stage.TUNE, config_index=index, seed_index=0)
        journal.plan(key, {"learning_rate": rate}, {"learning_rate": FloatDistribution(0.001, 1.0)}, {})
    assert searched_by_arm(tmp_path) == {"w/adamw": [{"learning_rate": 0.01}, {"learning_rate": 0.1}]}


def content_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / CALIBRATION).read_text(encoding="utf-8"))
    return content


def table(run: Path) -> dict[str, Any]:
    (only,) = content_of(run)["tables"]
    assert isinstance(only, dict)
    return only


def test_calibrating_a_study_freezes_it_in_its_run_directory_beside_the_table(calibrated: Path) -> None:
    assert load_run(calibrated).hash == resolve(calibrated.parent / "study.yaml").hash
    content = table(calibrated)
    assert content_of(calibrated)["study_hash"] == load_run(calibrated).hash
    assert [(step["optimizer"], step["engine"], step["refresh"] is None) for step in content["steps"]] == [
        ("adamw", "lightning", True),
        ("soap", "lightning", False),
    ]
    for step in content["steps"]:
        for timed in filter(None, (step["plain"], step["refresh"])):
            assert len(timed["rounds_s"]) == content["rounds"] == 2
            assert 0 < timed["low_s"] <= timed["median_s"] <= timed["high_s"]


def test_a_second_calibration_replaces_the_table_of_its_device_and_keeps_others(
    calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = load_run(calibrated)
    first = read_calibration(calibrated, resolved.hash)
    assert first is not None
    (old,) = first.tables
    add_tables(calibrated, resolved.hash, [old.model_copy(update={"date": "2001-01-01T00:00:00+00:00"})])
    other = old.model_copy(update={"kind": "cuda", "device": "NVIDIA H200"})
    add_tables(calibrated, resolved.hash, [other])
    assert run_command(["calibrate", str(calibrated), "--json", *QUICK]) == DONE
    printed = json.loads(capsys.readouterr().out)
    assert printed == {"file": str(calibrated / CALIBRATION), **content_of(calibrated)}
    second, kept = content_of(calibrated)["tables"]
    assert kept == other.model_dump(mode="json")
    assert second["date"] > "2020"
    assert second["steps"][0]["plain"]["rounds_s"] != list(old.steps[0].plain.rounds_s)


def test_a_run_that_somebody_works_on_is_not_calibrated(calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (calibrated / CALIBRATION).read_bytes()
    with (calibrated / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_command(["calibrate", str(calibrated), *QUICK]) == BAD_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is working on it" in line
    assert (calibrated / CALIBRATION).read_bytes() == before


@pytest.mark.parametrize("arguments", [["nowhere"], ["nowhere.yaml"], [".", "--rounds", "0"]])
def test_bad_input_is_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(["calibrate", *arguments]) == BAD_INPUT
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
