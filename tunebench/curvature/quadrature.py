"""Stochastic Lanczos quadrature: Lanczos runs from random vectors."""

from __future__ import annotations

import numpy as np

from tunebench.curvature.lanczos import lanczos
from tunebench.curvature.operators import Operator
from tunebench.curvature.probes import rademacher
from tunebench.curvature.spectrum import Spectrum


def quadrature(operator: Operator, draw: np.random.Generator, *, probes: int, steps: int) -> Spectrum:
    """The spectrum as seen by `probes` vectors of random signs, `steps` products each."""
    starts = [rademacher(draw, operator.size, operator.device) for _ in range(probes)]
    runs = [lanczos(operator, start, steps) for start in starts]
    return Spectrum(
        size=operator.size,
        values=tuple(run.values for run in runs),
        weights=tuple(run.weights for run in runs),
        bounds=tuple(run.bounds for run in runs),
    )
