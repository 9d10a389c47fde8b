"""A loss metric for `nequip-train` on partial labels: batches without a label count nothing instead of NaN."""

from __future__ import annotations

import torch
from nequip.train import MeanSquaredError


class LabelledMeanSquaredError(MeanSquaredError):  # type: ignore[misc]  # nequip carries no types
    """Mean squared error that is 0, with zero gradient, for a batch without a single label.

    NequIP's own divides 0 by 0 there, and one NaN ends a training run. With it, the loss of a `nequip-train` config
    equals `tunebench.engine.loss.weighted_loss` on every batch.
    """

    def compute(self) -> torch.Tensor:
        """Sum of squares over the number of labelled components, at least 1."""
        mean: torch.Tensor = self.sum.div(self.count.clamp_min(1))
        return mean
