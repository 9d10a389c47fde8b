from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from tunebench.engine.curves import curve_rows, write_curve
from tunebench.engine.task import Evaluation
from tunebench.study.record import CURVE_COLUMNS, CURVES

TRIAL = "ethanol.soap.tune.c000.s0"


def evaluation(step: int) -> Evaluation:
    metrics = {"forces_mae": 0.5, "objective": math.inf}
    return Evaluation(
        step=step,
        objective=0.5,
        errors={"val": {"raw": metrics, "ema": {"forces_mae": 0.25}}, "ood:hot": {"raw": {"forces_mae": 2.0}}},
        wall_s=3.0,
        device_s=1.5,
        train_loss=7.0,
        learning_rate=0.01,
        attempts=1,
    )


def test_a_row_is_one_measured_number(tmp_path: Path) -> None:
    write_curve(tmp_path, TRIAL, curve_rows(TRIAL, evaluation(4)))
    rows = pd.read_parquet(tmp_path / CURVES / f"{TRIAL}.parquet")
    assert list(rows.columns) == list(CURVE_COLUMNS)
    assert set(rows.trial) == {TRIAL}
    assert set(zip(rows.step, rows.wall_s, rows.device_s, strict=True)) == {(4, 3.0, 1.5)}
    assert list(zip(rows.split, rows.metric, rows.readout, rows.value, strict=True)) == [
        ("train", "loss", "raw", 7.0),
        ("train", "learning_rate", "raw", 0.01),
        ("val", "forces_mae", "raw", 0.5),
        ("val", "objective", "raw", math.inf),
        ("val", "forces_mae", "ema", 0.25),
        ("ood:hot", "forces_mae", "raw", 2.0),
    ]


def test_the_schema_does_not_depend_on_the_values(tmp_path: Path) -> None:
    write_curve(tmp_path, TRIAL, curve_rows(TRIAL, evaluation(4)))
    fields = pq.read_schema(tmp_path / CURVES / f"{TRIAL}.parquet")
    assert {field.name: str(field.type) for field in fields} == {
        "trial": "string",
        "step": "int64",
        "wall_s": "double",
        "device_s": "double",
        "split": "string",
        "metric": "string",
        "readout": "string",
        "value": "double",
    }


def test_a_curve_is_replaced_by_the_longer_one(tmp_path: Path) -> None:
    rows = curve_rows(TRIAL, evaluation(4))
    write_curve(tmp_path, TRIAL, rows)
    write_curve(tmp_path, TRIAL, rows + curve_rows(TRIAL, evaluation(8)))
    assert list(pd.read_parquet(tmp_path / CURVES).step.unique()) == [4, 8]
    assert [file.name for file in (tmp_path / CURVES).iterdir()] == [f"{TRIAL}.parquet"]


def test_trials_whose_names_begin_alike_keep_their_own_files(tmp_path: Path) -> None:
    names = ["w.soap.confirm.c000.s1", "w.soap.confirm.c000.s10", "w.soap.confirm.c000.s2"]
    for name in names:
        write_curve(tmp_path, name, curve_rows(name, evaluation(4)))
    assert sorted(pd.read_parquet(tmp_path / CURVES).trial.unique()) == sorted(names)


@pytest.mark.parametrize("written_before", [True, False])
def test_a_kill_while_it_is_written_leaves_the_old_curve_and_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written_before: bool
) -> None:
    rows = curve_rows(TRIAL, evaluation(4))
    if written_before:
        write_curve(tmp_path, TRIAL, rows)

    def killed(path: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_curve(tmp_path, TRIAL, rows + curve_rows(TRIAL, evaluation(8)))
    curves = list((tmp_path / CURVES).glob("*.parquet"))
    assert len(curves) == int(written_before)
    assert all(set(pd.read_parquet(file).step) == {4} for file in curves)

    write_curve(tmp_path, TRIAL, rows)
    assert [file.name for file in (tmp_path / CURVES).iterdir()] == [f"{TRIAL}.parquet"]
