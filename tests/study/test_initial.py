from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tunebench.study.initial import ADOPTED
from tunebench.study.lint import lint
from tunebench.study.resolve import load_run, resolve
from tunebench.study.spec import StudyError
from tunebench.study.strict_yaml import write_yaml

STUDY: dict[str, Any] = {
    "name": "fine",
    "workloads": [
        {
            "name": "ethanol",
            "data": {"source": "xtb", "system": "ethanol", "frames": {"train": 10, "val": 4, "test": 4}},
            "model": {"family": "nequip"},
            "max_steps": 100,
        }
    ],
    "optimizers": ["adamw"],
}
MODEL = {
    "_target_": "nequip.model.NequIPGNNModel",
    "seed": 3,
    "model_dtype": "float32",
    "r_max": 4.5,
    "type_names": ["H", "C", "O"],
    "num_layers": 2,
    "l_max": 1,
    "parity": False,
    "num_features": 16,
    "radial_mlp_depth": 1,
    "radial_mlp_width": 32,
    "avg_num_neighbors": 7.0,
}


@pytest.fixture
def write(tmp_path: Path):
    """Writes a study whose workload starts from a file beside it."""

    def write_study(model: dict[str, Any] | None = None, **init: Any) -> Path:
        (workload,) = STUDY["workloads"]
        changed = {**workload, "init": {"path": "base.ckpt", **init}, "model": model or workload["model"]}
        path = tmp_path / "fine.yaml"
        path.write_text(write_yaml({**STUDY, "workloads": [changed]}))
        return path

    return write_study


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A file with all that a study reads of a checkpoint; its weights are read later."""
    return write_base(tmp_path / "base.ckpt")


def write_base(path: Path, **model: Any) -> Path:
    torch.save({"hyper_parameters": {"info_dict": {"training_module": {"model": {**MODEL, **model}}}}}, path)
    return path


def test_the_architecture_comes_from_the_file(write, base):
    (workload,) = resolve(write()).study.workloads
    assert workload.model.preset == ADOPTED
    assert workload.model.r_max_angstrom == 4.5
    assert workload.model.arguments["num_features"] == 16
    assert "avg_num_neighbors" not in workload.model.arguments
    assert workload.init.path == str(base)
    assert len(workload.init.sha256) == 64


def test_what_the_study_says_of_the_model_must_be_so_in_the_file(write, base):
    resolve(write({"family": "nequip", "preset": "tiny", "r_max_angstrom": 4.5, "dtype": "float32"}))
    resolve(write({"family": "nequip", "arguments": {"l_max": 1, "num_bessels": 8}}))
    for model, line in (
        ({"family": "allegro"}, "model.family: found 'allegro', allowed: left out, or 'nequip' as in"),
        ({"family": "nequip", "r_max_angstrom": 5.0}, "model.r_max_angstrom: found 5.0, allowed: left out, or 4.5"),
        ({"family": "nequip", "dtype": "float64"}, "model.dtype: found 'float64', allowed: left out, or 'float32'"),
        ({"family": "nequip", "arguments": {"l_max": 2}}, "model.arguments.l_max: found 2, allowed: left out, or 1"),
        ({"family": "nequip", "arguments": {"num_bessels": 6}}, "arguments.num_bessels: found 6, .* or 8"),
        ({"family": "nequip", "preset": "small"}, "model.preset: found 'small', which says num_layers = 3, allowed"),
    ):
        with pytest.raises(StudyError, match=rf"workloads\[0\].{line.removeprefix('workloads')}|.*{line}"):
            resolve(write(model))


def test_files_that_cannot_be_a_start_are_named(write, base, tmp_path):
    for said, line in (
        ({"path": "none.ckpt"}, r"workloads\[0\].init.path: found 'none.ckpt', allowed: an existing file; .*none.ckpt"),
        (
            {"sha256": 64 * "a"},
            r"workloads\[0\].init.path: found .*base.ckpt with SHA-256 .*, allowed: SHA-256 aaaaaaaa",
        ),
        ({"path": "fine.yaml"}, r"init.path: found .*fine.yaml', allowed: a checkpoint \(.ckpt\) or a packaged model"),
    ):
        with pytest.raises(StudyError, match=line):
            resolve(write(**said))
    for model, line in (
        ({"_target_": "nequip.model.FullNequIPGNNModel"}, "found a model of nequip.model.FullNequIPGNNModel in"),
        ({"novelty": 1}, "found a NequIP model with the argument novelty in .*, allowed: .*num_layers"),
    ):
        write_base(base, **model)
        with pytest.raises(StudyError, match=line):
            resolve(write())


def test_the_rules_name_the_file_that_all_arms_start_from(write, base):
    (alike,) = [finding for finding in lint(resolve(write())) if finding.rule == "F9"]
    assert "initial weights and data order are alike in every arm; ethanol starts from base.ckpt (" in alike.reason


def test_a_preset_of_a_file_needs_a_file(tmp_path):
    (workload,) = STUDY["workloads"]
    path = tmp_path / "fine.yaml"
    path.write_text(
        write_yaml({**STUDY, "workloads": [{**workload, "model": {"family": "nequip", "preset": ADOPTED}}]})
    )
    with pytest.raises(StudyError, match=r"model.preset: found 'adopted', allowed: another preset, or an `init`"):
        resolve(path)


def test_the_content_of_the_file_is_part_of_the_study_and_its_place_is_not(write, base, tmp_path):
    first = resolve(write())
    base.rename(tmp_path / "moved.ckpt")
    assert resolve(write(path="moved.ckpt")).hash == first.hash
    write_base(base, seed=4)
    os.utime(base, (1, 1))
    assert resolve(write()).hash != first.hash
    assert resolve(write(path="moved.ckpt", train="readout")).hash != first.hash


def test_a_frozen_study_reads_back_as_it_was(write, base, tmp_path):
    resolved = resolve(write(train=["layer*"], lr_factors={"layer0*": 0.1}))
    resolved.write(tmp_path / "run")
    frozen = load_run(tmp_path / "run")
    assert frozen.study.workloads == resolved.study.workloads
    assert frozen.hash == resolved.hash
    assert resolve(tmp_path / "run" / "study.yaml").hash == resolved.hash
