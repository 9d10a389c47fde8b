"""Molecules: relaxed shape, harmonic vibrations, and the energy along a torsion."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from tunebench.properties.bonds import bonds
from tunebench.properties.measured import Curve, Floats, Measured, PropertyFailure, Value
from tunebench.properties.relaxation import relaxed
from tunebench.properties.structures import Molecule, atoms_of
from tunebench.study.spec import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

_LINEAR = 1e-3  # smallest share of a moment of inertia that a molecule which is not linear has


class VibrationSettings(Section):
    """Harmonic vibrations of a relaxed molecule from central differences of its forces."""

    property: Literal["vibrations"] = "vibrations"
    structure: Molecule = Field(description="the molecule that relaxation starts from")
    fmax_ev_per_angstrom: PositiveFloat = Field(default=1e-4, description="forces left after the relaxation")
    max_steps: PositiveInt = Field(default=1000, description="steps of the relaxation")
    displacement_angstrom: PositiveFloat = Field(default=0.005, description="of every coordinate, both ways")
    imaginary_allowed_per_cm: NonNegativeFloat = Field(
        default=10.0, description="imaginary wavenumbers up to this are rounding; beyond it the property has failed"
    )


def vibrations(calculator: Calculator, settings: VibrationSettings, base: Path | None = None) -> Measured:
    """Wavenumbers of all vibrations, rising, with translations and rotations projected out, and the zero-point energy.

    Raises:
        PropertyFailure: no convergence, forces that are not finite, or a stationary point that is no minimum.
    """
    atoms = _relaxed_molecule(calculator, settings, base)
    wavenumbers = _wavenumbers(atoms, hessian(atoms, settings.displacement_angstrom))
    if not wavenumbers.min() >= -settings.imaginary_allowed_per_cm:
        raise PropertyFailure(f"no minimum: imaginary vibration of {-wavenumbers.min():.3g}i cm⁻¹")
    from ase.units import invcm

    zero_point = 500.0 * invcm * np.clip(wavenumbers, 0.0, None).sum()
    values = {
        **{f"mode.{i}": Value(value=float(x), unit="cm⁻¹") for i, x in enumerate(wavenumbers, start=1)},
        "zero_point_energy": Value(value=float(zero_point), unit="meV"),
    }
    return Measured(values=values)


def vibration_units(settings: VibrationSettings, base: Path | None = None) -> dict[str, str]:
    """Units of the scalars of `vibrations`; the relaxed molecule counts as linear where the given one is."""
    atoms = atoms_of(settings.structure, base)
    modes = 3 * len(atoms) - len(_rigid_motions(atoms))
    return {**{f"mode.{number}": "cm⁻¹" for number in range(1, modes + 1)}, "zero_point_energy": "meV"}


def hessian(atoms: Atoms, displacement: float) -> Floats:
    """Second derivatives of the energy by central differences of the forces.

    Args:
        atoms: with a calculator, which should compute in float64.
        displacement: Å.

    Returns:
        Symmetric, eV/Å², shape (3 atoms, 3 atoms).
    """
    moved = atoms.copy()
    moved.calc = atoms.calc
    rows = []
    for index in np.ndindex(len(atoms), 3):
        forces = []
        for sign in (1.0, -1.0):
            moved.positions[:] = atoms.positions
            moved.positions[index] += sign * displacement
            forces.append(moved.get_forces().ravel())
        rows.append((forces[1] - forces[0]) / (2 * displacement))
    found = np.array(rows, dtype=np.float64)
    if not np.isfinite(found).all():
        raise PropertyFailure("forces on a displaced molecule are not finite")
    return (found + found.T) / 2


def _relaxed_molecule(
    calculator: Calculator, settings: VibrationSettings | TorsionSettings, base: Path | None
) -> Atoms:
    atoms = atoms_of(settings.structure, base)
    fmax, steps = settings.fmax_ev_per_angstrom, settings.max_steps
    found = relaxed(atoms, calculator, fmax=fmax, max_steps=steps, cell=False)
    if bonds(found).keys() != bonds(atoms).keys():
        raise PropertyFailure("relaxation broke or made a bond")
    return found


def _wavenumbers(atoms: Atoms, second_derivatives: Floats) -> Floats:
    """Rising, cm⁻¹, imaginary ones as negative; shape (vibrations,)."""
    from ase.units import _amu, _c, _e

    weights = 1.0 / np.sqrt(atoms.get_masses().repeat(3))
    dynamical = second_derivatives * np.outer(weights, weights)
    rigid = _rigid_motions(atoms) / weights  # mass-weighted
    rest = np.linalg.svd(rigid)[2][len(rigid) :]
    squares = np.linalg.eigvalsh(rest @ dynamical @ rest.T)  # eV/Å²/u
    per_second = np.sqrt(np.abs(squares) * _e * 1e20 / _amu) / (2 * np.pi)
    return np.array(np.sign(squares) * per_second / (100.0 * _c), dtype=np.float64)


def _rigid_motions(atoms: Atoms) -> Floats:
    """Translations and rotations, three for a linear molecule's two rotations less, shape (motions, 3 atoms)."""
    positions = atoms.positions - atoms.get_center_of_mass()
    motions = [np.tile(axis, len(atoms)) for axis in np.eye(3)]
    moments, axes = atoms.get_moments_of_inertia(vectors=True)
    turning = [axis for moment, axis in zip(moments, axes, strict=True) if moment > _LINEAR * max(moments)]
    motions += [np.cross(axis, positions).ravel() for axis in turning]
    return np.array(motions, dtype=np.float64)


class TorsionSettings(Section):
    """Energy of a molecule as one of its bonds is turned."""

    property: Literal["torsion"] = "torsion"
    structure: Molecule = Field(description="the molecule that relaxation starts from")
    dihedral: Annotated[
        tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt, NonNegativeInt],
        Field(strict=False, description="four bonded atoms in a chain; the bond between the second and third turns"),
    ]
    points: Annotated[int, Field(ge=4)] = Field(default=24, description="angles, evenly over the full turn")
    relax: bool = Field(default=True, description="relax all but the dihedral at every angle; else a rigid scan")
    fmax_ev_per_angstrom: PositiveFloat = Field(default=1e-3, description="forces left after every relaxation")
    max_steps: PositiveInt = Field(default=500, description="steps of a relaxation")


def torsion(calculator: Calculator, settings: TorsionSettings, base: Path | None = None) -> Measured:
    """Barrier and angle of the minimum, and the energy over the dihedral's angle from -180 degrees on.

    Every angle starts from the relaxed molecule with one side turned as a whole, so no angle depends on another.

    Raises:
        PropertyFailure: no convergence at some angle, the bond lies in a ring, or a bond broke.
    """
    atoms = _relaxed_molecule(calculator, settings, base)
    side = _turning_side(atoms, settings.dihedral)
    angles = -180.0 + 360.0 / settings.points * np.arange(settings.points, dtype=np.float64)
    energies = np.array([_energy_at(atoms, angle, side, settings) for angle in angles], dtype=np.float64)
    if not np.isfinite(energies).all():
        raise PropertyFailure("an energy of the scan is not finite")
    relative = 1000.0 * (energies - energies.min())
    values = {
        "barrier": Value(value=float(relative.max()), unit="meV"),
        "lowest_angle": Value(value=abs(float(angles[relative.argmin()])), unit="degree"),
        "rms": Value(value=float(np.sqrt(np.mean(np.square(relative - relative.mean())))), unit="meV"),
    }
    return Measured(values=values, curves={"energy": Curve(x=angles, y=relative, x_unit="degree", y_unit="meV")})


TORSION_UNITS = {"barrier": "meV", "lowest_angle": "degree", "rms": "meV"}


def _energy_at(atoms: Atoms, angle: float, side: list[int], settings: TorsionSettings) -> float:
    from ase.constraints import FixInternals

    turned = atoms.copy()
    turned.set_dihedral(*settings.dihedral, angle, indices=side)
    turned.calc = atoms.calc
    if not settings.relax:
        return float(turned.get_potential_energy())
    turned.set_constraint(FixInternals(dihedrals_deg=[[angle, list(settings.dihedral)]]))
    try:
        fmax, steps = settings.fmax_ev_per_angstrom, settings.max_steps
        found = relaxed(turned, atoms.calc, fmax=fmax, max_steps=steps, cell=False)
    except PropertyFailure as failure:
        raise PropertyFailure(f"at {angle:g} degrees: {failure}") from failure
    if bonds(found).keys() != bonds(atoms).keys():
        raise PropertyFailure(f"at {angle:g} degrees: relaxation broke or made a bond")
    return float(found.get_potential_energy())


def _turning_side(atoms: Atoms, dihedral: tuple[int, int, int, int]) -> list[int]:
    """Atoms on the third atom's side of the bond that turns."""
    if max(dihedral) >= len(atoms):
        raise PropertyFailure(f"dihedral {dihedral} names an atom beyond {len(atoms) - 1}")
    bonded = bonds(atoms).keys()
    if not all((min(pair), max(pair)) in bonded for pair in pairwise(dihedral)):
        raise PropertyFailure(f"dihedral {dihedral} is no chain of bonded atoms")
    _, fixed, turning, _ = dihedral
    cut = bonded - {(min(fixed, turning), max(fixed, turning))}
    side, found = {turning}, {turning}
    while found:
        found = {j for pair in cut for i, j in (pair, pair[::-1]) if i in found} - side
        side |= found
    if fixed in side:
        raise PropertyFailure(f"the bond between atoms {fixed} and {turning} lies in a ring")
    return sorted(side)
