from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.vibrations import Vibrations

from tunebench.properties.measured import PropertyFailure
from tunebench.properties.molecules import TorsionSettings, VibrationSettings, torsion, vibration_units, vibrations
from tunebench.properties.relaxation import relaxed
from tunebench.properties.structures import NamedMolecule, StructureFile, atoms_of


@pytest.fixture(scope="module")
def xtb() -> Calculator:
    from tblite.ase import TBLite

    return TBLite(method="GFN2-xTB", verbosity=0, accuracy=0.1)


def named(name: str) -> NamedMolecule:
    return NamedMolecule(kind="molecule", name=name)


def test_vibrations_are_those_of_ase_without_translations_and_rotations(xtb: Calculator, tmp_path: Path):
    settings = VibrationSettings(structure=named("methanol"), fmax_ev_per_angstrom=1e-3)
    found = vibrations(xtb, settings).values
    atoms = relaxed(atoms_of(settings.structure), xtb, fmax=1e-3, max_steps=500, cell=False)
    theirs = Vibrations(atoms, name=str(tmp_path / "vibrations"), delta=settings.displacement_angstrom)
    theirs.run()
    expected = theirs.get_frequencies().real[6:]
    assert len(expected) == 12
    assert [found[f"mode.{i}"].value for i in range(1, 13)] == pytest.approx(expected, abs=2.0)
    half_quanta = sum(expected) / 2 * 0.1239842
    assert found["zero_point_energy"].value == pytest.approx(half_quanta, abs=0.5)


@pytest.mark.parametrize(("name", "modes"), [("CO2", 4), ("water", 3), ("CO", 1)])
def test_a_linear_molecule_has_one_vibration_more(xtb: Calculator, name: str, modes: int):
    settings = VibrationSettings(structure=named(name), fmax_ev_per_angstrom=1e-3)
    found = vibrations(xtb, settings).values
    assert len(found) == modes + 1
    assert {key: value.unit for key, value in found.items()} == vibration_units(settings)
    if name == "CO2":
        assert found["mode.1"].value == pytest.approx(found["mode.2"].value, abs=0.5)


def test_a_saddle_point_has_no_vibrations(xtb: Calculator, tmp_path: Path):
    flat = Atoms("NH3", [[0, 0, 0], *([np.cos(a), np.sin(a), 0] for a in np.deg2rad([0, 120, 240]))])
    flat.write(tmp_path / "flat.xyz")
    structure = StructureFile(kind="file", path="flat.xyz")
    with pytest.raises(PropertyFailure, match="no minimum: imaginary vibration"):
        vibrations(xtb, VibrationSettings(structure=structure, fmax_ev_per_angstrom=1e-3), tmp_path)


def test_a_rigid_torsion_is_symmetric_and_a_relaxed_one_costs_less(xtb: Calculator):
    settings = TorsionSettings(structure=named("hydrogen-peroxide"), dihedral=(2, 0, 1, 3), points=6, relax=False)
    rigid = torsion(xtb, settings)
    energy = dict(zip(rigid.curves["energy"].x, rigid.curves["energy"].y, strict=True))
    assert energy[60.0] == pytest.approx(energy[-60.0], abs=0.5)
    assert max(energy, key=energy.__getitem__) == 0.0  # both hydrogen atoms on one side
    relaxed_scan = torsion(xtb, settings.model_copy(update={"relax": True}))
    assert 0 < relaxed_scan.values["barrier"].value < rigid.values["barrier"].value


@pytest.mark.parametrize(
    ("name", "dihedral", "reason"),
    [
        ("benzene", (0, 1, 2, 3), "between atoms 1 and 2 lies in a ring"),
        ("ethanol", (0, 2, 1, 3), "is no chain of bonded atoms"),
        ("ethanol", (0, 1, 2, 9), "names an atom beyond 8"),
    ],
)
def test_a_bond_that_cannot_turn_is_a_failed_property(
    xtb: Calculator, name: str, dihedral: tuple[int, int, int, int], reason: str
):
    settings = TorsionSettings(structure=named(name), dihedral=dihedral, points=4, fmax_ev_per_angstrom=0.01)
    with pytest.raises(PropertyFailure, match=reason):
        torsion(xtb, settings)
