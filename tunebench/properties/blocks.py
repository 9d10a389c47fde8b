"""Slopes and means of correlated series, with errors from blocks that are longer than the correlation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tunebench.properties.measured import Floats, PropertyFailure, Value


@dataclass(frozen=True, kw_only=True)
class Line:
    """A straight line through a series.

    Attributes:
        slope: of the least-squares line through all points.
        standard_error: of the slope, from the scatter of block means around their own line.
        intercept: at x = 0.
    """

    slope: float
    standard_error: float
    intercept: float

    def at(self, x: Floats) -> Floats:
        """Its height."""
        return self.intercept + self.slope * x


def line_through(x: Floats, y: Floats, blocks: int) -> Line:
    """Least-squares line whose error does not take neighbouring samples for independent ones.

    Args:
        x: shape (samples,).
        y: shape (samples,).
        blocks: at least 3; neighbouring samples are averaged into so many blocks for the error.

    Raises:
        PropertyFailure: fewer samples than blocks.
    """
    if blocks < 3 or len(x) < blocks:
        raise PropertyFailure(f"{len(x)} samples are too few for {blocks} blocks")
    slope, intercept = np.polyfit(x, y, 1)
    coarse_x, coarse_y = (np.array([part.mean() for part in np.array_split(z, blocks)]) for z in (x, y))
    rest = coarse_y - np.polyval(np.polyfit(coarse_x, coarse_y, 1), coarse_x)
    spread = np.square(coarse_x - coarse_x.mean()).sum()
    error = np.sqrt(np.square(rest).sum() / (blocks - 2) / spread)
    return Line(slope=float(slope), standard_error=float(error), intercept=float(intercept))


def mean_of(parts: Floats, unit: str) -> Value:
    """Mean of independent blocks and its standard error.

    Args:
        parts: one number a block, at least two.
        unit: of the numbers.
    """
    error = float(parts.std(ddof=1) / np.sqrt(len(parts)))
    return Value(value=float(parts.mean()), unit=unit, standard_error=error)
