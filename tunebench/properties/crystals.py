"""Crystals: lattice constant, equation of state, elastic constants; by matcalc with everything set that it defaults."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import AfterValidator, Field

from tunebench.properties.measured import Curve, Floats, Measured, PropertyFailure, Value
from tunebench.properties.relaxation import relaxed
from tunebench.properties.structures import Crystal, atoms_of
from tunebench.study.spec import PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

_VOIGT = [(i, j) for i in range(6) for j in range(i, 6)]
_CUBIC = {"C11": [(0, 0), (1, 1), (2, 2)], "C12": [(0, 1), (0, 2), (1, 2)], "C44": [(3, 3), (4, 4), (5, 5)]}
_ALL = {f"C{i + 1}{j + 1}": [(i, j)] for i, j in _VOIGT}
_MODULI = ("bulk_modulus_vrh", "shear_modulus_vrh")


def _not_zero(strain: float) -> float:
    if strain == 0:
        raise ValueError("0.0; allowed: a strain other than 0")
    return strain


Strain = Annotated[float, Field(gt=-0.2, lt=0.2), AfterValidator(_not_zero)]
Strains = Annotated[tuple[Strain, ...], Field(strict=False, min_length=2)]


class EquationOfStateSettings(Section):
    """Energy against volume around the relaxed crystal."""

    property: Literal["equation_of_state"] = "equation_of_state"
    structure: Crystal = Field(description="the crystal")
    fmax_ev_per_angstrom: PositiveFloat = Field(default=1e-4, description="forces left after every relaxation")
    max_steps: PositiveInt = Field(default=2000, description="steps of a relaxation")
    max_linear_strain: Annotated[float, Field(gt=0.0, lt=0.15)] = Field(
        default=0.02, description="largest change of the lattice constant, as a share of it; the volume's is threefold"
    )
    points: Annotated[int, Field(ge=5)] = Field(default=11, description="volumes, the relaxed one in the middle")
    relax_shape: bool = Field(default=False, description="relax the cell's shape at every volume; needless if cubic")
    largest_misfit: PositiveFloat = Field(
        default=0.01, description="1 - R² of the Birch-Murnaghan fit at which the property has failed"
    )


def equation_of_state(calculator: Calculator, settings: EquationOfStateSettings, base: Path | None = None) -> Measured:
    """Lattice constants, volume and energy of the relaxed crystal, and its Birch-Murnaghan bulk modulus.

    Raises:
        PropertyFailure: a relaxation did not converge, or the curve is no equation of state.
    """
    from matcalc import EOSCalc

    crystal = _relaxed_crystal(calculator, settings, base)
    with _complaints() as complaints:
        found = EOSCalc(
            calculator,
            max_abs_strain=settings.max_linear_strain,
            n_points=settings.points,
            fmax=settings.fmax_ev_per_angstrom,
            max_steps=settings.max_steps,
            allow_shape_change=settings.relax_shape,
            relax_structure=False,
            r2_min=-1.0,
        ).calc(crystal)
    if complaints:
        raise PropertyFailure(complaints[0])
    if not 1.0 - found["r2_score_bm"] <= settings.largest_misfit:
        raise PropertyFailure(f"energy against volume is no equation of state: R² {found['r2_score_bm']:.4f}")
    lengths = {name: Value(value=float(x), unit="Å") for name, x in zip("abc", crystal.cell.lengths(), strict=True)}
    atoms = len(crystal)
    volumes = np.array(found["eos"]["volumes"], dtype=np.float64) / atoms
    energies = np.array(found["eos"]["energies"], dtype=np.float64) / atoms
    relative = Curve(
        x=volumes / (crystal.get_volume() / atoms),
        y=energies - energies.min(),
        x_unit="volume / relaxed volume",
        y_unit="eV/atom",
    )
    return Measured(
        values={
            **lengths,
            "volume_per_atom": Value(value=float(crystal.get_volume()) / atoms, unit="Å³/atom"),
            "energy_per_atom": Value(value=float(crystal.get_potential_energy()) / atoms, unit="eV/atom"),
            "bulk_modulus": Value(value=float(found["bulk_modulus_bm"]), unit="GPa"),
        },
        curves={"energy_of_volume": relative},
    )


EQUATION_OF_STATE_UNITS = {
    "a": "Å",
    "b": "Å",
    "c": "Å",
    "volume_per_atom": "Å³/atom",
    "energy_per_atom": "eV/atom",
    "bulk_modulus": "GPa",
}


class ElasticSettings(Section):
    """Stress against strain around the relaxed crystal; the strain components are those of pymatgen."""

    property: Literal["elastic"] = "elastic"
    structure: Crystal = Field(description="the crystal")
    fmax_ev_per_angstrom: PositiveFloat = Field(default=1e-4, description="forces left after every relaxation")
    max_steps: PositiveInt = Field(default=2000, description="steps of the first relaxation")
    normal_strains: Strains = Field(default=(-0.01, -0.005, 0.005, 0.01), description="strains along an axis")
    shear_strains: Strains = Field(default=(-0.01, -0.005, 0.005, 0.01), description="shears")
    relax_ions: bool = Field(default=True, description="relax the atoms of every strained cell; else clamped ions")
    cubic: bool = Field(default=True, description="report C11, C12 and C44, averaged over the axes; else all 21")
    largest_misfit: PositiveFloat = Field(
        default=0.1, description="RMS of stress minus fit over RMS of stress at which the property has failed"
    )


def elastic(calculator: Calculator, settings: ElasticSettings, base: Path | None = None) -> Measured:
    """Elastic constants and Voigt-Reuss-Hill moduli in GPa, from a linear fit of stress to strain.

    Raises:
        PropertyFailure: a relaxation did not converge, stress is not linear in strain, or the crystal is unstable
            (Born: the tensor has an eigenvalue below 0).
    """
    from matcalc import ElasticityCalc

    crystal = _relaxed_crystal(calculator, settings, base)
    # matcalc's own measure of the fit averages R² over components that are zero by symmetry, whose R² is noise
    # (0.33 for copper); it is switched off and replaced by `_misfit`.
    with _complaints() as complaints:
        found = ElasticityCalc(
            calculator,
            norm_strains=settings.normal_strains,
            shear_strains=settings.shear_strains,
            fmax=settings.fmax_ev_per_angstrom,
            relax_structure=False,
            relax_deformed_structures=settings.relax_ions,
            units_GPa=True,
            r2_min=-1.0,
            relax_calc_kwargs={"max_steps": settings.max_steps},
        ).calc(crystal)
    if complaints:
        raise PropertyFailure(complaints[0])
    tensor = np.array(found["elastic_tensor"].voigt, dtype=np.float64)
    _check_fit(tensor, float(found["residuals_sum"]), settings)
    lowest = float(np.linalg.eigvalsh((tensor + tensor.T) / 2).min())
    if not lowest > 0:
        raise PropertyFailure(f"mechanically unstable: the elastic tensor has an eigenvalue of {lowest:.3g} GPa")
    means = {name: np.mean([tensor[place] for place in places]) for name, places in _constants(settings).items()}
    moduli = {name: found[name] for name in _MODULI}
    return Measured(values={name: Value(value=float(x), unit="GPa") for name, x in {**means, **moduli}.items()})


def elastic_units(settings: ElasticSettings) -> dict[str, str]:
    """Units of the scalars of `elastic`."""
    return dict.fromkeys([*_constants(settings), *_MODULI], "GPa")


def _constants(settings: ElasticSettings) -> dict[str, list[tuple[int, int]]]:
    return _CUBIC if settings.cubic else _ALL


def _check_fit(tensor: Floats, residuals: float, settings: ElasticSettings) -> None:
    """Compare what the straight lines leave with what they explain.

    matcalc sums squared residuals in (eV/Å³)² and converts the sum to GPa once, so it is converted back here.
    """
    from ase.units import GPa

    strain_squares = np.array(
        [np.square(settings.normal_strains).sum(), np.square(2.0 * np.array(settings.shear_strains)).sum()],
        dtype=np.float64,
    ).repeat(3)  # Voigt's shear is twice the tensor's
    explained = float((np.square(tensor * GPa) * strain_squares[:, None]).sum())
    misfit = np.sqrt(residuals * GPa / explained) if explained > 0 else np.inf
    if not misfit <= settings.largest_misfit:
        raise PropertyFailure(
            f"stress is not linear in strain: misfit {misfit:.3g}, allowed: {settings.largest_misfit:g}"
        )


def _relaxed_crystal(
    calculator: Calculator, settings: EquationOfStateSettings | ElasticSettings, base: Path | None
) -> Atoms:
    atoms = atoms_of(settings.structure, base)
    if not atoms.pbc.all():
        raise PropertyFailure(f"{atoms.get_chemical_formula()} is not periodic in all directions")
    return relaxed(atoms, calculator, fmax=settings.fmax_ev_per_angstrom, max_steps=settings.max_steps, cell=True)


class _Collector(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """Warnings that matcalc logs inside the block: it says there, and nowhere else, what did not converge."""
    logger, collector = logging.getLogger("matcalc"), _Collector()
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(collector)
    try:
        yield collector.lines
    finally:
        logger.removeHandler(collector)
        logger.propagate = propagates
