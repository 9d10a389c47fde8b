"""Coexistence cells: a crystal of which one half has been melted, at zero pressure and a given temperature."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from tunebench.properties.dynamics import DynamicsSettings, Guard, give_velocities, langevin, run
from tunebench.properties.measured import Floats, PropertyFailure
from tunebench.properties.order import averaged_bond_order
from tunebench.properties.pressure import Barostat
from tunebench.properties.structures import Crystal, Repeats, atoms_of
from tunebench.study.spec import NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

_MOLTEN = 0.6  # share of a perfect crystal's bond order that a melt does not have; copper's has 0.3, hot crystals 0.75
_BAROSTAT_EVERY = 5  # steps


class InterfaceSettings(DynamicsSettings):
    """A coexistence cell: crystal below, melt above, periodic along the normal z, so with two interfaces."""

    property: Literal["interface"] = "interface"
    structure: Crystal = Field(description="orthorhombic cell of the crystal, repeated along z to an even number")
    supercell: Repeats = Field(default=(4, 4, 12), description="repeats; the third is the normal and the longest")
    temperature_kelvin: PositiveFloat = Field(description="of crystal, melt and interface")
    melt_kelvin: PositiveFloat = Field(description="at which one half is melted, well above the melting point")
    crystal_ps: NonNegativeFloat = Field(
        default=2.0, description="crystal alone at zero pressure; the second half of it gives the lattice constant"
    )
    melt_ps: PositiveFloat = Field(default=2.0, description="one half at the melting temperature, the other held")
    equilibration_ps: NonNegativeFloat = Field(default=1.0, description="both halves together before anything counts")
    duration_ps: PositiveFloat = Field(default=10.0, description="dynamics over which the front is followed")
    order_cutoff_angstrom: PositiveFloat = Field(description="end of the first neighbour shell, for the bond order")
    layer_angstrom: PositiveFloat = Field(default=1.8, description="thickness of a layer of the order profile")
    density_bin_angstrom: PositiveFloat = Field(default=0.3, description="width of a bin of the density profile")
    barostat_relaxation_fs: PositiveFloat = Field(default=500.0, description="time in which the stress decays")
    bulk_modulus_gpa: PositiveFloat = Field(default=100.0, description="rough stiffness, for the barostat")
    blocks: Annotated[int, Field(ge=3)] = Field(default=5, description="of the errors and of the profiles")


def coexistence(
    calculator: Calculator, settings: InterfaceSettings, base: Path | None = None
) -> tuple[Atoms, np.random.Generator]:
    """A cell whose upper half has been melted, with velocities at the temperature of the interface.

    Returns:
        The atoms with their calculator, and the generator to go on with.

    Raises:
        Exploded: a limit is met.
        PropertyFailure: the cell is not orthorhombic, or the half did not melt.
    """
    from ase.constraints import FixAtoms

    generator = np.random.default_rng(settings.seed)
    cell = _crystal_at_temperature(calculator, settings, generator, base)
    atoms = cell.repeat(settings.supercell)
    atoms.calc = calculator
    guard = Guard(atoms, settings.limits, settings.melt_kelvin)
    lower = atoms.get_scaled_positions()[:, 2] < 0.5
    give_velocities(atoms, settings.melt_kelvin, generator)
    atoms.set_constraint(FixAtoms(mask=lower))
    run(langevin(atoms, settings, settings.melt_kelvin, generator), settings, settings.melt_ps, guard)
    atoms.set_constraint()
    order = averaged_bond_order(atoms, settings.order_cutoff_angstrom)
    if not order[~lower].mean() <= _MOLTEN * order[lower].mean():
        raise PropertyFailure(
            f"the half did not melt at {settings.melt_kelvin:g} K in {settings.melt_ps:g} ps: bond order "
            f"{order[~lower].mean():.3f} there, {order[lower].mean():.3f} in the crystal"
        )
    give_velocities(atoms, settings.temperature_kelvin, generator)
    return atoms, generator


def _crystal_at_temperature(
    calculator: Calculator, settings: InterfaceSettings, generator: np.random.Generator, base: Path | None
) -> Atoms:
    """The cell that is repeated, at the lattice constant it has at this temperature and no pressure."""
    cell = atoms_of(settings.structure, base)
    if not (cell.pbc.all() and np.allclose(cell.cell.angles(), 90.0)):
        raise PropertyFailure(f"the cell of {cell.get_chemical_formula()} is not periodic and orthorhombic")
    if settings.crystal_ps == 0:
        return cell
    across = settings.supercell[:2]
    repeats = (*across, max(across))
    crystal = cell.repeat(repeats)
    crystal.calc = calculator
    give_velocities(crystal, settings.temperature_kelvin, generator)
    lengths: list[Floats] = []
    guard = Guard(crystal, settings.limits, settings.temperature_kelvin)
    dynamics = under_pressure(crystal, settings, settings.temperature_kelvin, generator, "all")
    run(dynamics, settings, settings.crystal_ps, guard, lambda now: lengths.append(now.cell.lengths()))
    if not lengths:
        raise PropertyFailure(f"crystal_ps {settings.crystal_ps:g} is shorter than the time between two samples")
    mean = np.mean(lengths[len(lengths) // 2 :], axis=0) / repeats
    cell.set_cell(np.diag(mean), scale_atoms=True)
    return cell


def under_pressure(
    atoms: Atoms,
    settings: InterfaceSettings,
    temperature: float,
    generator: np.random.Generator,
    axes: Literal["all", "z"],
) -> Any:
    """Langevin dynamics whose cell follows its pressure to zero, all edges alike or the third alone."""
    dynamics = langevin(atoms, settings, temperature, generator)
    barostat = Barostat(
        atoms,
        axes,
        every_fs=_BAROSTAT_EVERY * settings.timestep_fs,
        relaxation_fs=settings.barostat_relaxation_fs,
        bulk_modulus_gpa=settings.bulk_modulus_gpa,
    )
    dynamics.attach(barostat, interval=_BAROSTAT_EVERY)
    return dynamics
