from __future__ import annotations

from pathlib import Path

import ase.io
import pytest

from tunebench.study.spec import ExtxyzData, NequipData, SplitFrames
from tunebench.workloads.data import prepare
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.structure_files import read_prepared


def section(path: Path, **fields: object) -> dict[str, object]:
    split = {"file_path": str(path), "train": 12, "val": 4, "test": 4}
    return {"_target_": "nequip.data.datamodule.ASEDataModule", "seed": 1, "split_dataset": split, **fields}


def energies(prepared, split: str) -> list[float]:
    return [frame.get_potential_energy() for frame in read_prepared(prepared.splits[split].path)]


def test_a_split_dataset_becomes_the_three_splits(ethanol_file: Path) -> None:
    prepared = prepare(NequipData(source="nequip", datamodule=section(ethanol_file)))
    assert {name: file.frames for name, file in prepared.splits.items()} == {"train": 12, "val": 4, "test": 4}
    assert prepared.type_names == ("H", "C", "O")
    source = [frame.get_potential_energy() for frame in ase.io.read(ethanol_file, ":")]
    assert sorted(energy for split in prepared.splits for energy in energies(prepared, split)) == sorted(source)


def test_frames_equal_those_of_the_file_source(ethanol_file: Path) -> None:
    frames = SplitFrames(train=12, val=4, test=4)
    files = prepare(ExtxyzData(source="extxyz", train=str(ethanol_file), frames=frames))
    module = prepare(NequipData(source="nequip", datamodule=section(ethanol_file)))
    lines = {
        source: {line for split in prepared.splits.values() for line in split.path.read_text().splitlines()}
        for source, prepared in (("files", files), ("module", module))
    }
    assert lines["files"] == lines["module"]


def test_further_test_sets_take_the_names_given(ethanol_file: Path, tmp_path: Path, rattled) -> None:
    ase.io.write(tmp_path / "far.xyz", rattled("CH3OH", 3, seed=4), format="extxyz")
    ase.io.write(tmp_path / "near.xyz", rattled("CH3CH2OH", 2, seed=5), format="extxyz")
    files = [str(tmp_path / name) for name in ("near.xyz", "far.xyz")]
    split = {"file_path": str(ethanol_file), "train": 12, "val": 8}
    module = section(ethanol_file, split_dataset=split, test_file_path=files)
    prepared = prepare(NequipData(source="nequip", datamodule=module, ood=("far",)))
    assert prepared.splits["test"].frames == 2
    assert prepared.splits["ood:far"].frames == 3
    with pytest.raises(WorkloadError, match=r"^data\.ood: found \[\], allowed: 1 names"):
        prepare(NequipData(source="nequip", datamodule=module))


def test_a_path_relative_to_the_study_is_found(ethanol_file: Path) -> None:
    absolute = prepare(NequipData(source="nequip", datamodule=section(ethanol_file)))
    relative = NequipData(source="nequip", datamodule=section(Path(ethanol_file.name)))
    assert prepare(relative, base=ethanol_file.parent).hash == absolute.hash


def test_an_edited_file_makes_another_data_set(ethanol_file: Path, rattled) -> None:
    data = NequipData(source="nequip", datamodule=section(ethanol_file))
    before = prepare(data)
    ase.io.write(ethanol_file, rattled("CH3CH2OH", 20, seed=77), format="extxyz")
    after = prepare(data)
    assert after.hash != before.hash
    assert energies(after, "train") != energies(before, "train")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_target_": "nequip.data.datamodule.NoSuchModule"}, r"^data\.datamodule\._target_: found .*NoSuchModule"),
        ({"no_such_argument": 1}, r"^data\.datamodule\._target_: found .*no_such_argument"),
        ({"split_dataset": {"file_path": "gone.xyz", "train": 0.5, "val": 0.3, "test": 0.2}}, r"gone\.xyz"),
        ({"seed": "${missing}"}, r"^data\.datamodule: found .*missing"),
    ],
)
def test_a_datamodule_that_cannot_be_had_ends_in_one_line(ethanol_file: Path, change: dict, message: str) -> None:
    with pytest.raises(WorkloadError, match=message) as caught:
        prepare(NequipData(source="nequip", datamodule=section(ethanol_file, **change)))
    assert "\n" not in str(caught.value)


def test_a_section_without_target_is_refused() -> None:
    with pytest.raises(WorkloadError, match=r"^data\.datamodule\._target_: found None"):
        prepare(NequipData(source="nequip", datamodule={"seed": 1}))
