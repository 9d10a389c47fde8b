"""Ranger: RAdam with Lookahead and optional gradient centralisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from tunebench.optim.packing import Bucket, Segment, Tensors
from tunebench.optim.rule import Hyper, Phase, scalar
from tunebench.optim.rules.plain import PlainRule
from tunebench.optim.rules.radam import RectifiedScalars


@dataclass(frozen=True)
class Ranger(PlainRule):
    """RAdam whose every k-th step ends between the weights and a slow copy of them (Lookahead, arXiv:1907.08610).

    Before the rectification threshold a step descends along the first moment, as in the original Ranger;
    pytorch_optimizer.Ranger does so only with `degenerated_to_sgd=True` and ascends without it.

    Attributes:
        packing: how weights are packed.
        centralise: subtract from the gradient of a matrix block its mean over the inputs of each output
            (arXiv:2004.01461). Vector blocks are never centralised.
    """

    centralise: bool = False
    hyperparameters: ClassVar[tuple[str, ...]] = (
        "learning_rate",
        "beta1",
        "beta2",
        "eps",
        "weight_decay",
        "lookahead_k",
        "lookahead_alpha",
    )
    buffers: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def init(self, params: Tensors) -> Tensors:
        """State before the first step: zero averages, and slow weights that equal the weights."""
        return super().init(params) | {f"slow/{name}": weight.clone() for name, weight in params.items()}

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
        due = torch.remainder(step, hyper["lookahead_k"]) == 0
        weights: Tensors = {}
        buffers: Tensors = {}
        for segment in self.packing.segments:
            name = segment.name
            grad = centralised(grads[name], segment) if self.centralise and segment.is_matrix else grads[name]
            fast, buffers[f"exp_avg/{name}"], buffers[f"exp_avg_sq/{name}"] = scalars.apply(
                params[name], grad, state[f"exp_avg/{name}"], state[f"exp_avg_sq/{name}"]
            )
            slow = torch.lerp(state[f"slow/{name}"], fast, scalar(hyper["lookahead_alpha"], fast))
            weights[name] = torch.where(due, slow, fast)
            buffers[f"slow/{name}"] = torch.where(due, slow, state[f"slow/{name}"])
        return weights, buffers


def centralised(grad: torch.Tensor, segment: Segment) -> torch.Tensor:
    """The gradient of a matrix segment, (numel,), without its mean over the in axis of each matrix."""
    return torch.cat([piece.reshape(-1) for bucket in segment.buckets for piece in _centralised(grad, bucket)])


def _centralised(grad: torch.Tensor, bucket: Bucket) -> list[torch.Tensor]:
    matrices = bucket.of(grad)
    # Upright blocks are (in, out), the others are stored transposed.
    halves = [(matrices[: bucket.upright], -2), (matrices[bucket.upright :], -1)]
    return [half - half.mean(axis, keepdim=True) for half, axis in halves if half.shape[0]]
