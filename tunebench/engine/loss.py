"""The training loss: a weighted mean of squared errors over the labels that exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from nequip.data import AtomicDataDict

from tunebench.study.spec import Loss


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights that sum to 1, as NequIP's MetricsManager normalises them."""

    energy_per_atom: float
    forces: float
    stress: float

    @classmethod
    def of(cls, loss: Loss) -> LossWeights:
        """Weights of a study's loss section."""
        total = loss.energy_per_atom + loss.forces + loss.stress
        return cls(energy_per_atom=loss.energy_per_atom / total, forces=loss.forces / total, stress=loss.stress / total)


def energy_per_atom_error(output: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Error of the energy per atom, eV/atom, shape (frames, 1)."""
    energy = AtomicDataDict.TOTAL_ENERGY_KEY
    atoms = target[AtomicDataDict.NUM_NODES_KEY].reshape(-1, 1)
    error: torch.Tensor = (output[energy] - target[energy]) / atoms
    return error


def mean_square_of_labelled(error: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Mean of the squared errors whose label exists (is not NaN); 0, with zero gradient, where none exists.

    A prediction that is NaN makes the mean NaN.
    """
    labelled = ~torch.isnan(label)
    squares = torch.where(labelled, error, torch.zeros_like(error)).square()
    return squares.sum() / labelled.sum().clamp_min(1)


def weighted_loss(
    output: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor], weights: LossWeights
) -> torch.Tensor:
    """Scalar loss of one batch.

    The force term averages over labelled components of the batch only; a batch without a labelled frame has force
    term 0. Equals NequIP's `EnergyForceStressLoss` with `ignore_nan` wherever that one is finite.
    """
    loss = weights.energy_per_atom * mean_square_of_labelled(
        energy_per_atom_error(output, target), target[AtomicDataDict.TOTAL_ENERGY_KEY]
    )
    if weights.forces > 0:
        forces = AtomicDataDict.FORCE_KEY
        loss = loss + weights.forces * mean_square_of_labelled(output[forces] - target[forces], target[forces])
    if weights.stress > 0:
        stress = AtomicDataDict.STRESS_KEY
        loss = loss + weights.stress * mean_square_of_labelled(output[stress] - target[stress], target[stress])
    return loss
