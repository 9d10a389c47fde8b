"""Liquids: how atoms are arranged around each other and how fast they wander."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from tunebench.properties.blocks import mean_of
from tunebench.properties.dynamics import DynamicsSettings, Guard, give_velocities, langevin, run, started
from tunebench.properties.measured import Curve, Floats, Measured, PropertyFailure, Value
from tunebench.study.spec import NonNegativeFloat, PositiveFloat

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

_FIT = (0.1, 0.5)  # of a block: between free flight and lags with few origins


class LiquidSettings(DynamicsSettings):
    """Microcanonical dynamics of a periodic system, melted before if it starts as a crystal."""

    property: Literal["liquid"] = "liquid"
    melt_kelvin: PositiveFloat | None = Field(default=None, description="temperature at which a crystal is melted")
    melt_ps: NonNegativeFloat = Field(default=1.0, description="duration of that, before the equilibration")
    duration_ps: PositiveFloat = Field(default=10.0, description="microcanonical dynamics that are evaluated")
    blocks: Annotated[int, Field(ge=2)] = Field(default=5, description="of the errors")
    r_max_angstrom: PositiveFloat = Field(default=6.0, description="end of the radial distribution")
    r_bin_angstrom: PositiveFloat = Field(default=0.05, description="width of its bins")
    pair: Annotated[tuple[str, str], Field(strict=False)] | None = Field(
        default=None, description="elements of the radial distribution; left out, all atoms"
    )
    diffusing: str | None = Field(default=None, description="element of the displacements; left out, all atoms")


def liquid(calculator: Calculator, settings: LiquidSettings, base: Path | None = None) -> Measured:
    """Radial distribution function, mean-square displacement and self-diffusion coefficient.

    The diffusion coefficient is the Einstein relation's, slope / 6 of the displacement over lags of a tenth to half a
    block, averaged over blocks, whose scatter is its error. It holds for this box: no correction for its size.

    Raises:
        Exploded: a limit is met.
        PropertyFailure: the structure is not periodic, or too few samples for the blocks.
    """
    from ase import units
    from ase.md.verlet import VelocityVerlet

    atoms = _equilibrated(calculator, settings, base)
    frames: list[Floats] = []
    temperatures: list[float] = []

    def sample(now: Atoms) -> None:
        frames.append(now.get_positions())
        temperatures.append(float(now.get_temperature()))

    guard = Guard(atoms, settings.limits, settings.temperature_kelvin)
    run(VelocityVerlet(atoms, settings.timestep_fs * units.fs), settings, settings.duration_ps, guard, sample)
    trajectory = np.array(frames, dtype=np.float64)
    lags, displacement, diffusion = _displacements(atoms, trajectory, settings)
    distances, density = radial_distribution(atoms, trajectory, settings)
    position, height = _first_peak(distances, density)
    values = {
        "diffusion": mean_of(diffusion, "Å²/ps"),
        "first_peak": Value(value=position, unit="Å"),
        "first_peak_height": Value(value=height, unit="1"),
        "temperature": Value(value=float(np.mean(temperatures)), unit="K"),
    }
    curves = {
        "radial_distribution": Curve(x=distances, y=density, x_unit="Å", y_unit="1"),
        "mean_square_displacement": Curve(x=lags, y=displacement, x_unit="ps", y_unit="Å²"),
    }
    return Measured(values=values, curves=curves)


LIQUID_UNITS = {"diffusion": "Å²/ps", "first_peak": "Å", "first_peak_height": "1", "temperature": "K"}


def radial_distribution(atoms: Atoms, trajectory: Floats, settings: LiquidSettings) -> tuple[Floats, Floats]:
    """Pair density over that of an ideal gas, averaged over frames of one cell; bonded pairs count like all others.

    Args:
        atoms: cell and elements.
        trajectory: positions in Å, shape (frames, atoms, 3).
        settings: pair, range and bins.

    Returns:
        Middles of the bins in Å and the radial distribution, both of shape (bins,).
    """
    from ase.neighborlist import neighbor_list

    symbols = np.array(atoms.get_chemical_symbols())
    first, second = settings.pair or (None, None)
    of_first, of_second = (np.ones(len(atoms), bool) if kind is None else symbols == kind for kind in (first, second))
    if not (of_first.any() and of_second.any()):
        raise PropertyFailure(f"no pairs of {first} and {second} in {atoms.get_chemical_formula()}")
    edges = np.arange(0.0, settings.r_max_angstrom + settings.r_bin_angstrom / 2, settings.r_bin_angstrom)
    counts = np.zeros(len(edges) - 1, dtype=np.float64)
    frame = atoms.copy()
    for positions in trajectory:
        frame.positions[:] = positions
        i, j, distance = neighbor_list("ijd", frame, float(edges[-1]))
        counts += np.histogram(distance[of_first[i] & of_second[j]], edges)[0]
    shells = 4.0 / 3.0 * np.pi * np.diff(edges**3)
    pairs = of_first.sum() * of_second.sum() / atoms.get_volume()
    return (edges[1:] + edges[:-1]) / 2, counts / (len(trajectory) * pairs * shells)


def mean_square_displacement(trajectory: Floats) -> Floats:
    """Mean over atoms and all origins of the squared displacement, by lag.

    Args:
        trajectory: unwrapped positions, Å, shape (frames, atoms, 3).

    Returns:
        Å², shape (frames,), 0 at lag 0.
    """
    lags = range(1, len(trajectory))
    squares = [np.square(trajectory[lag:] - trajectory[:-lag]).sum(axis=2).mean() for lag in lags]
    return np.array([0.0, *squares], dtype=np.float64)


def _equilibrated(calculator: Calculator, settings: LiquidSettings, base: Path | None) -> Atoms:
    atoms, generator = started(calculator, settings, base)
    if not atoms.pbc.all():
        raise PropertyFailure(f"{atoms.get_chemical_formula()} is not periodic in all directions")
    stages = [(settings.temperature_kelvin, settings.equilibration_ps)]
    if settings.melt_kelvin is not None:
        stages.insert(0, (settings.melt_kelvin, settings.melt_ps))
    for temperature, duration in stages:
        give_velocities(atoms, temperature, generator)  # a melt's would be an explosion to the colder stage's limits
        guard = Guard(atoms, settings.limits, temperature)
        run(langevin(atoms, settings, temperature, generator), settings, duration, guard)
    return atoms


def _displacements(atoms: Atoms, trajectory: Floats, settings: LiquidSettings) -> tuple[Floats, Floats, Floats]:
    """Lags in ps, mean-square displacement in Å², and the diffusion coefficient of every block in Å²/ps."""
    chosen = np.array([settings.diffusing in (None, symbol) for symbol in atoms.symbols])
    if not chosen.any():
        raise PropertyFailure(f"no {settings.diffusing} in {atoms.get_chemical_formula()}")
    masses = atoms.get_masses()
    centre = np.einsum("fax,a->fx", trajectory, masses / masses.sum())
    wandered = (trajectory - centre[:, None])[:, chosen]
    length = len(trajectory) // settings.blocks
    begin, end = (round(share * length) for share in _FIT)
    if end - begin < 3:
        raise PropertyFailure(f"{len(trajectory)} samples are too few for {settings.blocks} blocks")
    interval = settings.sample_every_steps * settings.timestep_fs / 1000.0
    lags = interval * np.arange(length, dtype=np.float64)
    blocks = [wandered[k * length : (k + 1) * length] for k in range(settings.blocks)]
    squares = np.array([mean_square_displacement(block) for block in blocks], dtype=np.float64)
    slopes = np.polyfit(lags[begin:end], squares[:, begin:end].T, 1)[0]
    return lags, squares.mean(axis=0), slopes / 6.0


def _first_peak(distances: Floats, density: Floats) -> tuple[float, float]:
    """Place and height of the highest point, by a parabola through it and its neighbours."""
    top = int(density.argmax())
    if not 0 < top < len(density) - 1:
        raise PropertyFailure("the radial distribution has no peak in its range")
    low, here, high = density[top - 1 : top + 2]
    shift = (low - high) / (2.0 * (low - 2.0 * here + high))
    step = distances[1] - distances[0]
    return float(distances[top] + shift * step), float(here - (low - high) * shift / 4.0)
