from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from nequip.data.dataset import ASEDataset
from nequip.utils import torch_default_dtype

from tunebench.study.paths import FramesOfFile
from tunebench.study.spec import ExtxyzKeys
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.structure_files import labelled_atoms, read_labelled, read_prepared, write_frames


@pytest.fixture
def crystals(rattled):
    return [
        labelled_atoms(f, energy=f.calc.results["energy"], forces=f.get_forces(), stress=f.get_stress())
        for f in rattled("Si", 3, seed=5, stress=True)
    ]


def energies(frames: dict[int, Atoms]) -> list[float]:
    return [frame.get_potential_energy() for frame in frames.values()]


def test_every_number_comes_back_bit_for_bit(tmp_path: Path, crystals) -> None:
    write_frames(tmp_path / "a.xyz", crystals)
    for frame, back in zip(crystals, read_prepared(tmp_path / "a.xyz"), strict=True):
        assert back.get_potential_energy() == frame.get_potential_energy()
        np.testing.assert_array_equal(back.get_forces(), frame.get_forces())
        np.testing.assert_array_equal(back.get_stress(), frame.get_stress())
        np.testing.assert_array_equal(back.positions, frame.positions)
        np.testing.assert_array_equal(back.cell.array, frame.cell.array)
        assert back.pbc.all()


def test_ase_alone_would_lose_digits(tmp_path: Path, crystals) -> None:
    ase.io.write(tmp_path / "a.xyz", crystals, format="extxyz")
    back = ase.io.read(tmp_path / "a.xyz")
    assert np.abs(back.get_forces() - crystals[0].get_forces()).max() > 1e-10


def test_nequips_own_dataset_reads_the_files(tmp_path: Path, crystals) -> None:
    write_frames(tmp_path / "a.xyz", crystals)
    with torch_default_dtype(torch.float64):
        dataset = ASEDataset(str(tmp_path / "a.xyz"))
    assert len(dataset) == 3
    assert dataset[0]["total_energy"].item() == crystals[0].get_potential_energy()
    np.testing.assert_array_equal(dataset[2]["forces"].numpy(), crystals[2].get_forces())
    np.testing.assert_array_equal(dataset[1]["stress"].numpy()[0], crystals[1].get_stress(voigt=False))


def test_whole_numbers_stay_real_numbers(tmp_path: Path, crystals) -> None:
    frame = labelled_atoms(crystals[0], energy=-20.0, forces=np.zeros((len(crystals[0]), 3)), stress=np.zeros(6))
    write_frames(tmp_path / "a.xyz", [frame])
    with torch_default_dtype(torch.float64):
        back = ASEDataset(str(tmp_path / "a.xyz"))[0]
    assert back["total_energy"].dtype is back["stress"].dtype is torch.float64
    assert back["total_energy"].item() == -20.0


def test_a_molecule_has_no_cell_and_no_stress(tmp_path: Path, rattled) -> None:
    frame = rattled("H2O", 1, seed=0)[0]
    forces = frame.get_forces()
    frame.cell = np.eye(3) * 10.0
    plain = labelled_atoms(frame, energy=-1.0, forces=forces, stress=np.ones(6))
    write_frames(tmp_path / "a.xyz", [plain])
    back = read_prepared(tmp_path / "a.xyz")[0]
    assert not back.pbc.any()
    assert back.cell.rank == 0
    assert "stress" not in back.calc.results


@pytest.mark.parametrize(("suffix", "opener"), [(".xz", lzma.open), (".gz", gzip.open)])
def test_compressed_files_read_like_plain_ones(ethanol_file: Path, suffix: str, opener) -> None:
    packed = ethanol_file.with_name(ethanol_file.name + suffix)
    with opener(packed, "wb") as file:
        file.write(ethanol_file.read_bytes())
    plain = read_labelled(FramesOfFile(ethanol_file), ExtxyzKeys(), "data.train")
    unpacked = read_labelled(FramesOfFile(packed), ExtxyzKeys(), "data.train")
    assert energies(plain) == energies(unpacked)


def test_labels_are_found_under_other_names(tmp_path: Path, rattled) -> None:
    frame = rattled("H2O", 1, seed=3)[0]
    forces, energy = frame.get_forces(), frame.get_potential_energy()
    frame.calc = None
    frame.info["REF_energy"], frame.arrays["REF_forces"] = energy, forces
    ase.io.write(tmp_path / "a.xyz", frame, format="extxyz")
    keys = ExtxyzKeys(energy="REF_energy", forces="REF_forces")
    back = read_labelled(FramesOfFile(tmp_path / "a.xyz"), keys, "data.train")[0]
    assert back.get_potential_energy() == pytest.approx(energy, abs=1e-12)
    np.testing.assert_allclose(back.get_forces(), forces, atol=1e-8)
    assert set(back.arrays) == {"numbers", "positions"}


def test_a_wrong_name_is_answered_with_the_names_there_are(ethanol_file: Path) -> None:
    with pytest.raises(WorkloadError, match=r"data\.keys\.forces: found 'dft_forces'.*forces") as caught:
        read_labelled(FramesOfFile(ethanol_file), ExtxyzKeys(forces="dft_forces"), "data.train")
    assert "\n" not in str(caught.value)


def test_nan_labels_are_refused_with_the_frame(tmp_path: Path, rattled) -> None:
    frames = rattled("H2O", 3, seed=3)
    frames[1].calc.results["forces"][0, 0] = np.nan
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    with pytest.raises(WorkloadError, match=r"data\.keys\.forces: found 'a\.xyz frame 1: 1 numbers"):
        read_labelled(FramesOfFile(tmp_path / "a.xyz"), ExtxyzKeys(), "data.train")


def test_a_file_that_is_no_structure_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.xyz").write_text("hello\nworld\n")
    with pytest.raises(WorkloadError, match=r"^data\.train: found .*allowed: a file that ASE can read$"):
        read_labelled(FramesOfFile(tmp_path / "notes.xyz"), ExtxyzKeys(), "data.train")


@pytest.mark.parametrize("part", ["3:12:2", "-4:", "::-5", "5", "-1", ":", "18:40"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_slice_takes_the_frames_that_ase_takes(ethanol_file: Path, part: str, packed: bool) -> None:
    path = ethanol_file
    if packed:
        path = ethanol_file.with_suffix(".xyz.xz")
        path.write_bytes(lzma.compress(ethanol_file.read_bytes()))
    taken = read_labelled(FramesOfFile(path, part), ExtxyzKeys(), "data.train")
    found = ase.io.read(f"{ethanol_file}@{part}")
    found = found if isinstance(found, list) else [found]
    assert energies(taken) == [frame.get_potential_energy() for frame in found]
    whole = ase.io.read(ethanol_file, ":")
    assert [whole[index].get_potential_energy() for index in taken] == energies(taken)


@pytest.mark.parametrize("part", ["20", "-21", "20:", "5:5", "3:1"])
def test_a_slice_of_no_frames_is_refused_with_what_the_file_has(ethanol_file: Path, part: str) -> None:
    with pytest.raises(
        WorkloadError, match=rf"^data\.ood\.far: found '.*ethanol\.xyz@{part}', .* the file's 20 frames$"
    ):
        read_labelled(FramesOfFile(ethanol_file, part), ExtxyzKeys(), "data.ood.far")


def test_a_frame_of_a_slice_is_named_by_its_index_in_the_file(tmp_path: Path, rattled) -> None:
    frames = rattled("H2O", 6, seed=3)
    frames[4].calc.results["forces"][0, 0] = np.nan
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    with pytest.raises(WorkloadError, match=r"data\.keys\.forces: found 'a\.xyz frame 4: 1 numbers"):
        read_labelled(FramesOfFile(tmp_path / "a.xyz", "-3:"), ExtxyzKeys(), "data.train")
    assert len(read_labelled(FramesOfFile(tmp_path / "a.xyz", ":4"), ExtxyzKeys(), "data.train")) == 4


@pytest.mark.parametrize("name", ["run@300K.xyz", "run@2:4"])
def test_a_name_with_an_at_sign_is_read_whole(ethanol_file: Path, name: str) -> None:
    path = ethanol_file.rename(ethanol_file.with_name(name))
    ase.io.write(path.with_name("run"), Atoms("H"), format="extxyz")  # what ASE would read if it cut the name
    assert len(read_labelled(FramesOfFile(path), ExtxyzKeys(), "data.train")) == 20
