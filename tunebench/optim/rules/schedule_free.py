"""Schedule-free AdamW: averaging in place of a learning rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tunebench.optim.packing import Tensors
from tunebench.optim.rule import Hyper, Phase, scalar
from tunebench.optim.rules.plain import PlainRule


@dataclass(frozen=True)
class ScheduleFree(PlainRule):
    """Schedule-free AdamW (arXiv:2405.15682) as schedulefree.AdamWScheduleFree.

    The weights that are trained, `params`, are the paper's y, between the iterate z (kept in the state) and the
    average x, which is read by `averaged`.

    Attributes:
        packing: how weights are packed.
        warmup_steps: steps of linear learning rate warm-up.
        r: a step's weight in the average grows with its number to this power.
        weight_lr_power: a step's weight in the average grows with the largest learning rate so far to this power.
    """

    warmup_steps: int = 0
    r: float = 0.0
    weight_lr_power: float = 2.0
    hyperparameters: ClassVar[tuple[str, ...]] = ("learning_rate", "beta1", "beta2", "eps", "weight_decay")
    buffers: ClassVar[tuple[str, ...]] = ("exp_avg_sq",)

    def init(self, params: Tensors) -> Tensors:
        """State before the first step: z equals the weights, no step has weight in the average."""
        zero = torch.zeros((), dtype=torch.float64, device=next(iter(params.values())).device)
        state = {f"z/{name}": weight.clone() for name, weight in params.items()}
        return super().init(params) | state | {"lr_max": zero, "weight_sum": zero.clone()}

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
        if self.warmup_steps:
            learning_rate = learning_rate * torch.clamp(step.to(torch.float64) / self.warmup_steps, max=1.0)
        lr_max = torch.maximum(state["lr_max"], learning_rate)
        weight = lr_max**self.weight_lr_power * step.to(torch.float64) ** self.r
        weight_sum = state["weight_sum"] + weight
        share = torch.where(weight_sum == 0, torch.zeros_like(weight), weight / weight_sum)
        root = torch.sqrt(1 - hyper["beta2"] ** step)
        amount = learning_rate * (hyper["beta1"] * (1 - share) - 1)
        weights: Tensors = {}
        buffers: Tensors = {"lr_max": lr_max, "weight_sum": weight_sum}
        for name, grad in grads.items():
            y, z = params[name], state[f"z/{name}"]
            square = grad * grad * scalar(1 - hyper["beta2"], grad)
            exp_avg_sq = torch.addcmul(square, state[f"exp_avg_sq/{name}"], scalar(hyper["beta2"], grad))
            direction = grad * scalar(root, grad) / (torch.sqrt(exp_avg_sq) + scalar(hyper["eps"] * root, grad))
            direction = torch.addcmul(direction, y, scalar(hyper["weight_decay"], grad))
            weights[name] = torch.addcmul(torch.lerp(y, z, scalar(share, grad)), direction, scalar(amount, grad))
            buffers[f"z/{name}"] = torch.addcmul(z, direction, scalar(-learning_rate, grad))
            buffers[f"exp_avg_sq/{name}"] = exp_avg_sq
        return weights, buffers

    def averaged(self, params: Tensors, state: Tensors, hyper: Hyper) -> Tensors:
        """The average x of trained weights y: what to validate, save and deploy; beta1 must not be zero."""
        weight = 1 - 1 / hyper["beta1"]
        return {name: torch.lerp(y, state[f"z/{name}"], scalar(weight, y)) for name, y in params.items()}

    def trained(self, averaged: Tensors, state: Tensors, hyper: Hyper) -> Tensors:
        """The inverse of `averaged`, up to round-off: weights y to go on training from."""
        weight = 1 - hyper["beta1"]
        return {name: torch.lerp(x, state[f"z/{name}"], scalar(weight, x)) for name, x in averaged.items()}
