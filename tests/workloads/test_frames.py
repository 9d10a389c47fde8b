from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from nequip.data import AtomicDataDict
from nequip.data.dataset import ASEDataset
from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
from nequip.utils import torch_default_dtype

from tunebench.study.spec import ExtxyzData, Model, SplitFrames
from tunebench.workloads import data
from tunebench.workloads.data import prepare
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.frames import PreparedFrames, prepared_frames
from tunebench.workloads.models import build_model, model_config
from tunebench.workloads.statistics import training_statistics
from tunebench.workloads.structure_files import file_hash, read_prepared

R_MAX = 3.0


def test_frames_are_what_nequip_itself_makes_of_the_file(prepared_ethanol) -> None:
    path = prepared_ethanol.splits["train"].path
    transforms = [
        ChemicalSpeciesToAtomTypeMapper(model_type_names=list(prepared_ethanol.type_names)),
        NeighborListTransform(r_max=R_MAX),
    ]
    with torch_default_dtype(torch.float64):
        plain = ASEDataset(str(path), transforms=transforms)
        expected = [plain[index] for index in range(len(plain))]
    dataset = prepared_frames(prepared_ethanol, "train", R_MAX)
    assert len(dataset) == len(expected)
    for index, frame in enumerate(expected):
        assert dataset[index].keys() == frame.keys()
        assert all(torch.equal(dataset[index][key], frame[key]) for key in frame)


def test_numbers_are_float64_whatever_the_default(prepared_ethanol) -> None:
    with torch_default_dtype(torch.float32):
        frame = PreparedFrames(prepared_ethanol.folder, "val", 2.9)[0]
    assert {key: frame[key].dtype for key in ("pos", "forces", "total_energy", "cell")} == dict.fromkeys(
        ("pos", "forces", "total_energy", "cell"), torch.float64
    )


def test_unlabelled_frames_keep_energy_and_lose_forces(prepared_ethanol) -> None:
    full = prepared_frames(prepared_ethanol, "train", R_MAX)
    half = prepared_frames(prepared_ethanol, "train", R_MAX, force_fraction=0.5, label_seed=3)
    kept = [not bool(torch.isnan(half[index]["forces"]).any()) for index in range(len(half))]
    assert kept == half.labelled.tolist()
    assert sum(kept) == 5
    for index in range(len(full)):
        assert torch.equal(half[index]["total_energy"], full[index]["total_energy"])
        assert bool(torch.isnan(half[index]["forces"]).all()) != kept[index]
        assert bool(torch.isfinite(full[index]["forces"]).all())


def test_the_test_split_keeps_every_label(prepared_ethanol) -> None:
    dataset = prepared_frames(prepared_ethanol, "test", R_MAX, force_fraction=0.0)
    assert all(bool(torch.isfinite(dataset[index]["forces"]).all()) for index in range(len(dataset)))


def test_neighbour_lists_are_built_once_per_process(prepared_ethanol) -> None:
    first = prepared_frames(prepared_ethanol, "train", R_MAX)
    second = prepared_frames(prepared_ethanol, "train", R_MAX, force_fraction=0.1)
    assert first.frames is second.frames


def test_files_are_verified_once_per_process(prepared_ethanol, tmp_path, monkeypatch) -> None:
    folder = shutil.copytree(prepared_ethanol.folder, tmp_path / "moved")
    hashed: list[Path] = []
    monkeypatch.setattr(data, "file_hash", lambda path: hashed.append(path) or file_hash(path))
    PreparedFrames(folder, "train", R_MAX)
    assert sorted(hashed) == sorted(folder.glob("*.xyz"))
    hashed.clear()
    again = (_seconds(lambda: PreparedFrames(folder, "train", R_MAX, force_fraction=0.5)) for _ in range(5))
    assert min(again) < 0.005
    assert hashed == []


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def test_a_model_that_writes_into_its_batch_leaves_the_frames_alone(prepared_ethanol) -> None:
    dataset = prepared_frames(prepared_ethanol, "train", R_MAX)
    before = [{key: value.clone() for key, value in frame.items()} for frame in dataset.frames]
    statistics = training_statistics(prepared_ethanol, R_MAX)
    model = build_model(
        model_config(Model(family="nequip", r_max_angstrom=R_MAX), prepared_ethanol.type_names, statistics, seed=0)
    )
    for batch in ([0], [1, 2]):
        out = model(AtomicDataDict.batched_from_list([dataset[index] for index in batch]))
        out["forces"].square().sum().backward()
    batch = dataset[0]
    batch["pos"].zero_()
    for frame, old in zip(dataset.frames, before, strict=True):
        assert frame.keys() == old.keys()
        assert all(torch.equal(frame[key], old[key]) and not frame[key].requires_grad for key in old)


def test_a_missing_stress_is_nan_where_others_have_one(tmp_path, rattled) -> None:
    frames = [*rattled("Si", 5, seed=1, stress=True), *rattled("Si", 5, seed=2)]
    ase.io.write(tmp_path / "si.xyz", frames, format="extxyz")
    counts = SplitFrames(train=8, val=1, test=1)
    prepared = prepare(ExtxyzData(source="extxyz", train=str(tmp_path / "si.xyz"), frames=counts))
    assert prepared.has_stress
    assert prepared.periodic
    stress = []
    for split in prepared.splits:
        dataset = prepared_frames(prepared, split, R_MAX)
        for index, atoms in enumerate(read_prepared(prepared.splits[split].path)):
            assert dataset[index]["stress"].shape == (1, 3, 3)
            assert bool(torch.isnan(dataset[index]["stress"]).all()) == ("stress" not in atoms.calc.results)
            stress.append("stress" in atoms.calc.results)
    assert sum(stress) == 5


def test_a_split_or_species_the_data_lacks_is_named(prepared_ethanol) -> None:
    with pytest.raises(WorkloadError, match=r"found 'split ood:cold', allowed: train, val, test, ood:hot"):
        PreparedFrames(prepared_ethanol.folder, "ood:cold", R_MAX)
    with pytest.raises(WorkloadError, match=r"found 'species O', allowed: the model's types: H, C"):
        PreparedFrames(prepared_ethanol.folder, "train", R_MAX, type_names=["H", "C"])


def test_slices_and_lists_select_frames(prepared_ethanol) -> None:
    dataset = prepared_frames(prepared_ethanol, "train", R_MAX)
    energies = [dataset[index]["total_energy"].item() for index in range(len(dataset))]
    assert [frame["total_energy"].item() for frame in dataset[1:4]] == energies[1:4]
    assert [frame["total_energy"].item() for frame in dataset[np.array([3, 0])]] == [energies[3], energies[0]]
    assert dataset.num_atoms([0, 1]) == [9, 9]
