"""The trace of an operator from products with random vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tunebench.curvature.operators import Operator
from tunebench.curvature.probes import rademacher


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and the standard error of it over probes; NaN where one probe says nothing of its error."""

    value: float
    standard_error: float


def hutchinson(operator: Operator, draw: np.random.Generator, products: int) -> Estimate:
    """The mean of z^T A z over random signs z (Hutchinson, 1990), one product each.

    Args:
        operator: symmetric.
        draw: source of the signs.
        products: at least 1.
    """
    probes = (rademacher(draw, operator.size, operator.device) for _ in range(products))
    return _mean([float(probe @ operator(probe)) for probe in probes])


def hutch_plus_plus(operator: Operator, draw: np.random.Generator, products: int) -> Estimate:
    """Hutch++ (Meyer, Musco, Musco, Woodruff, arXiv:2010.09649, algorithm 1): exact on a sketched range.

    A third of the products finds a range, a third gives the trace on it, a third estimates the rest, whose probes give
    the error. Where the range is all there is the trace is exact.

    Args:
        operator: symmetric.
        draw: source of the signs.
        products: at least 3.
    """
    third = products // 3
    if third < 1:
        raise ValueError(f"hutch++: found {products} products, allowed: at least 3")
    size = min(third, operator.size)
    sketch = torch.stack([operator(rademacher(draw, operator.size, operator.device)) for _ in range(size)], dim=1)
    basis, _ = torch.linalg.qr(sketch)
    on_range = sum(float(column @ operator(column)) for column in basis.mT)
    if size == operator.size:
        return Estimate(value=on_range, standard_error=0.0)
    rest = []
    for _ in range(third):
        probe = rademacher(draw, operator.size, operator.device)
        probe = probe - basis @ (basis.mT @ probe)
        rest.append(float(probe @ operator(probe)))
    remainder = _mean(rest)
    return Estimate(value=on_range + remainder.value, standard_error=remainder.standard_error)


def _mean(values: list[float]) -> Estimate:
    spread = float(np.std(values, ddof=1)) / np.sqrt(len(values)) if len(values) > 1 else float("nan")
    return Estimate(value=float(np.mean(values)), standard_error=float(spread))
