from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.analysis.synthetic_run import Plan, write_run
from tests.study.broken_studies import BROKEN, BrokenStudy
from tunebench.cli import BAD_INPUT, DONE, run_command
from tunebench.study.journal import read_trials


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.id)
def test_a_broken_study_ends_in_one_line_that_names_the_key(
    broken: BrokenStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = broken.write(tmp_path)
    assert run_command(["plan", str(file), "--no-measure"]) == BAD_INPUT
    captured = capsys.readouterr()
    *progress, line = captured.err.strip().splitlines()
    assert not progress or broken.needs_data
    assert line.startswith("tunebench: ")
    assert broken.reported_in in line
    assert broken.key in line
    assert captured.out == ""


def test_there_are_at_least_forty_broken_studies():
    assert len({broken.id for broken in BROKEN}) >= 40


def test_the_installed_command_reports_bad_input_without_a_traceback(tmp_path: Path):
    study = tmp_path / "study.yaml"
    study.write_text("name: x\nworkloadz: []\n")
    command = [str(Path(sys.executable).parent / "tunebench"), "run", str(study)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == BAD_INPUT
    assert len(done.stderr.strip().splitlines()) == 1
    assert "workloadz" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "nowhere.yaml"],
        ["status", "nowhere"],
        ["explain", "x", "nowhere"],
        ["report", "nowhere"],
        ["fly"],
        ["plan"],
    ],
)
def test_what_is_not_there_is_bad_input_in_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert run_command(arguments) == BAD_INPUT
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_schema_prints_json_schema(capsys: pytest.CaptureFixture[str]):
    assert run_command(["schema"]) == DONE
    assert "workloads" in json.loads(capsys.readouterr().out)["properties"]


@pytest.fixture(scope="module")
def synthetic_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "run"
    write_run(folder, Plan(arms={"adamw": [0.09, 0.1, 0.11], "soap": [0.07, 0.08, float("inf")]}))
    return folder


def test_status_counts_what_the_journal_holds(synthetic_run: Path, capsys: pytest.CaptureFixture[str]):
    assert run_command(["status", str(synthetic_run), "--json"]) == DONE
    status = json.loads(capsys.readouterr().out)
    trials = read_trials(synthetic_run)
    assert status["trials"] == len(trials)
    assert sum(arm["FINISHED"] for arm in status["arms"]) == sum(trial.state == "COMPLETE" for trial in trials)
    assert run_command(["status", str(synthetic_run)]) == DONE
    assert trials[0].key.arm in capsys.readouterr().out


def test_explain_says_why_each_trial_ended(synthetic_run: Path, capsys: pytest.CaptureFixture[str]):
    for trial in read_trials(synthetic_run)[:6]:
        assert run_command(["explain", trial.key.trial_id, str(synthetic_run), "--json"]) == DONE
        told = json.loads(capsys.readouterr().out)
        assert told["reason"] == trial.reason
        assert trial.key.trial_id in told["text"]


def test_explain_refuses_an_ambiguous_trial(synthetic_run: Path, capsys: pytest.CaptureFixture[str]):
    assert run_command(["explain", "", str(synthetic_run)]) == BAD_INPUT
    assert "names" in capsys.readouterr().err


def test_report_names_its_page(synthetic_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run_command(["report", str(synthetic_run), "--out", str(tmp_path), "--json"]) == DONE
    answer = json.loads(capsys.readouterr().out)
    assert Path(answer["report"]) == tmp_path / "index.html"
    assert json.loads(Path(answer["ranking"]).read_text())["workloads"]
