"""Solid and liquid side by side: profiles across the interface, its width, and how fast it moves.

A crystal is brought to temperature, one half of a long cell is melted, and both halves are left to themselves at the
temperature asked for, with the length of the cell free along the interface's normal. The crystal grows below the
melting point and melts above it; where its front stands still the potential has its melting point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tunebench.properties.blocks import line_through, mean_of
from tunebench.properties.coexistence import InterfaceSettings, coexistence, under_pressure
from tunebench.properties.dynamics import Guard, run, sample_times
from tunebench.properties.measured import Curve, Floats, Measured, PropertyFailure, Value
from tunebench.properties.order import averaged_bond_order
from tunebench.properties.structures import atoms_of

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

_LEAST_CONTRAST = 0.08  # between the bond orders of crystal and melt; copper's differ by 0.25 to 0.35
_TEN_TO_NINETY = 2.0 * np.arctanh(0.8)  # widths of a tanh between 10 and 90 % of its step
_ANGSTROM_PER_PS_IN_M_PER_S = 100.0
_ALONE = 0.15  # share of a phase below which its two interfaces see each other
_CORE = 0.15  # a phase of half the cell is itself within this share of the cell around its middle


@dataclass(frozen=True, kw_only=True, eq=False)
class Look:
    """A moment of a coexistence cell.

    Attributes:
        places: of the atoms along the normal, as shares of the cell and not wrapped, shape (atoms,).
        order: their bond orders, shape (atoms,).
        length: of the cell along the normal, Å.
        area: of the cell across it, Å².
    """

    places: Floats
    order: Floats
    length: float
    area: float


def interface(calculator: Calculator, settings: InterfaceSettings, base: Path | None = None) -> Measured:
    """Velocity of the front, width of the interface, densities and order of both phases, and the profiles.

    The velocity is half the rate at which the crystal's thickness grows (two fronts), positive where it freezes. The
    thickness is the sum over atoms of (order - order of the melt) / (order of the crystal - order of the melt), times
    the crystal's thickness an atom. The width is that of a tanh through the order profile from 10 to 90 %.

    Raises:
        Exploded: a limit is met.
        PropertyFailure: the half did not melt, crystal and melt cannot be told apart, or one of them is used up.
    """
    atoms, generator = coexistence(calculator, settings, base)
    guard = Guard(atoms, settings.limits, settings.temperature_kelvin)
    dynamics = under_pressure(atoms, settings, settings.temperature_kelvin, generator, "z")
    run(dynamics, settings, settings.equilibration_ps, guard)
    looks: list[Look] = []
    run(dynamics, settings, settings.duration_ps, guard, lambda now: looks.append(_look(now, settings)))
    return follow(looks, settings, base)


def follow(looks: Sequence[Look], settings: InterfaceSettings, base: Path | None = None) -> Measured:
    """What `interface` returns, from looks at an interface after every `sample_every_steps`.

    Raises:
        PropertyFailure: crystal and melt cannot be told apart, or one of them is used up.
    """
    if len(looks) < 2 * settings.blocks:
        raise PropertyFailure(f"{len(looks)} samples are too few for {settings.blocks} blocks")
    times = sample_times(settings, len(looks))
    places = _centred(looks)
    phases = _phases(looks, places, settings)
    thickness = np.array([_thickness(look, phases) for look in looks], dtype=np.float64)
    lasting = _lasting(looks, thickness, times, settings)
    front = line_through(times[:lasting], thickness[:lasting], settings.blocks)
    orders = [_order_profile(looks, places, part, settings, base) for part in _parts(lasting, settings)]
    lengths = [np.mean([looks[k].length for k in part]) for part in _parts(lasting, settings)]
    widths = [_width(order, length) for order, length in zip(orders, lengths, strict=True)]
    half = _ANGSTROM_PER_PS_IN_M_PER_S / 2.0
    values = {
        "front_velocity": Value(value=half * front.slope, unit="m/s", standard_error=half * front.standard_error),
        "width": mean_of(np.array(widths, dtype=np.float64), "Å"),
        "solid_density": Value(value=phases.solid_density, unit="atoms/Å³"),
        "liquid_density": Value(value=phases.liquid_density, unit="atoms/Å³"),
        "solid_order": Value(value=phases.solid_order, unit="1"),
        "liquid_order": Value(value=phases.liquid_order, unit="1"),
    }
    density = _density_profile(looks, places, _parts(lasting, settings)[0], settings, base)
    curves = {
        "order_profile": _along_normal(orders[0], "1"),
        "density_profile": _along_normal(density, "atoms/Å³"),
        "thickness": Curve(x=times, y=thickness, x_unit="ps", y_unit="Å"),
    }
    return Measured(values=values, curves=curves)


INTERFACE_UNITS = {
    "front_velocity": "m/s",
    "width": "Å",
    "solid_density": "atoms/Å³",
    "liquid_density": "atoms/Å³",
    "solid_order": "1",
    "liquid_order": "1",
}


def _look(atoms: Atoms, settings: InterfaceSettings) -> Look:
    length = float(atoms.cell.lengths()[2])
    order = averaged_bond_order(atoms, settings.order_cutoff_angstrom)
    return Look(
        places=atoms.positions[:, 2] / length, order=order, length=length, area=float(atoms.get_volume()) / length
    )


@dataclass(frozen=True, kw_only=True)
class _Phases:
    """Crystal and melt far from the interfaces: bond order, and density in atoms/Å³."""

    solid_order: float
    liquid_order: float
    solid_density: float
    liquid_density: float


def _centred(looks: Sequence[Look]) -> Floats:
    """Places relative to the middle of the crystal, between -0.5 and 0.5, shape (looks, atoms).

    The middle is that of the first look; from then on it moves with the atoms that were near it.
    """
    first = looks[0]
    turns = np.exp(2j * np.pi * first.places)
    centre = np.angle(((first.order - first.order.mean()) * turns).sum()) / (2 * np.pi)
    core = np.abs(_wrapped(first.places - centre)) < _CORE
    drift = np.array([(look.places - first.places)[core].mean() for look in looks], dtype=np.float64)
    return _wrapped(np.array([look.places for look in looks]) - centre - drift[:, None])


def _wrapped(places: Floats) -> Floats:
    return np.array(places - np.floor(places + 0.5), dtype=np.float64)


def _phases(looks: Sequence[Look], places: Floats, settings: InterfaceSettings) -> _Phases:
    """From the first block, in which both phases are still about half of the cell."""
    first = _parts(len(looks), settings)[0]
    order = np.array([looks[k].order for k in first], dtype=np.float64)
    solid, liquid = _taper(places[first]), _taper(_wrapped(places[first] + 0.5))
    volume = sum(_CORE * looks[k].length * looks[k].area for k in first)
    found = _Phases(
        solid_order=float((solid * order).sum() / solid.sum()),
        liquid_order=float((liquid * order).sum() / liquid.sum()),
        solid_density=float(solid.sum() / volume),
        liquid_density=float(liquid.sum() / volume),
    )
    if not found.solid_order - found.liquid_order >= _LEAST_CONTRAST:
        raise PropertyFailure(
            f"crystal and melt cannot be told apart: bond orders {found.solid_order:.3f} and {found.liquid_order:.3f}"
        )
    return found


def _taper(places: Floats) -> Floats:
    """Weights of atoms by their distance from a phase's middle, which integrate to `_CORE`.

    A window with edges would hold a layer of the crystal more or less, some percent of its density.
    """
    weights = np.square(np.cos(np.pi / 2 * places / _CORE))
    return np.array(np.where(np.abs(places) < _CORE, weights, 0.0), dtype=np.float64)


def _thickness(look: Look, phases: _Phases) -> float:
    """Of the crystal, Å."""
    crystalline = (look.order - phases.liquid_order) / (phases.solid_order - phases.liquid_order)
    return float(crystalline.sum() / (phases.solid_density * look.area))


def _lasting(looks: Sequence[Look], thickness: Floats, times: Floats, settings: InterfaceSettings) -> int:
    """How many looks there are before one of the phases is used up."""
    share = thickness / np.array([look.length for look in looks])
    gone = np.flatnonzero((share < _ALONE) | (share > 1.0 - _ALONE))
    if not gone.size:
        return len(looks)
    lasting = int(gone[0])
    if lasting < 2 * settings.blocks:
        phase = "crystal" if share[lasting] < 0.5 else "melt"
        raise PropertyFailure(f"the {phase} is used up after {times[lasting]:.3g} ps; nothing is left to follow")
    return lasting


def _parts(looks: int, settings: InterfaceSettings) -> list[np.ndarray]:
    return np.array_split(np.arange(looks), settings.blocks)


def _order_profile(
    looks: Sequence[Look], places: Floats, part: np.ndarray, settings: InterfaceSettings, base: Path | None
) -> Floats:
    """Mean bond order by layer, shape (layers,)."""
    edges = _edges(settings.layer_angstrom, settings, base)
    order = np.array([looks[k].order for k in part], dtype=np.float64)
    total, _ = np.histogram(places[part], edges, weights=order)
    counts, _ = np.histogram(places[part], edges)
    return np.array(total / np.maximum(counts, 1), dtype=np.float64)


def _density_profile(
    looks: Sequence[Look], places: Floats, part: np.ndarray, settings: InterfaceSettings, base: Path | None
) -> Floats:
    """Atoms/Å³ by bin, shape (bins,)."""
    edges = _edges(settings.density_bin_angstrom, settings, base)
    counts, _ = np.histogram(places[part], edges)
    volume = sum(looks[k].length * looks[k].area for k in part) / (len(edges) - 1)
    return np.array(counts / volume, dtype=np.float64)


def _edges(thickness: float, settings: InterfaceSettings, base: Path | None) -> Floats:
    """Shares of the cell; their number comes from the settings, so that every model has the same."""
    length = atoms_of(settings.structure, base).cell.lengths()[2] * settings.supercell[2]
    return np.linspace(-0.5, 0.5, max(round(length / thickness), 8) + 1, dtype=np.float64)


def _along_normal(profile: Floats, unit: str) -> Curve:
    middles = (np.arange(len(profile), dtype=np.float64) + 0.5) / len(profile) - 0.5
    return Curve(x=middles, y=profile, x_unit="share of the cell", y_unit=unit)


def _width(order: Floats, length: float) -> float:
    """From 10 to 90 % of the step between melt and crystal, Å, alike for both interfaces."""
    from scipy.optimize import curve_fit

    x = ((np.arange(len(order), dtype=np.float64) + 0.5) / len(order) - 0.5) * length
    start = (order.min(), order.max(), length / 4, 2.0)
    bounds = ([0.0, 0.0, 0.0, 0.05], [1.0, 1.0, length / 2, length / 2])
    try:
        found, _ = curve_fit(_two_fronts, x, order, p0=start, bounds=bounds)
    except (RuntimeError, ValueError) as error:
        raise PropertyFailure(f"the order profile is no slab between two interfaces ({error})") from error
    return float(_TEN_TO_NINETY * found[3])


def _two_fronts(x: Floats, melt: float, crystal: float, half: float, width: float) -> Floats:
    step = np.tanh((x + half) / width) - np.tanh((x - half) / width)
    return np.array(melt + (crystal - melt) / 2 * step, dtype=np.float64)
