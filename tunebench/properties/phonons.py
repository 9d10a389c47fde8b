"""Harmonic phonons by phonopy: from a potential's forces on displaced supercells, or from forces that are given."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from tunebench.properties.measured import Curve, Floats, Measured, PropertyFailure, Value
from tunebench.properties.relaxation import relaxed
from tunebench.properties.structures import Crystal, Repeats, atoms_of
from tunebench.study.spec import NonNegativeFloat, PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator
    from phonopy import Phonopy

Point = Annotated[tuple[float, float, float], Field(strict=False)]
_FCC_POINTS: dict[str, tuple[float, float, float]] = {
    "Gamma": (0.0, 0.0, 0.0),
    "X": (0.5, 0.0, 0.5),
    "L": (0.5, 0.5, 0.5),
    "W": (0.5, 0.25, 0.75),
    "K": (0.375, 0.375, 0.75),
}


class PhononSettings(Section):
    """Force constants by finite displacements, in a supercell of the given cell."""

    property: Literal["phonons"] = "phonons"
    structure: Crystal = Field(description="the crystal, in the cell that `supercell` repeats")
    supercell: Repeats = Field(default=(2, 2, 2), description="repeats of the cell")
    displacement_angstrom: PositiveFloat = Field(default=0.01, description="of one atom")
    relax: bool = Field(default=True, description="relax atoms and cell first; else at the given lattice constant")
    fmax_ev_per_angstrom: PositiveFloat = Field(default=1e-5, description="forces left after the relaxation")
    max_steps: PositiveInt = Field(default=2000, description="steps of the relaxation")
    points: dict[str, Point] = Field(
        default_factory=lambda: dict(_FCC_POINTS),
        description="wave vectors by name, in reciprocal vectors of the primitive cell; default: those of fcc",
    )
    path: str | None = Field(
        default=None, description="band path in ASE's notation, such as GXWKGLUWLK; else ASE's own"
    )
    path_points: PositiveInt = Field(default=101, description="points of the band structure")
    mesh: Repeats = Field(default=(12, 12, 12), description="of the density of states")
    dos_points: PositiveInt = Field(default=201, description="frequencies of the density of states")
    dos_max_thz: PositiveFloat = Field(default=25.0, description="its highest frequency; the same for every model")
    dos_width_thz: PositiveFloat = Field(default=0.2, description="Gaussian smearing of the density of states")
    temperature_kelvin: PositiveFloat = Field(default=300.0, description="of the heat capacity")
    imaginary_allowed_thz: NonNegativeFloat = Field(
        default=0.05, description="imaginary frequencies up to this are rounding; beyond it the property has failed"
    )


def phonons(calculator: Calculator, settings: PhononSettings, base: Path | None = None) -> Measured:
    """Frequencies at the named points, band structure, density of states and heat capacity.

    Raises:
        PropertyFailure: no convergence of the relaxation, forces that are not finite, or imaginary modes.
    """
    atoms = atoms_of(settings.structure, base)
    if settings.relax:
        fmax, steps = settings.fmax_ev_per_angstrom, settings.max_steps
        atoms = relaxed(atoms, calculator, fmax=fmax, max_steps=steps, cell=True)
    phonon = phonopy_of(atoms, settings)
    phonon.generate_displacements(distance=settings.displacement_angstrom)
    phonon.forces = np.array(
        [_forces(calculator, supercell) for supercell in phonon.supercells_with_displacements], dtype=np.float64
    )
    phonon.produce_force_constants()
    phonon.symmetrize_force_constants()
    return spectrum(phonon, settings)


def phonon_units(settings: PhononSettings, base: Path | None = None) -> dict[str, str]:
    """Units of the scalars of `phonons`, with the branches of the structure before any relaxation."""
    branches = 3 * len(phonopy_of(atoms_of(settings.structure, base), settings).primitive)
    named = [f"{point}.{number}" for point in settings.points for number in range(1, branches + 1)]
    return {**dict.fromkeys([*named, "highest"], "THz"), "heat_capacity": "J/K/mol"}


def phonopy_of(atoms: Atoms, settings: PhononSettings) -> Phonopy:
    """Phonopy's object of a cell, its supercell and the primitive cell it finds."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms
    from phonopy.structure.cells import PrimitiveMatrixAutoDefaultWarning

    cell = PhonopyAtoms(symbols=atoms.get_chemical_symbols(), cell=atoms.cell.array, positions=atoms.positions)
    with warnings.catch_warnings():  # phonopy 4 warns where "auto" finds a smaller cell, which is what is asked for
        warnings.simplefilter("ignore", PrimitiveMatrixAutoDefaultWarning)
        return Phonopy(cell, supercell_matrix=np.diag(settings.supercell), primitive_matrix="auto", log_level=0)


def spectrum(phonon: Phonopy, settings: PhononSettings) -> Measured:
    """What `phonons` returns, from force constants.

    Args:
        phonon: with force constants.
        settings: points, path, mesh and what is allowed of imaginary modes.

    Raises:
        PropertyFailure: force constants that are not finite, or imaginary modes.
    """
    if not np.isfinite(phonon.force_constants).all():
        raise PropertyFailure("force constants are not finite")
    vectors, distances, marks = _path(phonon, settings)
    bands = _frequencies(phonon, vectors)
    named = _frequencies(phonon, np.array(list(settings.points.values()), dtype=np.float64))
    _check_stable(bands, vectors, settings)
    _check_stable(named, np.array(list(settings.points.values()), dtype=np.float64), settings)
    phonon.run_mesh(list(settings.mesh), is_gamma_center=True)
    _check_stable(phonon.mesh.frequencies, phonon.mesh.qpoints, settings)
    values = {
        f"{point}.{number}": Value(value=float(frequency), unit="THz")
        for point, branches in zip(settings.points, named, strict=True)
        for number, frequency in enumerate(branches, start=1)
    }
    values["highest"] = Value(value=float(max(phonon.mesh.frequencies.max(), bands.max())), unit="THz")
    values["heat_capacity"] = Value(value=_heat_capacity(phonon, settings), unit="J/K/mol")
    curves = {
        "bands": Curve(x=distances, y=bands, x_unit="share of the path", y_unit="THz", marks=marks),
        "density_of_states": _density_of_states(phonon, settings),
    }
    return Measured(values=values, curves=curves)


def _forces(calculator: Calculator, supercell: Any) -> Floats:
    from ase import Atoms

    atoms = Atoms(supercell.symbols, cell=supercell.cell, scaled_positions=supercell.scaled_positions, pbc=True)
    atoms.calc = calculator
    forces = np.array(atoms.get_forces(), dtype=np.float64)
    if not np.isfinite(forces).all():
        raise PropertyFailure("forces on a displaced supercell are not finite")
    return np.array(forces - forces.mean(axis=0), dtype=np.float64)  # what is left of a net force is rounding


def _path(phonon: Phonopy, settings: PhononSettings) -> tuple[Floats, Floats, tuple[tuple[str, float], ...]]:
    """Wave vectors along the path, where they lie on it between 0 and 1, and where its corners are.

    The corners come from the ideal lattice, so that calculations with other lattice constants have the same points.
    """
    from ase.cell import Cell

    cell = Cell(phonon.primitive.cell / np.cbrt(abs(np.linalg.det(phonon.primitive.cell))))
    path = cell.bandpath(settings.path, npoints=settings.path_points)
    distances, places, labels = path.get_linear_kpoint_axis()
    total = distances[-1]
    marks = tuple((label, float(place / total)) for label, place in zip(labels, places, strict=True))
    return np.array(path.kpts, dtype=np.float64), np.array(distances / total, dtype=np.float64), marks


def _frequencies(phonon: Phonopy, vectors: Floats) -> Floats:
    """Frequencies in THz, rising, imaginary ones as negative, shape (vectors, branches)."""
    phonon.run_qpoints(vectors)
    return np.sort(np.array(phonon.qpoints.frequencies, dtype=np.float64), axis=1)


def _check_stable(frequencies: Floats, vectors: Floats, settings: PhononSettings) -> None:
    lowest = float(frequencies.min())
    if not lowest >= -settings.imaginary_allowed_thz:
        where = vectors[int(np.argmin(frequencies.min(axis=1)))]
        text = ", ".join(f"{component:.3g}" for component in where)
        raise PropertyFailure(f"imaginary mode of {-lowest:.3g}i THz at ({text})")


def _heat_capacity(phonon: Phonopy, settings: PhononSettings) -> float:
    """At constant volume, of a mole of primitive cells; without the translations, which count by the sign of a zero."""
    temperature = settings.temperature_kelvin
    phonon.run_thermal_properties(t_min=temperature, t_max=temperature, t_step=1.0, exclude_gamma_acoustic=True)
    return float(phonon.thermal_properties.heat_capacity[0])


def _density_of_states(phonon: Phonopy, settings: PhononSettings) -> Curve:
    from scipy.stats import norm

    grid = np.linspace(0.0, settings.dos_max_thz, settings.dos_points, dtype=np.float64)
    weights = phonon.mesh.weights / phonon.mesh.weights.sum()
    spread = norm.pdf(grid[:, None, None], loc=phonon.mesh.frequencies[None], scale=settings.dos_width_thz)
    density = np.einsum("gqb,q->g", spread, weights)
    return Curve(x=grid, y=np.array(density, dtype=np.float64), x_unit="THz", y_unit="states/THz/cell")
