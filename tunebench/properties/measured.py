"""What a property calculation hands back: named scalars with units, curves, or the reason why there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class PropertyFailure(Exception):
    """A property that cannot be had from this calculator: no convergence, imaginary modes, exploded dynamics."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A scalar result.

    Attributes:
        value: finite.
        unit: as ASE's users write it, for example ``GPa``, ``THz``, ``meV/atom/ps``; ``1`` for a pure number.
        standard_error: in the same unit, where the calculation has one.
    """

    value: float
    unit: str
    standard_error: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """A result along an axis.

    Attributes:
        x: shape (points,).
        y: shape (points,) or (points, branches).
        x_unit, y_unit: units.
        marks: places on the x axis by name, for example the high-symmetry points of a band structure.
    """

    x: Floats
    y: Floats
    x_unit: str
    y_unit: str
    marks: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """All results of one property calculation.

    Attributes:
        values: scalars by name.
        curves: curves by name; two calculations with the same settings have them on the same points.
    """

    values: Mapping[str, Value]
    curves: Mapping[str, Curve] = field(default_factory=dict)
