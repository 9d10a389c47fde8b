"""Adam and AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tunebench.optim.packing import Tensors
from tunebench.optim.rule import Hyper, Phase, scalar
from tunebench.optim.rules.plain import PlainRule


def moments(
    grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor, beta1: torch.Tensor, beta2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adam's running averages of the gradient and of its square, neither corrected for the zero start.

    Args:
        grad: (numel,).
        exp_avg: average of the gradient before this one, (numel,).
        exp_avg_sq: average of its square before this one, (numel,).
        beta1: decay rate of the gradient's average, zero-dimensional float64.
        beta2: decay rate of the square's average, likewise.
    """
    return average(exp_avg, grad, beta1), average_square(exp_avg_sq, grad, beta2)


def average(exp_avg: torch.Tensor, grad: torch.Tensor, beta1: torch.Tensor) -> torch.Tensor:
    """The running average with one more gradient; as `moments`."""
    return torch.lerp(exp_avg, grad, scalar(1 - beta1, grad))


def average_square(exp_avg_sq: torch.Tensor, grad: torch.Tensor, beta2: torch.Tensor) -> torch.Tensor:
    """The running average of squares with one more gradient; as `moments`."""
    # No lerp: it would turn a square that overflowed to infinity into NaN, where Adam merely stops moving the weight.
    return torch.addcmul(exp_avg_sq * scalar(beta2, grad), grad, grad * scalar(1 - beta2, grad))


@dataclass(frozen=True)
class AdamScalars:
    """Adam's step with the bias corrections folded in: `weight * keep + amount * exp_avg / (sqrt(exp_avg_sq) + eps)`.

    One set of scalars serves every segment. Equals AdamW (arXiv:1711.05101, algorithm 2), whose epsilon is added to the
    corrected root: here epsilon carries the inverse correction.

    Attributes:
        beta1, beta2: decay rates.
        amount: negative step length.
        eps: epsilon times the square root of the second bias correction.
        keep: what decoupled weight decay leaves of a weight.
    """

    beta1: torch.Tensor
    beta2: torch.Tensor
    amount: torch.Tensor
    eps: torch.Tensor
    keep: torch.Tensor

    @classmethod
    def at(
        cls,
        step: torch.Tensor,
        *,
        learning_rate: torch.Tensor,
        beta1: torch.Tensor,
        beta2: torch.Tensor,
        eps: torch.Tensor,
        weight_decay: torch.Tensor,
    ) -> AdamScalars:
        """The scalars of step number `step` (from 1); all arguments zero-dimensional, float64 but for the step."""
        root = torch.sqrt(1 - beta2**step)
        amount = -learning_rate * root / (1 - beta1**step)
        return cls(beta1, beta2, amount, eps * root, 1 - learning_rate * weight_decay)

    def apply(
        self, weight: torch.Tensor, grad: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One vector's new weight and averages."""
        exp_avg, exp_avg_sq = moments(grad, exp_avg, exp_avg_sq, self.beta1, self.beta2)
        direction = exp_avg / (torch.sqrt(exp_avg_sq) + scalar(self.eps, grad))
        weight = torch.addcmul(weight * scalar(self.keep, grad), direction, scalar(self.amount, grad))
        return weight, exp_avg, exp_avg_sq


@dataclass(frozen=True)
class Adam(PlainRule):
    """Adam (arXiv:1412.6980) and AdamW (arXiv:1711.05101), as torch.optim.Adam and torch.optim.AdamW.

    Attributes:
        packing: how weights are packed.
        decoupled: AdamW, which decays weights directly; else weight decay is added to the gradient.
    """

    decoupled: bool = True
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
        weight_decay = hyper["weight_decay"]
        scalars = AdamScalars.at(
            step,
            learning_rate=hyper["learning_rate"],
            beta1=hyper["beta1"],
            beta2=hyper["beta2"],
            eps=hyper["eps"],
            weight_decay=weight_decay if self.decoupled else torch.zeros_like(weight_decay),
        )
        weights: Tensors = {}
        averages: Tensors = {}
        for name, grad in grads.items():
            weight = params[name]
            if not self.decoupled:
                grad = torch.addcmul(grad, weight, scalar(weight_decay, grad))
            weights[name], averages[f"exp_avg/{name}"], averages[f"exp_avg_sq/{name}"] = scalars.apply(
                weight, grad, state[f"exp_avg/{name}"], state[f"exp_avg_sq/{name}"]
            )
        return weights, averages
