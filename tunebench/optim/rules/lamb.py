"""LAMB: Adam with a trust ratio per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tunebench.optim.packing import Segment, Tensors
from tunebench.optim.rule import Hyper, Phase, scalar
from tunebench.optim.rules.adam import moments
from tunebench.optim.rules.plain import PlainRule


@dataclass(frozen=True)
class Lamb(PlainRule):
    """LAMB (arXiv:1904.00962v3, no bias correction), with the clamp of the weight norm as a hyperparameter.

    Equals pytorch_optimizer.Lamb with `adam_debias=True`; without it the library divides the learning rate by
    1 - beta1^t, so that its first step is ten times the learning rate at beta1 = 0.9.

    The weight norm enters the trust ratio as min(norm, clamp). e3nn weights have unit variance, so almost all norms
    exceed the customary 10 and the layer-wise adaptivity is gone; clamp = inf keeps it. One trust ratio per block of
    the packing: the paths inside a flat weight are layers of their own.

    Attributes:
        packing: how weights are packed.
    """

    hyperparameters: ClassVar[tuple[str, ...]] = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "clamp")
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
        keep = 1 - hyper["learning_rate"] * hyper["weight_decay"]
        weights: Tensors = {}
        averages: Tensors = {}
        for segment in self.packing.segments:
            name = segment.name
            grad = grads[name]
            exp_avg, exp_avg_sq = moments(
                grad, state[f"exp_avg/{name}"], state[f"exp_avg_sq/{name}"], hyper["beta1"], hyper["beta2"]
            )
            direction = exp_avg / (torch.sqrt(exp_avg_sq) + scalar(hyper["eps"], grad))
            weight = params[name] * scalar(keep, grad)
            trust = trust_ratios(weight, direction, segment, hyper)
            amount = segment.spread(trust * scalar(-hyper["learning_rate"], grad))
            weights[name] = torch.addcmul(weight, direction, amount)
            averages |= {f"exp_avg/{name}": exp_avg, f"exp_avg_sq/{name}": exp_avg_sq}
        return weights, averages


def trust_ratios(weight: torch.Tensor, direction: torch.Tensor, segment: Segment, hyper: Hyper) -> torch.Tensor:
    """Weight norm, at most `clamp`, over the norm of the direction per block, (blocks,); 1 where either is zero."""
    weight_norm = torch.minimum(_block_norms(weight, segment), scalar(hyper["clamp"], weight))
    norm = _block_norms(direction, segment)
    ratio = weight_norm / (norm + scalar(hyper["eps"], weight))
    return torch.where((weight_norm == 0) | (norm == 0), torch.ones_like(ratio), ratio)


def _block_norms(values: torch.Tensor, segment: Segment) -> torch.Tensor:
    return torch.sqrt(segment.block_sums(values * values))
