"""The Lanczos iteration with full reorthogonalisation, and what its tridiagonal matrix says of a spectrum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

from tunebench.curvature.operators import Operator

Floats = NDArray[np.float64]

# A remainder this small, relative to the largest entry so far, is rounding: the Krylov space is invariant.
_EXHAUSTED = 1e-13


@dataclass(frozen=True, kw_only=True, eq=False)
class RitzValues:
    """Eigenvalues of the tridiagonal matrix of one Lanczos run.

    Attributes:
        values: ascending, (steps,).
        weights: of the start vector along each Ritz vector, squared; they sum to 1. Values and weights are the nodes
            and weights of Gauss's quadrature of the spectral density that the start vector sees.
        bounds: residual norms, at least what rounding makes; an eigenvalue of the operator lies within this distance
            of each value.
    """

    values: Floats
    weights: Floats
    bounds: Floats


def lanczos(operator: Operator, start: torch.Tensor, steps: int) -> RitzValues:
    """Run at most so many steps; fewer where the start vector's Krylov space is exhausted.

    Golub and van Loan, Matrix Computations, algorithm 10.1.1; every vector is orthogonalised twice against all before
    it (Parlett, The Symmetric Eigenvalue Problem, section 6.9), which keeps spurious copies of eigenvalues away.

    Args:
        operator: symmetric.
        start: (size,), not zero.
        steps: at least 1, one product each; at most the operator's size are made.

    Raises:
        ValueError: a start vector that is zero or not finite, or no step.
        FloatingPointError: the operator returned something that is not finite.
    """
    norm = float(torch.linalg.vector_norm(start))
    if steps < 1 or not 0.0 < norm < float("inf"):
        raise ValueError(
            f"lanczos: found {steps} steps from a vector of norm {norm}, allowed: at least 1, finite, not 0"
        )
    steps = min(steps, operator.size)
    basis = torch.zeros(steps, operator.size, dtype=torch.float64, device=start.device)
    diagonal, beside = np.zeros(steps), np.zeros(steps)
    vector = start / norm
    for step in range(steps):
        basis[step] = vector
        image = operator(vector)
        diagonal[step] = float(vector @ image)
        known = basis[: step + 1]
        for _ in range(2):
            image = image - known.mT @ (known @ image)
        beside[step] = float(torch.linalg.vector_norm(image))
        scale = max(np.abs(diagonal[: step + 1]).max(), beside[: step + 1].max())
        if not np.isfinite(scale):
            raise FloatingPointError(f"lanczos: found a product that is not finite at step {step + 1}")
        if beside[step] <= _EXHAUSTED * scale:
            return _ritz_values(diagonal[: step + 1], beside[:step], 0.0)
        vector = image / beside[step]
    return _ritz_values(diagonal, beside[:-1], beside[-1])


def _ritz_values(diagonal: Floats, beside: Floats, remainder: float) -> RitzValues:
    values, vectors = eigh_tridiagonal(diagonal, beside)
    rounding = _EXHAUSTED * np.abs(values).max()
    return RitzValues(
        values=values, weights=vectors[0] ** 2, bounds=np.maximum(np.abs(remainder * vectors[-1]), rounding)
    )
