from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import PROCESSES
from tunebench import pretraining
from tunebench.pretraining import pretrain
from tunebench.study.errors import RunError
from tunebench.study.initial import Initial
from tunebench.study.resolve import ResolvedStudy, load_run, resolve
from tunebench.study.spec import StudyError
from tunebench.study.strict_yaml import write_yaml
from tunebench.tuning.preparation import initial_weights
from tunebench.workloads.data import PreparedData, prepare
from tunebench.workloads.starting_point import starting_point
from tunebench.workloads.trained_model import read_architecture, read_record, read_trained

STUDY: dict[str, Any] = {
    "name": "base",
    "seed": 4,
    "workloads": [
        {
            "name": "molecules",
            "data": {
                "source": "xtb-mixture",
                "systems": ["methanol", "methylamine"],
                "equilibration_fs": 10.0,
                "interval_fs": 5.0,
                "frames": {"train": 6, "val": 2, "test": 2},
            },
            "model": {"family": "nequip", "r_max_angstrom": 4.0},
            "batch_size": 2,
            "max_steps": 6,
            "evaluate_every_steps": 2,
        }
    ],
    "optimizers": ["adamw"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def study(folder: Path, **changes: Any) -> ResolvedStudy:
    path = folder / "study.yaml"
    path.write_text(write_yaml({**STUDY, **changes}))
    return resolve(path)


@pytest.fixture(scope="module")
def data(folder: Path) -> PreparedData:
    return prepare(study(folder).study.workloads[0].data)


@pytest.fixture(scope="module")
def base(folder: Path, data: PreparedData) -> Path:
    out = folder / "base.ckpt"
    pretrain(study(folder), data, out, lambda line: None)
    return out


def weights(file: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in read_trained(file).model.named_parameters()}


def test_a_base_model_says_where_it_comes_from(base, folder, data):
    record = read_record(base)
    assert record is not None
    assert (record["study_hash"], record["data_hash"]) == (study(folder).hash, data.hash)
    assert record["splits"] == {"train": 6, "val": 2, "test": 2}
    assert record["types"] == ["H", "C", "N", "O"]
    assert record["errors"]["test"]["ema"]["forces_mae"] > 0
    assert record["environment"]["packages"]["nequip"]
    assert not list((base.parent / f"{base.name}.training" / "checkpoints").iterdir())


def test_a_workload_starts_from_a_base_model(base, prepared_ethanol):
    start = starting_point(Initial(path=str(base)), read_architecture(base).model, prepared_ethanol)
    assert start.about["left_out_types"] == ["N"]
    assert start.about["pretrained"]["study"] == "base"


def test_a_run_says_what_it_starts_from_and_does_not_go_on_from_another_file(
    base, tmp_path, tiny_ethanol, prepared_ethanol
):
    path = tmp_path / "base.ckpt"
    shutil.copyfile(base, path)
    fine = {
        "name": "ethanol",
        "data": tiny_ethanol.model_dump(mode="json"),
        "model": {"family": "nequip"},
        "init": {"path": "base.ckpt"},
        "max_steps": 8,
    }
    study(tmp_path, workloads=[fine]).write(tmp_path / "run")
    prepared = {"ethanol": prepared_ethanol}
    start = initial_weights(load_run(tmp_path / "run"), prepared)["ethanol"]
    assert start["file"] == "base.ckpt"
    assert start["pretrained"]["study"] == "base"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(StudyError, match=r"workloads\[0\].init.path: found .*allowed: SHA-256 .* the run began with"):
        initial_weights(load_run(tmp_path / "run"), prepared)


def test_a_base_model_that_is_there_is_not_trained_again_nor_overwritten(base, folder, data, tmp_path):
    before, lines = base.stat().st_mtime_ns, []
    pretrain(study(folder), data, base, lines.append)
    assert lines == [f"{base}: is there already, made by this study"]
    with pytest.raises(RunError, match=r"base.ckpt: found a base model with study_hash .* of study base, allowed: "):
        pretrain(study(tmp_path, seed=5), data, base, lines.append)
    other = tmp_path / "other.ckpt"
    other.write_bytes(b"something else")
    with pytest.raises(RunError, match=r"other.ckpt: found a file that `tunebench pretrain` did not write"):
        pretrain(study(folder), data, other, lines.append)
    assert base.stat().st_mtime_ns == before
    assert other.read_bytes() == b"something else"


def kill_at_four(line: str) -> None:
    if line.startswith("step 4 "):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(folder: Path, data: PreparedData) -> Path:
    """The folder of a training that was killed after its fourth step."""
    out = folder / "killed.ckpt"
    process = PROCESSES.Process(target=pretrain, args=(study(folder), data, out, kill_at_four))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    return folder / "killed.ckpt.training"


@pytest.mark.parametrize("engine", ["lightning", "cohort"])
def test_a_killed_training_goes_on_in_either_engine_and_ends_as_an_uninterrupted_one(
    engine, killed, base, folder, data, tmp_path
):
    out, lines = tmp_path / "killed.ckpt", []
    shutil.copytree(killed, tmp_path / killed.name)
    pretrain(study(folder, engine=engine), data, out, lines.append)  # the engine is no part of the hash
    assert [line.split(",")[0] for line in lines] == ["step 4 of 6", "step 6 of 6"]
    found, expected = weights(out), weights(base)
    exact = engine == "lightning"
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0 if exact else 1e-3, atol=0 if exact else 1e-4)


def test_another_study_does_not_go_on_in_the_folder_of_an_unfinished_one(folder, data, tmp_path, monkeypatch):
    out = tmp_path / "base.ckpt"
    monkeypatch.setattr(pretraining, "_trained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pretrain(study(folder), data, out, lambda line: None)
    with pytest.raises(RunError, match=r"base.ckpt.training: holds study .* they differ in seed: 4 there, 9 here"):
        pretrain(study(tmp_path, seed=9), data, out, lambda line: None)


def test_a_base_model_is_one_trial(folder, data, tmp_path):
    with pytest.raises(StudyError, match="optimizers: found 2 entries, allowed: one: a base model is one trial"):
        pretrain(study(tmp_path, optimizers=["adamw", "soap"]), data, tmp_path / "x.ckpt", lambda line: None)
    with pytest.raises(RunError, match=r"--out: found .*x.pt, allowed: a name that ends in .ckpt"):
        pretrain(study(folder), data, tmp_path / "x.pt", lambda line: None)


def test_a_training_that_diverges_leaves_no_base_model(data, tmp_path):
    fast = {"name": "adamw", "fixed": {"learning_rate": 1e12}}
    with pytest.raises(RunError, match=r"found a training that ended DIVERGED at step"):
        pretrain(study(tmp_path, optimizers=[fast]), data, tmp_path / "x.ckpt", lambda line: None)
    assert not (tmp_path / "x.ckpt").exists()
