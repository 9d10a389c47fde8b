from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
import yaml

from tests.engine.conftest import MakeTask, Reports
from tests.engine.test_lightning import assert_same_state
from tests.forked import nequip_command
from tunebench.engine.lightning import run_trial
from tunebench.engine.nequip_config import plain_nequip_config
from tunebench.engine.task import TrialTask


@pytest.mark.parametrize(
    ("optimizer", "family", "averaged", "force_fraction"),
    [
        ("adamw", "nequip", "ema", 1.0),
        ("soap", "allegro", "ema", 1.0),
        ("schedule_free", "nequip", "schedule_free", 1.0),
        ("adamw", "nequip", "ema", 0.2),
    ],
)
def test_the_engine_and_nequip_train_measure_the_same_validation_errors(
    make_task: MakeTask, tmp_path: Path, optimizer: str, family: str, averaged: str, force_fraction: float
):
    task = make_task(optimizer, family=family, steps=10, evaluation_steps=(5, 10), force_fraction=force_fraction)
    reports = Reports()
    run_trial(task, reports)
    measured = nequip_train_errors(plain_nequip_config(task, evaluate_every=5), tmp_path / "nequip-train")

    assert [row["step"] for row in measured] == [5, 10]
    for row, report in zip(measured, reports, strict=True):
        errors = report.errors["val"][averaged]
        for metric in ("energy_per_atom_mae", "energy_per_atom_rmse", "forces_mae", "forces_rmse"):
            assert errors[metric] == pytest.approx(row[metric], rel=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "family"),
    [
        ("soap", "nequip"),
        ("muon", "nequip"),
        ("soap_muon", "nequip"),
        ("schedule_free", "nequip"),
        ("soap", "allegro"),
    ],
)
def test_a_plain_nequip_train_resumes_bit_for_bit_and_its_checkpoint_packages(
    make_task: MakeTask, tmp_path: Path, optimizer: str, family: str
):
    config = config_of_two_epochs(make_task(optimizer, family=family))
    nequip_train(config, tmp_path / "whole")
    nequip_train(config, tmp_path / "resumed", f"++ckpt_path={tmp_path / 'whole' / 'epoch0.ckpt'}")
    whole, resumed = (torch.load(tmp_path / run / "epoch1.ckpt", weights_only=False) for run in ("whole", "resumed"))
    assert whole["global_step"] == resumed["global_step"] == 10
    for section in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_same_state(whole[section], resumed[section])

    package = tmp_path / "model.nequip.zip"
    nequip_command("nequip-package", "build", str(tmp_path / "resumed" / "epoch1.ckpt"), str(package), folder=tmp_path)
    assert package.is_file()


def config_of_two_epochs(task: TrialTask) -> dict:
    """A `nequip-train` config as a user writes it: validation within epochs, a checkpoint after each."""
    config = plain_nequip_config(task, evaluate_every=2)
    del config["training_module"]["lr_scheduler"], config["trainer"]["check_val_every_n_epoch"]
    config["data"]["train_dataloader"]["shuffle"] = False  # NequIP draws another order after a resume
    checkpoint = {
        "_target_": "lightning.pytorch.callbacks.ModelCheckpoint",
        "dirpath": "${hydra:runtime.cwd}",
        "filename": "epoch{epoch}",
        "auto_insert_metric_name": False,
        "save_top_k": -1,
        "every_n_epochs": 1,
        "save_on_train_epoch_end": True,
    }
    config["trainer"] |= {"max_epochs": 2, "max_steps": -1, "enable_checkpointing": True, "callbacks": [checkpoint]}
    return config


def nequip_train_errors(config: dict, folder: Path) -> list[dict[str, float]]:
    """Runs NequIP's own command on a config and returns validation errors by step."""
    config["trainer"]["logger"] = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(folder)}
    nequip_train(config, folder)
    (metrics,) = folder.rglob("metrics.csv")
    with metrics.open() as file:
        rows = [row for row in csv.DictReader(file) if row["val0_epoch/forces_mae"]]
    # Lightning logs validation under the index of the last finished step
    return [
        {"step": int(row["step"]) + 1}
        | {name.split("/")[1]: float(value) for name, value in row.items() if name.startswith("val0_epoch/")}
        for row in rows
    ]


def nequip_train(config: dict, folder: Path, *overrides: str) -> None:
    """Runs NequIP's own command on a config in a folder of its own."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    nequip_command("nequip-train", "-cp", str(folder), "-cn", "config", *overrides, folder=folder)
