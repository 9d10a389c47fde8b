from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from analysis.choice import choose
from analysis.load import load
from analysis.nequip_text import config_text
from analysis.ranking import rank
from tests.analysis.synthetic_run import Plan, write_run
from tunebench.cli import BAD_INPUT, DONE, run_command
from tunebench.export import accepted_by_nequip
from tunebench.study.errors import RunError
from tunebench.study.seeds import named_seed
from tunebench.study.spec import XtbData
from tunebench.workloads.data import PreparedData

ARMS = {
    "adamw": (0.03, 0.031, 0.032, 0.033, 0.034),
    "soap": (math.inf, 0.021, 0.02, 0.023, 0.024),
    "sgd": (0.05, 0.05, 0.05, 0.05, 0.05),
}
FULL, PARTIAL = "all-labels", "few-labels"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_ethanol: XtbData, prepared_ethanol: PreparedData) -> Path:
    plan = Plan(
        arms=ARMS,
        workloads=(FULL, PARTIAL),
        top_k=2,
        hopeless=("sgd",),
        force_fractions={PARTIAL: 0.2},
        data=tiny_ethanol.model_dump(mode="json"),
        data_hash=prepared_ethanol.hash,
    )
    return write_run(tmp_path_factory.mktemp("export") / "run", plan)


def exported(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert run_command(["export", *arguments, "--json"]) == DONE
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run_command(["export", *arguments]) == BAD_INPUT
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    return line


def test_the_choice_comes_with_data_model_seeds_and_what_is_not_shown(
    run: Path, prepared_ethanol: PreparedData, capsys: pytest.CaptureFixture[str]
) -> None:
    found = exported(capsys, str(run), "--workload", FULL)
    config = yaml.safe_load(found["config"])
    assert found["optimizer"] == "soap"
    assert found["seed_index"] == 1  # seed 0 diverged
    assert found["config"].startswith("# unresolved: soap leads on all-labels, but is not shown to be better than ")
    assert config["data"]["train_file_path"] == str(prepared_ethanol.splits["train"].path)
    assert config["data"]["seed"] == named_seed(7, "order", "confirm", 1)
    assert config["training_module"]["model"]["seed"] == named_seed(7, "init", "confirm", 1)
    assert config["training_module"]["optimizer"]["_target_"] == "tunebench.optim.SOAP"
    assert config["training_module"]["ema_decay"] == 0.999
    assert config["trainer"]["max_steps"] == 240
    assert "&id" not in found["config"]


def test_the_page_shows_the_same_sections(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = yaml.safe_load(exported(capsys, str(run), "--workload", PARTIAL)["config"])
    loaded = load(run)
    choice = choose(rank(loaded).workloads[1])
    assert choice is not None
    shown = yaml.safe_load(config_text(loaded, choice))
    assert whole["training_module"] == {**shown["training_module"], "model": whole["training_module"]["model"]}
    assert whole["trainer"].items() >= shown["trainer"].items()
    assert whole["data"]["train_dataloader"] == shown["data"]["train_dataloader"]


def test_partial_labels_are_masked_as_in_the_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = exported(capsys, str(run), "--workload", PARTIAL, "--arm", "adamw")
    config = yaml.safe_load(found["config"])
    assert found["why"] == "adamw was asked for; unresolved on few-labels, where the choice is soap"
    frames = config["data"]["train_dataset"]
    assert (frames["force_fraction"], frames["label_seed"]) == (0.2, named_seed(7, "labels", "confirm", 0))


@pytest.fixture(scope="module")
def raw_run(tmp_path_factory: pytest.TempPathFactory, tiny_ethanol: XtbData, prepared_ethanol: PreparedData) -> Path:
    plan = Plan(
        arms={"adamw": ARMS["adamw"], "schedule_free": (0.05,) * 5},
        workloads=(FULL,),
        readout="raw",
        data=tiny_ethanol.model_dump(mode="json"),
        data_hash=prepared_ethanol.hash,
    )
    return write_run(tmp_path_factory.mktemp("raw") / "run", plan)


def test_a_trial_that_counts_by_its_raw_weights_is_exported_without_averaging(
    raw_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = exported(capsys, str(raw_run), "--arm", "adamw")
    module = yaml.safe_load(found["config"])["training_module"]
    assert module["_target_"] == "nequip.train.NequIPLightningModule"
    assert "ema_decay" not in module
    assert "5 seeds, 0 failed, of raw weights." in found["config"]
    assert "keeps raw weights, by which its trial counts" in found["config"]


def test_raw_weights_of_a_schedule_free_optimizer_cannot_be_kept_and_the_comment_says_so(
    raw_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = exported(capsys, str(raw_run), "--arm", "schedule_free")
    assert yaml.safe_load(found["config"])["training_module"]["_target_"] == "nequip.train.ScheduleFreeLightningModule"
    assert "# Its trial counts by raw weights, which NequIP cannot keep of a schedule-free optimizer" in found["config"]
    assert "their test force MAE was 50.0 meV/Å" in found["config"]


def test_a_file_is_written_where_one_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    assert run_command(["export", str(run), "--arm", f"{FULL}/adamw", "-o", str(file)]) == DONE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.strip().splitlines() == [
        "adamw was asked for; unresolved on all-labels, where the choice is soap"
    ]
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["run"] == ["train", "test"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--workload: found nothing, allowed: all-labels, few-labels"),
        (("--workload", "ful-labels"), "did you mean few-labels?"),
        (("--workload", FULL, "--arm", "muon"), "--arm: found muon, allowed: adamw, sgd, soap"),
        (("--workload", FULL, "--arm", f"{PARTIAL}/adamw"), "allowed: an arm of all-labels"),
        (("--workload", FULL, "--arm", "sgd"), "no confirmed configuration of sgd that reached the horizon"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    run: Path, arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refusal(capsys, str(run), *arguments)


def test_a_run_on_other_data_is_refused(
    tmp_path: Path, tiny_ethanol: XtbData, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(arms={"adamw": ARMS["adamw"]}, data=tiny_ethanol.model_dump(mode="json"), data_hash="0" * 64)
    assert "allowed: 000000000000, the data the run was measured on" in refusal(
        capsys, str(write_run(tmp_path / "run", plan))
    )


def test_a_config_that_nequip_refuses_is_refused_with_its_reason(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = exported(capsys, str(shutil.copytree(run, tmp_path / "run")), "--workload", FULL)["config"]
    with pytest.raises(RunError, match=r"here: training_module: found .*l_max"):
        accepted_by_nequip(text.replace("l_max:", "l_maximum:", 1), "here")
