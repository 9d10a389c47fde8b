"""RAdam: Adam that waits until its second moment can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tunebench.optim.packing import Tensors
from tunebench.optim.rule import Hyper, Phase, scalar
from tunebench.optim.rules.adam import moments
from tunebench.optim.rules.plain import PlainRule


@dataclass(frozen=True)
class RectifiedScalars:
    """RAdam's step (arXiv:1908.03265, algorithm 2) as scalars that serve every segment.

    Attributes:
        beta1, beta2: decay rates.
        eps: added to the uncorrected root of the second moment, as torch.optim.RAdam.
        rectified: whether the second moment is used; before, a step follows the first moment alone.
        amount: negative step length in either case.
        keep: what decoupled weight decay leaves of a weight.
    """

    beta1: torch.Tensor
    beta2: torch.Tensor
    eps: torch.Tensor
    rectified: torch.Tensor
    amount: torch.Tensor
    keep: torch.Tensor

    @classmethod
    def at(cls, step: torch.Tensor, hyper: Hyper) -> RectifiedScalars:
        """The scalars of step number `step` (from 1), for the hyperparameters of `RAdam`."""
        learning_rate, beta1, beta2 = hyper["learning_rate"], hyper["beta1"], hyper["beta2"]
        power = beta2**step
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * step * power / (1 - power)
        # Threshold 5 as in torch and pytorch_optimizer; the paper has 4.
        rectified = length > 5
        variance = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        adaptive = torch.sqrt(torch.where(rectified, variance * (1 - power), torch.ones_like(variance)))
        amount = -learning_rate / (1 - beta1**step) * adaptive
        return cls(beta1, beta2, hyper["eps"], rectified, amount, 1 - learning_rate * hyper["weight_decay"])

    def apply(
        self, weight: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One vector's new weight and averages."""
        exp_avg, exp_avg_sq = moments(grad, exp_avg, exp_avg_sq, self.beta1, self.beta2)
        one = scalar(torch.ones_like(self.amount), grad)
        spread = torch.where(self.rectified, torch.sqrt(exp_avg_sq) + scalar(self.eps, grad), one)
        weight = torch.addcmul(weight * scalar(self.keep, grad), exp_avg / spread, scalar(self.amount, grad))
        return weight, exp_avg, exp_avg_sq


@dataclass(frozen=True)
class RAdam(PlainRule):
    """Rectified Adam as torch.optim.RAdam with `decoupled_weight_decay=True`.

    Attributes:
        packing: how weights are packed.
    """

    hyperparameters: ClassVar[tuple[str, ...]] = ("learning_rate", "beta1", "beta2", "eps", "weight_decay")
    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def update(
        self,
        grads: Tensors,
        state: Tensors,
        params: Tensors,
        hyper: Hyper,
        step: torch.Tensor,
        phase: Phase = Phase.PLAIN,
    ) -> tuple[Tensors, Tensors]:
        """One step, see `UpdateRule.update`."""
        scalars = RectifiedScalars.at(step, hyper)
        weights: Tensors = {}
        averages: Tensors = {}
        for name, grad in grads.items():
            weights[name], averages[f"exp_avg/{name}"], averages[f"exp_avg_sq/{name}"] = scalars.apply(
                params[name], grad, state[f"exp_avg/{name}"], state[f"exp_avg_sq/{name}"]
            )
        return weights, averages
