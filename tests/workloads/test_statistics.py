from __future__ import annotations

import ase.io
import numpy as np
import pytest
from nequip.data import CommonDataStatisticsManager
from torch.utils.data import DataLoader

from tunebench.study.spec import ExtxyzData, SplitFrames
from tunebench.workloads.data import PreparedData, prepare
from tunebench.workloads.frames import prepared_frames
from tunebench.workloads.statistics import fit_energy_shifts, training_statistics
from tunebench.workloads.structure_files import read_prepared


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Water, hydrogen and oxygen with energies that a sum over atoms explains exactly: H -3 eV, O -7 eV."""
    from ase.build import molecule
    from ase.calculators.singlepoint import SinglePointCalculator

    rng = np.random.default_rng(0)
    frames = []
    for name in ("H2O", "H2", "O2", "H2O2") * 5:
        frame = molecule(name)
        frame.positions += rng.normal(scale=0.05, size=frame.positions.shape)
        energy = sum({1: -3.0, 8: -7.0}[number] for number in frame.numbers)
        frame.calc = SinglePointCalculator(frame, energy=energy, forces=rng.normal(size=(len(frame), 3)))
        frames.append(frame)
    path = tmp_path_factory.mktemp("mixture") / "all.xyz"
    ase.io.write(path, frames, format="extxyz")
    return prepare(ExtxyzData(source="extxyz", train=str(path), frames=SplitFrames(train=12, val=4, test=4)))


def test_shifts_explain_energies_that_are_sums_over_atoms(mixture: PreparedData) -> None:
    statistics = training_statistics(mixture, 3.0)
    assert mixture.type_names == ("H", "O")
    np.testing.assert_allclose(statistics.per_type_energy_shifts, [-3.0, -7.0], atol=1e-10)
    assert not statistics.degenerate
    assert statistics.note == ""


def test_one_composition_gives_the_minimum_norm_solution_and_says_so(prepared_ethanol: PreparedData) -> None:
    statistics = training_statistics(prepared_ethanol, 3.0)
    assert statistics.degenerate
    assert "1 independent compositions for 3 species" in statistics.note
    hydrogen, carbon, oxygen = statistics.per_type_energy_shifts
    energies = [frame.get_potential_energy() for frame in read_prepared(prepared_ethanol.splits["train"].path)]
    assert 6 * hydrogen + 2 * carbon + oxygen == pytest.approx(np.mean(energies), abs=1e-8)
    assert (hydrogen / 6, carbon / 2) == pytest.approx((oxygen, oxygen), abs=1e-8)


def test_force_rms_and_neighbours_are_those_nequip_computes(prepared_ethanol: PreparedData) -> None:
    dataset = prepared_frames(prepared_ethanol, "train", 3.0)
    manager = CommonDataStatisticsManager(
        dataloader_kwargs={"batch_size": 3}, type_names=list(prepared_ethanol.type_names)
    )
    from nequip.data import AtomicDataDict

    theirs = manager.get_statistics(DataLoader(dataset, batch_size=3, collate_fn=AtomicDataDict.batched_from_list))
    ours = training_statistics(prepared_ethanol, 3.0)
    assert ours.force_rms == pytest.approx(theirs["forces_rms"], rel=1e-10)
    assert ours.avg_num_neighbors == pytest.approx(theirs["num_neighbors_mean"], rel=1e-10)


def test_masked_forces_do_not_enter_the_force_scale(prepared_ethanol: PreparedData) -> None:
    statistics = training_statistics(prepared_ethanol, 3.0, force_fraction=0.3, label_seed=4)
    dataset = prepared_frames(prepared_ethanol, "train", 3.0, 0.3, 4)
    forces = [frame.get_forces() for frame in read_prepared(prepared_ethanol.splits["train"].path)]
    labelled = np.concatenate([force for force, kept in zip(forces, dataset.labelled, strict=True) if kept])
    assert statistics.labelled_frames == 3
    assert statistics.force_rms == pytest.approx(np.sqrt(np.mean(labelled**2)), rel=1e-12)


def test_without_labelled_forces_the_spread_of_energies_takes_their_place(prepared_ethanol: PreparedData) -> None:
    statistics = training_statistics(prepared_ethanol, 3.0, force_fraction=0.0)
    energies = [frame.get_potential_energy() / 9 for frame in read_prepared(prepared_ethanol.splits["train"].path)]
    assert statistics.labelled_frames == 0
    assert statistics.force_rms == pytest.approx(np.std(energies), rel=1e-6)
    assert "no labelled forces" in statistics.note


def test_the_force_scale_is_never_zero(mixture: PreparedData) -> None:
    assert training_statistics(mixture, 3.0, force_fraction=0.0).force_rms > 0.0


def test_atoms_out_of_reach_count_as_one_neighbour_not_as_none(prepared_ethanol: PreparedData) -> None:
    statistics = training_statistics(prepared_ethanol, 0.5)
    assert statistics.avg_num_neighbors == 1.0
    assert "no neighbours within 0.5" in statistics.note


def test_a_frame_counts_per_atom_as_in_the_loss() -> None:
    counts = np.array([[1.0], [10.0]])
    fit = fit_energy_shifts(counts, np.array([-1.0, -30.0]))
    assert fit.shifts[0] == pytest.approx(-2.0)
    np.testing.assert_allclose(fit.residuals, [1.0, -1.0])
