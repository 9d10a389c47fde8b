from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.analysis.synthetic_run import Plan, write_run
from tests.study.broken_studies import BROKEN, BrokenStudy, quickstart
from tunebench.cli import BAD_INPUT, DONE, run_command
from tunebench.study.journal import read_trials
from tunebench.study.spec import XtbData
from tunebench.study.status import run_status
from tunebench.study.strict_yaml import write_yaml


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
        ["watch", "nowhere"],
        ["replay", "nowhere"],
        ["pause", "nowhere"],
        ["explain", "x", "nowhere"],
        ["report", "nowhere"],
        ["inspect", "nowhere.yaml"],
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


def test_watch_ends_with_the_run(synthetic_run: Path, capsys: pytest.CaptureFixture[str]):
    assert run_command(["watch", str(synthetic_run), "--json"]) == DONE
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert json.loads(line)["finished"] is True
    assert run_command(["watch", str(synthetic_run)]) == DONE
    assert "finished" in capsys.readouterr().out


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


@pytest.fixture
def small_study(tmp_path: Path, tiny_ethanol: XtbData) -> Path:
    """The quickstart on a few frames; its NequIP has parity."""
    study = quickstart()
    for workload in study["workloads"]:
        workload["data"] = tiny_ethanol.model_dump(mode="json")
        workload["batch_size"] = 2
    study["workloads"][0]["model"]["arguments"] = {"parity": True, "num_layers": 3, "num_features": 4}
    file = tmp_path / "study.yaml"
    file.write_text(write_yaml(study))
    return file


def test_inspect_tells_the_blocks_of_every_workload(small_study: Path, capsys: pytest.CaptureFixture[str]):
    assert run_command(["inspect", str(small_study), "--json"]) == DONE
    nequip, allegro = json.loads(capsys.readouterr().out)
    assert (nequip["workload"], allegro["workload"]) == ("ethanol-nequip", "ethanol-allegro")
    for inspection in (nequip, allegro):
        assert sum(row["parameters"] for row in inspection["blocks"]) == inspection["parameters"]
    assert any(row["live_share"] == 0 for row in nequip["blocks"])
    assert nequip["live_parameters"] < nequip["parameters"]
    assert all(row["live_share"] == 1 for row in allegro["blocks"])
    reach = {row["chosen_by"]: row["parameters"] for row in allegro["reach"]}
    assert reach["nequip.model.MuonParamGroups"] == 0 < reach["fctp_view merged"]


def test_inspect_prints_a_table_and_writes_the_same_rows_as_csv(
    small_study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    only = ["--workload", "ethanol-nequip", "--fctp-view", "per_type", "--split-heads"]
    file = tmp_path / "blocks.csv"
    assert run_command(["inspect", str(small_study), *only, "--csv", str(file)]) == DONE
    table = capsys.readouterr().out
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["workload"] for row in rows} == {"ethanol-nequip"}
    assert {"per_type", "matrix", "vector"} == {row["view"] for row in rows}
    assert {"dead", "live"} <= {row["gradient"] for row in rows}
    assert sum(float(row["share"]) for row in rows) == pytest.approx(1.0, abs=1e-9)
    for row in rows:
        assert row["tensor"] in table
        assert row["path"] in table
    assert "ethanol-allegro" not in table
    assert "nequip.model.MuonParamGroups" in table


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workload", "water"], "ethanol-nequip, ethanol-allegro"),
        (["--fctp-view", "round"], "per_type"),
        (["--csv", "nowhere/blocks.csv"], "nowhere/blocks.csv"),
    ],
)
def test_inspect_refuses_what_it_does_not_know_in_one_line(
    arguments: list[str],
    named: str,
    small_study: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(small_study.parent)
    assert run_command(["inspect", str(small_study), *arguments]) == BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    assert named in captured.err.strip().splitlines()[-1]


def test_inspect_names_the_argument_that_a_model_refuses(small_study: Path, capsys: pytest.CaptureFixture[str]):
    small_study.write_text(small_study.read_text().replace("num_layers: 3", "num_layers: 0"))
    assert run_command(["inspect", str(small_study)]) == BAD_INPUT
    assert "workloads[0].model.arguments: found" in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_views_on_offer_are_the_views_there_are(capsys: pytest.CaptureFixture[str]):
    from tunebench.optim.matrix_view import FctpView

    assert run_command(["inspect", "study.yaml", "--fctp-view", "?"]) == BAD_INPUT
    line = capsys.readouterr().err
    assert ", ".join(f"'{view}'" for view in FctpView) in line


def test_watch_without_a_terminal_prints_what_has_changed(
    synthetic_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    last = run_status(synthetic_run)
    looks = iter([{**last, "finished": False}, {**last, "finished": False}, last])
    monkeypatch.setattr("tunebench.study.status.run_status", lambda run: next(looks))
    assert run_command(["watch", str(synthetic_run), "--every", "0.1"]) == DONE
    said = capsys.readouterr().out
    assert [said.count(f": {state}\n") + said.count(f": {state} ") for state in ("not finished", "finished")] == [1, 1]


def test_properties_compares_a_teacher_with_itself_and_exits_1_for_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plan, out = tmp_path / "plan.yaml", tmp_path / "rows.json"
    crystal = "{kind: crystal, formula: FORMULA, lattice: fcc, a_angstrom: 3.6}"
    entry = "{property: elastic, relax_ions: false, structure: CRYSTAL}"
    text = f"properties: {{cu: {entry}}}\nreference: {{calculator: emt}}\n"
    plan.write_text(text.replace("CRYSTAL", crystal).replace("FORMULA", "Cu"), encoding="utf-8")
    assert run_command(["properties", "emt", "--settings", str(plan), "--out", str(out), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows == json.loads(out.read_text(encoding="utf-8"))
    assert [row["quantity"] for row in rows][:3] == ["C11", "C12", "C44"]
    assert all(row["error"] == 0 and row["model"] == "emt" for row in rows)
    plan.write_text(text.replace("CRYSTAL", crystal).replace("FORMULA", "Si"), encoding="utf-8")
    assert run_command(["properties", "emt", "--settings", str(plan)]) == 1
    assert "cu" in (shown := capsys.readouterr().out)
    assert "failed: NotImplementedError: No EMT-potential for Si" in shown
