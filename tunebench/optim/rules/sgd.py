"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tunebench.optim.packing import Tensors
from tunebench.optim.rule import Hyper, Phase, scalar
from tunebench.optim.rules.plain import PlainRule


@dataclass(frozen=True)
class Sgd(PlainRule):
    """Heavy-ball or Nesterov momentum as torch.optim.SGD, but with decoupled weight decay.

    Attributes:
        packing: how weights are packed.
        nesterov: look ahead along the momentum (Sutskever et al., ICML 2013).
    """

    nesterov: bool = False
    hyperparameters: ClassVar[tuple[str, ...]] = ("learning_rate", "momentum", "weight_decay")
    buffers: ClassVar[tuple[str, ...]] = ("momentum",)

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
        learning_rate = hyper["learning_rate"]
        keep = 1 - learning_rate * hyper["weight_decay"]
        weights: Tensors = {}
        buffers: Tensors = {}
        for name, grad in grads.items():
            momentum = scalar(hyper["momentum"], grad)
            buffer = torch.addcmul(grad, state[f"momentum/{name}"], momentum)
            direction = torch.addcmul(grad, buffer, momentum) if self.nesterov else buffer
            weights[name] = torch.addcmul(params[name] * scalar(keep, grad), direction, scalar(-learning_rate, grad))
            buffers[f"momentum/{name}"] = buffer
        return weights, buffers
