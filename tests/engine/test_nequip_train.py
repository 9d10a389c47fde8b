from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.engine.conftest import MakeTask, Reports
from tunebench.engine.lightning import run_trial
from tunebench.engine.nequip_config import plain_nequip_config


@pytest.mark.parametrize(
    ("optimizer", "family", "averaged"),
    [("adamw", "nequip", "ema"), ("soap", "allegro", "ema"), ("schedule_free", "nequip", "schedule_free")],
)
def test_the_engine_and_nequip_train_measure_the_same_validation_errors(
    make_task: MakeTask, tmp_path: Path, optimizer: str, family: str, averaged: str
):
    task = make_task(optimizer, family=family, steps=10, evaluation_steps=(5, 10))
    reports = Reports()
    run_trial(task, reports)
    measured = nequip_train_errors(plain_nequip_config(task, evaluate_every=5), tmp_path / "nequip-train")

    assert [row["step"] for row in measured] == [5, 10]
    for row, report in zip(measured, reports, strict=True):
        errors = report.errors["val"][averaged]
        for metric in ("energy_per_atom_mae", "energy_per_atom_rmse", "forces_mae", "forces_rmse"):
            assert errors[metric] == pytest.approx(row[metric], rel=1e-5)


def nequip_train_errors(config: dict, folder: Path) -> list[dict[str, float]]:
    """Runs NequIP's own command on a config and returns validation errors by step."""
    folder.mkdir()
    config["trainer"]["logger"] = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).parent / "nequip-train"), "-cp", str(folder), "-cn", "config"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (metrics,) = folder.rglob("metrics.csv")
    with metrics.open() as file:
        rows = [row for row in csv.DictReader(file) if row["val0_epoch/forces_mae"]]
    # Lightning logs validation under the index of the last finished step
    return [
        {"step": int(row["step"]) + 1}
        | {name.split("/")[1]: float(value) for name, value in row.items() if name.startswith("val0_epoch/")}
        for row in rows
    ]
