"""Errors of a model on a split: what NequIP's metrics report, accumulated over batches in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

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
        sums = _sums_of(error)
        self._sums[quantity] = self._sums[quantity] + sums if quantity in self._sums else sums

    def metrics(self) -> dict[str, float]:
        """MAE and RMSE of every quantity with at least one label, keyed by `Metric` names."""
        return metrics_of_sums({quantity: sums.tolist() for quantity, sums in self._sums.items()})


def split_errors(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    *,
    stress: bool,
    watch: Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], None] | None = None,
) -> dict[str, float]:
    """MAE and RMSE of energy per atom (eV/atom), forces (eV/Å) and, if asked, stress (eV/Å³) over all batches.

    A non-finite prediction makes its metric non-finite. The model is left in training or evaluation mode as it was.

    Args:
        model: NequIP's.
        batches: NequIP's keys.
        stress: whether the stress counts.
        watch: sees the predictions and the labels of every batch.
    """
    training = model.training
    model.eval()
    sums = ErrorSums()
    for batch in batches:
        output = model(dict(batch))
        with torch.no_grad():
            for quantity, error in labelled_errors(output, batch, stress=stress).items():
                sums.add(quantity, error)
            if watch is not None:
                watch(output, batch)
    model.train(training)
    return sums.metrics()


def quantities(*, stress: bool) -> tuple[str, ...]:
    """The quantities whose errors are measured, in the order of the rows of `error_sums`."""
    return tuple(_MAE_RMSE) if stress else ("energy_per_atom", "forces")


def error_sums(
    output: Mapping[str, torch.Tensor],
    batch: Mapping[str, torch.Tensor],
    *,
    stress: bool,
    force_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sums over the labelled values of one batch; works under `torch.vmap` and makes no host synchronisation.

    Args:
        output: predictions, NequIP's keys.
        batch: labels, NaN where there is none, as all labels of a ghost frame are.
        stress: whether the stress counts.
        force_labels: frames of the batch whose forces count, bool (frames,); left out, all that have forces.

    Returns:
        float64 (quantities, 3): sum of absolute errors, sum of squared errors, number of values. A prediction that is
        not finite makes its sums infinite. Sums of batches add up; `metrics_of_sums` makes metrics of them.
    """
    errors = labelled_errors(output, batch, stress=stress)
    if force_labels is not None:
        counted = force_labels[batch[AtomicDataDict.BATCH_KEY]].unsqueeze(-1)
        errors["forces"] = torch.where(counted, errors["forces"], torch.full_like(errors["forces"], math.nan))
    return torch.stack([_sums_of(error) for error in errors.values()])


def metrics_of_sums(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """MAE and RMSE of every quantity with at least one label, keyed by `Metric` names.

    Args:
        sums: of each quantity, a row of `error_sums` added up over the batches.
    """
    out: dict[str, float] = {}
    for quantity, (absolute, square, count) in sums.items():
        if count > 0:
            mae, rmse = _MAE_RMSE[quantity]
            out[mae.value], out[rmse.value] = absolute / count, math.sqrt(square / count)
    return out


def labelled_errors(
    output: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], *, stress: bool
) -> dict[str, torch.Tensor]:
    """Errors of each quantity, in the order of `quantities`, of the labels' shapes and NaN where there is no label."""
    energy, forces, stresses = AtomicDataDict.TOTAL_ENERGY_KEY, AtomicDataDict.FORCE_KEY, AtomicDataDict.STRESS_KEY
    errors = {
        "energy_per_atom": _keep_label_mask(energy_per_atom_error(output, batch), batch[energy]),
        "forces": _keep_label_mask(output[forces] - batch[forces], batch[forces]),
    }
    if stress:
        errors["stress"] = _keep_label_mask(output[stresses] - batch[stresses], batch[stresses])
    return errors


def _sums_of(error: torch.Tensor) -> torch.Tensor:
    return row_sums(error.reshape(1, -1))[0]


def row_sums(error: torch.Tensor) -> torch.Tensor:
    """Sums over each row of errors of shape (rows, ...): absolute, squared, how many; float64 (rows, 3)."""
    error = error.flatten(1)
    labelled = ~torch.isnan(error)
    error = torch.where(labelled, error, torch.zeros_like(error)).to(torch.float64)
    return torch.stack([error.abs().sum(1), error.square().sum(1), labelled.sum(1).to(torch.float64)], dim=1)


def _keep_label_mask(error: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Error that is NaN exactly where the label is missing; a NaN prediction becomes infinite instead."""
    error = torch.where(torch.isnan(error), torch.full_like(error, math.inf), error)
    return torch.where(torch.isnan(label), torch.full_like(error, math.nan), error)
