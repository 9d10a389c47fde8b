"""Errors of a model on a split: what NequIP's metrics report, accumulated over batches in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from nequip.data import AtomicDataDict

from tunebench.engine.loss import energy_per_atom_error
from tunebench.study.record import Metric

_MAE_RMSE = {
    "energy_per_atom": (Metric.ENERGY_PER_ATOM_MAE, Metric.ENERGY_PER_ATOM_RMSE),
    "forces": (Metric.FORCES_MAE, Metric.FORCES_RMSE),
    "stress": (Metric.STRESS_MAE, Metric.STRESS_RMSE),
}


class ErrorSums:
    """Running sums of absolute and squared errors over labelled values."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, quantity: str, error: torch.Tensor) -> None:
        """Add errors of any shape; NaN marks a missing label of the reference."""
        labelled = ~torch.isnan(error)
        error = torch.where(labelled, error, torch.zeros_like(error)).to(torch.float64)
        sums = torch.stack([error.abs().sum(), error.square().sum(), labelled.sum().to(torch.float64)])
        self._sums[quantity] = self._sums[quantity] + sums if quantity in self._sums else sums

    def metrics(self) -> dict[str, float]:
        """MAE and RMSE of every quantity with at least one label, keyed by `Metric` names."""
        out: dict[str, float] = {}
        for quantity, sums in self._sums.items():
            absolute, square, count = sums.tolist()
            if count > 0:
                mae, rmse = _MAE_RMSE[quantity]
                out[mae.value], out[rmse.value] = absolute / count, math.sqrt(square / count)
        return out


def split_errors(
    model: torch.nn.Module, batches: Iterable[Mapping[str, torch.Tensor]], *, stress: bool
) -> dict[str, float]:
    """MAE and RMSE of energy per atom (eV/atom), forces (eV/Å) and, if asked, stress (eV/Å³) over all batches.

    A non-finite prediction makes its metric non-finite. The model is left in evaluation mode as it was found.
    """
    training = model.training
    model.eval()
    sums = ErrorSums()
    for batch in batches:
        output = model(dict(batch))
        with torch.no_grad():
            sums.add("energy_per_atom", _unmasked(energy_per_atom_error(output, batch)))
            sums.add("forces", _keep_label_mask(output, batch, AtomicDataDict.FORCE_KEY))
            if stress:
                sums.add("stress", _keep_label_mask(output, batch, AtomicDataDict.STRESS_KEY))
    model.train(training)
    return sums.metrics()


def _keep_label_mask(output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    """Error that is NaN exactly where the label is missing; a NaN prediction becomes infinite instead."""
    error = _unmasked(output[key] - batch[key])
    return torch.where(torch.isnan(batch[key]), torch.full_like(error, math.nan), error)


def _unmasked(error: torch.Tensor) -> torch.Tensor:
    return torch.where(torch.isnan(error), torch.full_like(error, math.inf), error)
