from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.leaks import check_leaks, fingerprints, fingerprints_hash, shared_frames
from tunebench.workloads.structure_files import read_structures


def shared(first: Atoms, second: Atoms) -> bool:
    return bool(shared_frames(fingerprints([first]), fingerprints([second])))


def rattle(atoms: Atoms, seed: int, scale: float = 0.05) -> Atoms:
    moved = atoms.copy()
    moved.positions += np.random.default_rng(seed).normal(scale=scale, size=moved.positions.shape)
    return moved


@pytest.mark.parametrize(
    "atoms", [molecule("CH3CH2OH"), bulk("Si", cubic=True), bulk("NaCl", "rocksalt", a=5.6) * (2, 1, 1)]
)
def test_a_moved_turned_and_renumbered_copy_is_the_same(atoms: Atoms) -> None:
    frame = rattle(atoms, 1)
    copy = frame[np.random.default_rng(2).permutation(len(frame))]
    copy.rotate(33.0, (1.0, 2.0, -1.0), rotate_cell=True)
    copy.translate([3.3, -7.1, 0.4])
    assert shared(frame, copy)


def test_last_digits_of_a_text_file_do_not_hide_a_copy() -> None:
    frame = rattle(molecule("CH3CH2OH"), 1)
    assert all(shared(frame, rattle(frame, seed, scale=1e-6)) for seed in range(20))


def test_neighbouring_snapshots_are_different() -> None:
    frame = rattle(molecule("CH3CH2OH"), 1)
    assert not shared(frame, rattle(frame, 2, scale=3e-3))


def test_exchanged_species_are_different() -> None:
    frame = rattle(bulk("NaCl", "rocksalt", a=5.6) * (2, 2, 1), 1)
    swapped = frame.copy()
    swapped.numbers[[0, 1]] = swapped.numbers[[1, 0]]
    assert not shared(frame, swapped)


def test_a_strained_crystal_is_different() -> None:
    crystal = bulk("Si", cubic=True)
    strained = crystal.copy()
    strained.set_cell(crystal.cell.array * 1.001, scale_atoms=True)
    assert not shared(crystal, strained)


def test_a_molecule_and_its_periodic_image_are_different() -> None:
    free = molecule("H2O")
    box = free.copy()
    box.set_cell([9.0, 9.0, 9.0])
    box.pbc = True
    assert not shared(free, box)


def test_the_hash_ignores_the_order_of_frames() -> None:
    frames = [rattle(molecule("H2O"), seed) for seed in range(3)]
    assert fingerprints_hash(fingerprints(frames)) == fingerprints_hash(fingerprints(frames[::-1]))
    assert fingerprints_hash(fingerprints(frames)) != fingerprints_hash(fingerprints(frames[:2]))


def test_a_leak_names_both_splits_and_counts_frames() -> None:
    frames = [rattle(molecule("H2O"), seed) for seed in range(6)]
    prints = {"train": fingerprints(frames[:4]), "test": fingerprints(frames[2:])}
    with pytest.raises(WorkloadError, match=r"^data: found '2 of 4 train frames among the test frames \(2\)"):
        check_leaks(prints)


@pytest.mark.data
def test_strained_crystals_of_mlearn_recur_turned_by_symmetry(reference_data) -> None:
    train, test = (
        read_structures(reference_data / "mlearn" / f"Si_{split}.xyz.xz", "data.train") for split in ("train", "test")
    )
    pairs = shared_frames(fingerprints(train), fingerprints(test))
    assert {there for _, there in pairs} == {22, 23, 24}
    assert all(abs(train[a].get_potential_energy() - test[b].get_potential_energy()) < 1e-5 for a, b in pairs)


@pytest.mark.data
def test_published_splits_of_rmd17_ethanol_share_nothing(reference_data) -> None:
    train, test = (
        fingerprints(read_structures(reference_data / "rmd17" / f"ethanol_{split}.xyz.xz", "data.train"))
        for split in ("train", "test")
    )
    assert shared_frames(train, test) == []
