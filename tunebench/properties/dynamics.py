"""Molecular dynamics with a seed and a guard: how energy drifts, and how long a potential holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from tunebench.properties.blocks import line_through
from tunebench.properties.bonds import bonds, collapsed
from tunebench.properties.measured import Curve, Floats, Measured, PropertyFailure, Value
from tunebench.properties.structures import Repeats, Structure, atoms_of
from tunebench.study.spec import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator


class Limits(Section):
    """What counts as the end of a simulation that no longer describes matter."""

    shortest_distance_factor: NonNegativeFloat = Field(
        default=0.5, description="two atoms closer than this share of the sum of their covalent radii have collapsed"
    )
    longest_bond_factor: Annotated[float, Field(gt=1.0)] | None = Field(
        default=None, description="a bond of the start longer than this many times its length has broken; molecules"
    )
    temperature_factor: Annotated[float, Field(gt=1.0)] = Field(
        default=4.0, description="a temperature above this many times the target, at least 300 K above it, is a blow-up"
    )
    potential_energy_ev_per_atom: PositiveFloat = Field(
        default=2.0, description="a potential energy further than this from that at the start is a blow-up"
    )


class DynamicsSettings(Section):
    """A structure at a temperature."""

    structure: Structure = Field(description="where it starts")
    supercell: Repeats = Field(default=(1, 1, 1), description="repeats of the cell")
    temperature_kelvin: PositiveFloat = Field(default=300.0, description="of the Langevin thermostat")
    timestep_fs: PositiveFloat = Field(default=1.0, description="integration step")
    friction_per_ps: PositiveFloat = Field(default=10.0, description="of the Langevin thermostat")
    equilibration_ps: NonNegativeFloat = Field(default=1.0, description="Langevin dynamics before anything counts")
    sample_every_steps: PositiveInt = Field(default=10, description="steps between two samples and two looks at limits")
    seed: NonNegativeInt = Field(default=0, description="of velocities and thermostat")
    limits: Limits = Field(default_factory=Limits, description="when the simulation has failed")


class Exploded(PropertyFailure):
    """A simulation that met one of its limits.

    Attributes:
        reason: which limit, and how.
        after_ps: time since the part of the simulation began in which it happened.
    """

    def __init__(self, reason: str, after_ps: float) -> None:
        super().__init__(f"{reason} after {after_ps:.4g} ps")
        self.reason, self.after_ps = reason, after_ps

    def __reduce__(self) -> tuple[type[Exploded], tuple[str, float]]:
        """Pickle by the arguments, for the way out of a worker process."""
        return type(self), (self.reason, self.after_ps)


class Guard:
    """Looks at a simulation and raises `Exploded` where it has met a limit.

    Args:
        atoms: at the start, with a calculator.
        limits: what is allowed.
        temperature: target, K.
    """

    def __init__(self, atoms: Atoms, limits: Limits, temperature: float) -> None:
        self._limits = limits
        self._hottest = max(limits.temperature_factor * temperature, temperature + 300.0)
        self._energy = float(atoms.get_potential_energy()) / len(atoms)
        self._bonds = bonds(atoms) if limits.longest_bond_factor else {}

    def check(self, atoms: Atoms, after_ps: float) -> None:
        """Raises `Exploded`, if the atoms are beyond a limit."""
        reason = self._reason(atoms)
        if reason:
            raise Exploded(reason, after_ps)

    def _reason(self, atoms: Atoms) -> str:
        energy = float(atoms.get_potential_energy()) / len(atoms)
        if not (np.isfinite(energy) and np.isfinite(atoms.positions).all() and np.isfinite(atoms.get_momenta()).all()):
            return "numbers that are not finite"
        if not atoms.get_temperature() <= self._hottest:
            return f"temperature {atoms.get_temperature():.4g} K, allowed: {self._hottest:.4g} K"
        moved = energy - self._energy
        if not abs(moved) <= self._limits.potential_energy_ev_per_atom:
            return f"potential energy moved by {moved:.3g} eV/atom"
        if collapsed(atoms, self._limits.shortest_distance_factor):
            return f"atoms closer than {self._limits.shortest_distance_factor:g} times their covalent radii"
        return self._stretched(atoms)

    def _stretched(self, atoms: Atoms) -> str:
        for (i, j), length in self._bonds.items():
            ratio = atoms.get_distance(i, j, mic=bool(atoms.pbc.any())) / length
            if not ratio <= (self._limits.longest_bond_factor or np.inf):
                return f"bond {atoms.symbols[i]}{i}-{atoms.symbols[j]}{j} stretched {ratio:.3g} times"
        return ""


def started(calculator: Calculator, settings: DynamicsSettings, base: Path | None = None) -> tuple[Atoms, Any]:
    """The repeated structure at temperature, with random velocities and no net momentum, and the generator to go on."""
    atoms = atoms_of(settings.structure, base).repeat(settings.supercell)
    atoms.calc = calculator
    generator = np.random.default_rng(settings.seed)
    give_velocities(atoms, settings.temperature_kelvin, generator)
    return atoms, generator


def give_velocities(atoms: Atoms, temperature: float, generator: np.random.Generator) -> None:
    """Maxwell-Boltzmann velocities without net momentum, and for a molecule without net rotation."""
    from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary, ZeroRotation

    MaxwellBoltzmannDistribution(atoms, temperature_K=temperature, rng=generator)
    Stationary(atoms)
    if not atoms.pbc.any() and len(atoms) > 2:
        ZeroRotation(atoms)


def langevin(atoms: Atoms, settings: DynamicsSettings, temperature: float, generator: np.random.Generator) -> Any:
    """ASE's Langevin dynamics (Vanden-Eijnden and Ciccotti 2006) with the generator given."""
    from ase import units
    from ase.md.langevin import Langevin

    friction = settings.friction_per_ps / (1000.0 * units.fs)
    step = settings.timestep_fs * units.fs
    return Langevin(atoms, step, temperature_K=temperature, friction=friction, fixcm=False, rng=generator)


def run(
    dynamics: Any,
    settings: DynamicsSettings,
    duration_ps: float,
    guard: Guard,
    sample: Callable[[Atoms], None] | None = None,
) -> None:
    """Integrate, look at the limits after every few steps, and hand the atoms to `sample` each time.

    Raises:
        Exploded: a limit is met.
    """
    steps, done = round(1000.0 * duration_ps / settings.timestep_fs), 0
    while done < steps:
        chunk = min(settings.sample_every_steps, steps - done)
        done += chunk
        try:
            dynamics.run(chunk)
        except Exception as error:  # neighbour lists of all kinds refuse such numbers before the guard sees them
            if np.isfinite(dynamics.atoms.positions).all():
                raise
            raise Exploded("numbers that are not finite", _ps(done, settings)) from error
        guard.check(dynamics.atoms, _ps(done, settings))
        if sample and chunk == settings.sample_every_steps:
            sample(dynamics.atoms)


# --- drift of the energy ---------------------------------------------------------------------------------------------


class DriftSettings(DynamicsSettings):
    """Microcanonical dynamics (velocity Verlet) after a Langevin start."""

    property: Literal["energy_drift"] = "energy_drift"
    duration_ps: PositiveFloat = Field(default=5.0, description="microcanonical dynamics")
    blocks: Annotated[int, Field(ge=3)] = Field(default=10, description="of the error of the slope")


def energy_drift(calculator: Calculator, settings: DriftSettings, base: Path | None = None) -> Measured:
    """Slope and scatter of the total energy with time: a potential whose forces are its gradient has no slope.

    Raises:
        Exploded: a limit is met.
    """
    from ase import units
    from ase.md.verlet import VelocityVerlet

    atoms, generator = started(calculator, settings, base)
    guard = Guard(atoms, settings.limits, settings.temperature_kelvin)
    thermostat = langevin(atoms, settings, settings.temperature_kelvin, generator)
    run(thermostat, settings, settings.equilibration_ps, guard)
    energies, temperatures = [], []

    def sample(now: Atoms) -> None:
        energies.append(1000.0 * float(now.get_total_energy()) / len(now))
        temperatures.append(float(now.get_temperature()))

    run(VelocityVerlet(atoms, settings.timestep_fs * units.fs), settings, settings.duration_ps, guard, sample)
    times = sample_times(settings, len(energies))
    total = np.array(energies, dtype=np.float64)
    slope = line_through(times, total, settings.blocks)
    rest = total - slope.at(times)
    return Measured(
        values={
            "drift": Value(value=slope.slope, unit="meV/atom/ps", standard_error=slope.standard_error),
            "fluctuation": Value(value=float(rest.std()), unit="meV/atom"),
            "temperature": Value(value=float(np.mean(temperatures)), unit="K"),
        },
        curves={"total_energy": Curve(x=times, y=total - total[0], x_unit="ps", y_unit="meV/atom")},
    )


DRIFT_UNITS = {"drift": "meV/atom/ps", "fluctuation": "meV/atom", "temperature": "K"}


# --- time to failure -------------------------------------------------------------------------------------------------


class FailureTimeSettings(DynamicsSettings):
    """Langevin dynamics until a limit is met or the time is over."""

    property: Literal["time_to_failure"] = "time_to_failure"
    equilibration_ps: NonNegativeFloat = Field(default=0.0, description="none: the clock starts with the structure")
    duration_ps: PositiveFloat = Field(default=10.0, description="time after which it has not failed")


def time_to_failure(calculator: Calculator, settings: FailureTimeSettings, base: Path | None = None) -> Measured:
    """Time until one of the limits is met, the whole duration where none is, and whether it got there (1) or not (0).

    Meeting a limit is the result here, not a failure of the property.
    """
    atoms, generator = started(calculator, settings, base)
    dynamics = langevin(atoms, settings, settings.temperature_kelvin, generator)
    held, survived = settings.duration_ps, True
    try:
        run(dynamics, settings, settings.duration_ps, Guard(atoms, settings.limits, settings.temperature_kelvin))
    except Exploded as end:
        held, survived = end.after_ps, False
    return Measured(
        values={"time": Value(value=held, unit="ps"), "survived": Value(value=float(survived), unit="1")},
    )


FAILURE_TIME_UNITS = {"time": "ps", "survived": "1"}


def sample_times(settings: DynamicsSettings, samples: int) -> Floats:
    """Of the samples, ps."""
    return _ps(settings.sample_every_steps, settings) * np.arange(1, samples + 1, dtype=np.float64)


def _ps(steps: int, settings: DynamicsSettings) -> float:
    return steps * settings.timestep_fs / 1000.0
