"""What the Lanczos runs of several random vectors say of a spectrum: density, extremes, spread, conditioning.

Imports no torch: the analysis reads spectra from files. Each run gives the nodes and weights of a Gauss quadrature of
the spectral density (stochastic Lanczos quadrature: Golub and Meurant, Matrices, Moments and Quadrature, 2010; Ubaru,
Chen, Saad, SIAM J. Matrix Anal. Appl. 38 (2017) 1075). Sampling errors are standard errors over the runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Extreme:
    """A Ritz value at an end of the spectrum, and how far from it an eigenvalue lies at most (residual bound)."""

    value: float
    bound: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """A spectrum as Lanczos runs from random vectors see it.

    Attributes:
        size: dimension of the operator.
        values: Ritz values of each run, ascending, each (steps,).
        weights: of the spectral density at each of them, sum 1 in every run.
        bounds: residual bound of each.
    """

    size: int
    values: tuple[Floats, ...]
    weights: tuple[Floats, ...]
    bounds: tuple[Floats, ...]

    @property
    def largest(self) -> Extreme:
        """The largest Ritz value of all runs: not above the largest eigenvalue, but for rounding."""
        return self._extreme(-1)

    @property
    def least(self) -> Extreme:
        """The least Ritz value of all runs: not below the least eigenvalue."""
        return self._extreme(0)

    def _extreme(self, end: int) -> Extreme:
        sign = 1.0 if end == -1 else -1.0
        values, bounds = max(zip(self.values, self.bounds, strict=True), key=lambda run: sign * run[0][end])
        return Extreme(value=float(values[end]), bound=float(bounds[end]))

    def distribution(self, at: Floats) -> tuple[Floats, Floats]:
        """Share of the eigenvalues up to each of some places, and its standard error; both (places,).

        Half of a node's weight counts at the node itself, as Gauss quadrature of a step has it at best.
        """
        shares = [
            (w[:, None] * ((v[:, None] < at) + 0.5 * (v[:, None] == at))).sum(0)
            for v, w in zip(self.values, self.weights, strict=True)
        ]
        return _over_runs(np.stack(shares))

    def density(self, at: Floats, width: float) -> tuple[Floats, Floats]:
        """Spectral density smoothed by a Gaussian of this standard deviation, and its standard error; both (places,).

        It integrates to 1. `at` and `width` may be on any axis that values were mapped to before.
        """
        bells = [
            (w[:, None] * np.exp(-0.5 * ((at - v[:, None]) / width) ** 2)).sum(0) / (width * np.sqrt(2.0 * np.pi))
            for v, w in zip(self.values, self.weights, strict=True)
        ]
        return _over_runs(np.stack(bells))

    def decades(self, sign: float, floor: float) -> Spectrum:
        """The spectrum over log10 of |eigenvalue| relative to the largest one, of eigenvalues of one sign.

        Weights of the other sign, and of what lies below `floor`, are left out, so they sum to less than 1.
        """
        largest = max(abs(self.largest.value), abs(self.least.value))
        chosen = [sign * values > floor * largest for values in self.values]
        runs = list(zip(chosen, self.values, self.weights, self.bounds, strict=True))
        return Spectrum(
            size=self.size,
            values=tuple(np.log10(np.abs(v[c]) / largest) for c, v, _, _ in runs),
            weights=tuple(w[c] for c, _, w, _ in runs),
            bounds=tuple(b[c] for c, _, _, b in runs),
        )

    @property
    def trace(self) -> tuple[float, float]:
        """Hutchinson's estimate from the runs' own start vectors, and its standard error."""
        value, error = _over_runs(self.size * self._means(lambda v: v)[:, None])
        return float(value[0]), float(error[0])

    @property
    def condition(self) -> tuple[float, float]:
        """Effective condition number and its standard error: the largest |Ritz value| over the mean |eigenvalue|.

        1 for a flat spectrum. A Hessian is indefinite and nearly singular, so its largest over its least eigenvalue
        says nothing; the mean over all directions is resolved well by a few runs. A negative eigenvalue counts by its
        size, and `negative_share` says how much of the mean that is.
        """
        most = max(abs(self.largest.value), abs(self.least.value))
        means = self._means(np.abs)
        mean, error = _over_runs(means[:, None])
        if mean[0] == 0.0:
            return float("nan"), float("nan")
        return float(most / mean[0]), float(most / mean[0] ** 2 * error[0])

    @property
    def negative_share(self) -> float:
        """Share of the mean |eigenvalue| that negative eigenvalues make up."""
        total = float(self._means(np.abs).mean())
        return float(-self._means(lambda v: np.minimum(v, 0.0)).mean()) / total if total else float("nan")

    @property
    def spread_decades(self) -> float:
        """Standard deviation of log10 |Ritz value|, each weighted by its share of the total |eigenvalue|; 0 if flat.

        Directions without curvature, which no finite number of steps tells from those with a little, weigh nothing.
        """
        values = np.concatenate(self.values)
        weights = np.concatenate(self.weights) * np.abs(values)
        seen = weights > 0.0
        if not seen.any():
            return float("nan")
        logs, shares = np.log10(np.abs(values[seen])), weights[seen] / weights[seen].sum()
        centre = float((shares * logs).sum())
        return float(np.sqrt((shares * (logs - centre) ** 2).sum()))

    def _means(self, function: Callable[[Floats], Floats]) -> Floats:
        """Mean over the eigenvalues of a function of them, as each run has it, (runs,)."""
        return np.array([(w * function(v)).sum() for v, w in zip(self.values, self.weights, strict=True)])


def _over_runs(found: Floats) -> tuple[Floats, Floats]:
    """Mean and standard error over the first axis; NaN errors where there is one run."""
    runs = len(found)
    error = found.std(axis=0, ddof=1) / np.sqrt(runs) if runs > 1 else np.full(found.shape[1:], np.nan)
    return found.mean(axis=0), error
