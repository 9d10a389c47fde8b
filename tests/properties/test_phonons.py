from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from matcalc import PhononCalc

from tunebench.properties.measured import PropertyFailure
from tunebench.properties.phonons import PhononSettings, phonon_units, phonons
from tunebench.properties.phonons_from_forces import phonons_from_forces
from tunebench.properties.stated import StatedFile, stated_values
from tunebench.properties.structures import BuiltCrystal, atoms_of
from tunebench.workloads.structure_files import read_structures


def test_phonons_of_copper_equal_matcalc_called_directly(copper: BuiltCrystal):
    settings = PhononSettings(structure=copper, relax=False, displacement_angstrom=0.015)
    direct = PhononCalc(
        EMT(), atom_disp=0.015, supercell_matrix=2 * np.eye(3), relax_structure=False, write_phonon=False, t_max=300
    ).calc(atoms_of(copper))["phonon"]
    found = phonons(EMT(), settings).values
    # matcalc keeps the cell of four atoms, whose branches at its zone centre are those of fcc at Gamma and X.
    direct.run_qpoints([[0.0, 0.0, 0.0]])
    folded = np.sort(direct.qpoints.frequencies[0])
    ours = np.sort([found[f"Gamma.{i}"].value for i in (1, 2, 3)] + 3 * [found[f"X.{i}"].value for i in (1, 2, 3)])
    assert ours == pytest.approx(folded, abs=1e-4)


def test_silicon_has_the_stated_frequencies_from_its_dft_forces(reference_data: Path):
    folder = reference_data / "phonon_sets"
    stated = StatedFile(path=str(folder / "phonon_reference.json"), at="Si-PBE.frequencies_THz")
    silicon = BuiltCrystal(kind="crystal", formula="Si", lattice="diamond", a_angstrom=5.46626289)
    settings = PhononSettings(structure=silicon)
    frames = read_structures(folder / "Si_PBE_train.xyz.xz", "path")
    found = phonons_from_forces(frames, settings, displaced_atoms=1)
    known = stated_values(stated, phonon_units(settings))
    assert len(known) == 5 * 6
    for name, value in known.items():
        assert found.values[name].value == pytest.approx(value, abs=0.05), name
    for name, value in {"Gamma.4": 15.09, "X.1": 4.40, "X.3": 12.05, "X.5": 13.42}.items():
        assert found.values[name].value == pytest.approx(value, abs=0.05), name
    density = found.curves["density_of_states"]
    assert np.trapezoid(density.y, density.x) == pytest.approx(6.0, abs=0.01)


@pytest.fixture(scope="module")
def thermal_copper(copper: BuiltCrystal) -> list[Atoms]:
    """Displaced supercells of copper with forces, their atoms in another order and their origin elsewhere."""
    generator, frames = np.random.default_rng(0), []
    for _ in range(3):
        frame = atoms_of(copper).repeat((2, 2, 2))
        frame.positions += generator.normal(0.0, 0.003, (len(frame), 3)) + np.array([0.7, -3.1, 11.0])
        frame = frame[generator.permutation(len(frame))]
        frame.wrap()
        frame.calc = EMT()
        frame.calc = SinglePointCalculator(frame, forces=frame.get_forces())
        frames.append(frame)
    return frames


def test_forces_of_displaced_supercells_give_the_phonons_in_any_order_and_at_any_origin(
    copper: BuiltCrystal, thermal_copper: list[Atoms]
):
    settings = PhononSettings(structure=copper, relax=False)
    differences, forces = phonons(EMT(), settings), phonons_from_forces(thermal_copper, settings)
    for name, value in differences.values.items():
        assert forces.values[name].value == pytest.approx(value.value, abs=0.03), name


def test_frames_of_another_structure_are_refused(copper: BuiltCrystal, thermal_copper: list[Atoms]):
    larger = PhononSettings(structure=copper, supercell=(3, 2, 2))
    with pytest.raises(PropertyFailure, match="a frame of 32 atoms is not the supercell of 48 atoms"):
        phonons_from_forces(thermal_copper, larger)
    melted = [frame.copy() for frame in thermal_copper]
    for frame in melted:
        frame.positions += np.random.default_rng(1).normal(0.0, 1.0, (len(frame), 3))
    with pytest.raises(PropertyFailure, match=r"further than 0\.5 Å"):
        phonons_from_forces(melted, PhononSettings(structure=copper))
    with pytest.raises(PropertyFailure, match="no frame with 1 displaced atoms among 3"):
        phonons_from_forces(thermal_copper, PhononSettings(structure=copper), displaced_atoms=1)


def test_an_imaginary_mode_is_a_failed_property_that_says_where(copper: BuiltCrystal):
    simple = copper.model_copy(update={"lattice": "sc", "a_angstrom": 2.35})
    with pytest.raises(PropertyFailure, match=r"imaginary mode of .*i THz at \("):
        phonons(EMT(), PhononSettings(structure=simple, supercell=(3, 3, 3), points={"X": (0.5, 0.0, 0.0)}))
