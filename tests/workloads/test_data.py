from __future__ import annotations

import json
import multiprocessing
import os
import resource
import time
from pathlib import Path

import ase.io
import numpy as np
import pytest

from tunebench.study.spec import ExtxyzData, SplitFrames, XtbData
from tunebench.workloads.data import MANIFEST, PreparedData, load_prepared, prepare
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.structure_files import file_hash, read_prepared


def file_data(path: Path, **counts: int) -> ExtxyzData:
    return ExtxyzData(
        source="extxyz", train=str(path), frames=SplitFrames(**{"train": 8, "val": 4, "test": 4, **counts})
    )


def test_the_manifest_describes_the_files(prepared_ethanol: PreparedData) -> None:
    manifest = json.loads((prepared_ethanol.folder / MANIFEST).read_text())
    assert list(prepared_ethanol.splits) == ["train", "val", "test", "ood:hot"]
    assert prepared_ethanol.type_names == ("H", "C", "O")
    assert not prepared_ethanol.has_stress
    assert not prepared_ethanol.periodic
    assert prepared_ethanol.level_of_theory is not None
    assert prepared_ethanol.level_of_theory.startswith("GFN2-xTB")
    assert manifest["hash"] == prepared_ethanol.hash
    assert manifest["spec"]["system"] == "ethanol"
    for file in prepared_ethanol.splits.values():
        assert len(read_prepared(file.path)) == file.frames
        assert file_hash(file.path) == file.sha256
        assert file.atoms_min == file.atoms_max == 9


def test_preparing_again_finds_the_folder(prepared_ethanol: PreparedData, tiny_ethanol: XtbData) -> None:
    lines: list[str] = []
    before = prepared_ethanol.splits["train"].path.stat().st_mtime_ns
    again = prepare(tiny_ethanol, progress=lines.append)
    assert again == prepared_ethanol
    assert lines == []
    assert again.splits["train"].path.stat().st_mtime_ns == before


def test_the_hash_follows_the_file_content_and_not_its_path(ethanol_file: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "other.xyz"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes(ethanol_file.read_bytes())
    first = prepare(file_data(ethanol_file), cache=tmp_path / "cache")
    assert prepare(file_data(elsewhere), cache=tmp_path / "cache").hash == first.hash
    frames = ase.io.read(elsewhere, ":")
    frames[0].positions[0, 0] += 0.01
    ase.io.write(elsewhere, frames, format="extxyz")
    assert prepare(file_data(elsewhere), cache=tmp_path / "cache").hash != first.hash


def test_two_processes_that_prepare_at_once_both_succeed(ethanol_file: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        both = pool.starmap(_prepare_in, [(ethanol_file, tmp_path / "cache")] * 2)
    assert both[0] == both[1]
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == [both[0].folder.name]


def test_a_half_built_folder_does_not_count(ethanol_file: Path, tmp_path: Path) -> None:
    done = prepare(file_data(ethanol_file), cache=tmp_path / "cache")
    half = done.folder.with_name(f".building-{done.folder.name}-killed")
    done.folder.rename(half)
    (half / MANIFEST).unlink()
    assert prepare(file_data(ethanol_file), cache=tmp_path / "cache") == done


def test_what_a_killed_process_left_is_swept_after_a_day(ethanol_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    old, young, other = cache / ".building-old", cache / ".building-young", cache / "complete"
    for folder in (old, young, other):
        folder.mkdir(parents=True)
        (folder / "train.xyz").write_text("half a file")
    two_days_ago = time.time() - 2 * 86400.0
    for folder in (old, other):
        os.utime(folder, (two_days_ago, two_days_ago))
    prepared = prepare(file_data(ethanol_file), cache=cache)
    assert {entry.name for entry in cache.iterdir()} == {young.name, other.name, prepared.folder.name}


def test_a_cache_that_cannot_be_written_is_noticed_before_any_frame_is_made(ethanol_file: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the cache should be")
    lines: list[str] = []
    with pytest.raises(WorkloadError, match=r"^data: found .*taken.*: Not a directory.*TUNEBENCH_CACHE names another"):
        prepare(file_data(ethanol_file), cache=tmp_path / "taken" / "cache", progress=lines.append)
    assert lines == []


def test_a_full_disk_ends_in_one_line_and_leaves_nothing(ethanol_file: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        message = pool.apply(_prepare_without_room, (ethanol_file, tmp_path / "cache"))
    assert message.startswith("data: found ")
    assert "TUNEBENCH_CACHE" in message
    assert "\n" not in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_changed_file_is_noticed(ethanol_file: Path, tmp_path: Path) -> None:
    prepared = prepare(file_data(ethanol_file), cache=tmp_path / "cache")
    with prepared.splits["val"].path.open("a") as file:
        file.write("\n")
    with pytest.raises(WorkloadError, match=r"val\.xyz.*delete the folder"):
        load_prepared(prepared.folder)


def test_a_change_that_keeps_size_and_time_is_noticed_too(ethanol_file: Path, tmp_path: Path) -> None:
    prepared = prepare(file_data(ethanol_file), cache=tmp_path / "cache")
    path = prepared.splits["val"].path
    before = path.stat()
    content = path.read_bytes()
    path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(WorkloadError, match=r"val\.xyz.*delete the folder"):
        load_prepared(prepared.folder)


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"^data: found .*No such file"):
        load_prepared(tmp_path)


def test_splits_that_share_a_structure_are_refused_unless_allowed(ethanol_file: Path, tmp_path: Path) -> None:
    frames = ase.io.read(ethanol_file, ":")
    copy = frames[0].copy()
    copy.calc = frames[0].calc
    copy.rotate(40, (1, 2, 3))
    copy.translate([1.0, -2.0, 3.0])
    ase.io.write(tmp_path / "test.xyz", [copy, *frames[18:]], format="extxyz")
    ase.io.write(tmp_path / "train.xyz", frames[:18], format="extxyz")
    data = file_data(tmp_path / "train.xyz", train=14, test=3).model_copy(update={"test": str(tmp_path / "test.xyz")})
    with pytest.raises(WorkloadError, match=r"1 of \d+ (train|val) frames among the test frames \(1\)"):
        prepare(data, cache=tmp_path / "cache")
    allowed = prepare(data.model_copy(update={"allow_duplicates": True}), cache=tmp_path / "cache")
    assert allowed.splits["test"].frames == 3


def test_frames_keep_the_numbers_of_the_source(ethanol_file: Path, tmp_path: Path) -> None:
    prepared = prepare(file_data(ethanol_file), cache=tmp_path / "cache")
    source = {frame.get_potential_energy(): frame for frame in ase.io.read(ethanol_file, ":")}
    for frame in read_prepared(prepared.splits["train"].path):
        origin = source[frame.get_potential_energy()]
        np.testing.assert_array_equal(frame.get_forces(), origin.get_forces())
        np.testing.assert_array_equal(frame.positions, origin.positions)


def _prepare_in(path: Path, cache: Path) -> PreparedData:
    return prepare(file_data(path), cache=cache)


def _prepare_without_room(path: Path, cache: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        prepare(file_data(path), cache=cache)
    except WorkloadError as error:
        return str(error)
    return "no error"
