"""Muon: orthogonalised momentum for matrices, AdamW for the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import ClassVar

import torch

from tunebench.optim.branches import Beside
from tunebench.optim.newton_schulz import QUINTIC, orthogonalise
from tunebench.optim.packing import Segment, Tensors
from tunebench.optim.rule import Hyper, Phase, scalar
from tunebench.optim.rules.adam import AdamScalars
from tunebench.optim.rules.plain import PlainRule


class Scale(StrEnum):
    """Size of an orthogonalised (in, out) matrix in the update.

    MATCH_RMS_ADAMW: 0.2 sqrt(max(in, out)), an update as large as AdamW's (arXiv:2502.16982), so learning rates are
    comparable. KELLER: sqrt(max(1, out / in)), Jordan's factor, with out and in as they are and not as rows and
    columns happen to be stored.
    """

    MATCH_RMS_ADAMW = "match_rms_adamw"
    KELLER = "keller"

    def factor(self, fan_in: int, fan_out: int) -> float:
        """What the orthogonalised matrix is multiplied by."""
        if self is Scale.KELLER:
            return math.sqrt(max(1.0, fan_out / fan_in))
        return 0.2 * math.sqrt(max(fan_in, fan_out))


@dataclass(frozen=True)
class Muon(PlainRule):
    """Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) as torch.optim.Muon, on the blocks' true matrices.

    Newton-Schulz runs in at least float32. Vector segments follow AdamW with hyperparameters of their own and a
    learning rate of `learning_rate * aux_learning_rate_ratio`.

    Attributes:
        packing: how weights are packed.
        nesterov: orthogonalise the gradient's average with the momentum in place of the momentum.
        scale: size of the update.
        newton_schulz_steps: number of quintic steps.
    """

    nesterov: bool = True
    scale: Scale = Scale.MATCH_RMS_ADAMW
    newton_schulz_steps: int = 5
    hyperparameters: ClassVar[tuple[str, ...]] = (
        "learning_rate",
        "momentum",
        "weight_decay",
        "aux_learning_rate_ratio",
        "aux_beta1",
        "aux_beta2",
        "aux_eps",
        "aux_weight_decay",
    )

    def init(self, params: Tensors) -> Tensors:
        """State before the first step: zero momentum of matrix segments, zero averages of vector segments."""
        state: Tensors = {}
        for segment in self.packing.segments:
            buffers = ("momentum",) if segment.is_matrix else ("exp_avg", "exp_avg_sq")
            state |= {f"{buffer}/{segment.name}": torch.zeros_like(params[segment.name]) for buffer in buffers}
        return state

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
        rest = Beside(partial(self._auxiliary_steps, grads, state, params, hyper, step), "auxiliary")
        weights: Tensors = {}
        buffers: Tensors = {}
        for segment in self.packing.segments:
            if segment.is_matrix:
                name = segment.name
                weights[name], buffers[f"momentum/{name}"] = self._matrix_step(
                    segment, params[name], grads[name], state[f"momentum/{name}"], hyper
                )
        auxiliary_weights, auxiliary_buffers = rest.result()
        return weights | auxiliary_weights, buffers | auxiliary_buffers

    def _auxiliary_steps(
        self, grads: Tensors, state: Tensors, params: Tensors, hyper: Hyper, step: torch.Tensor
    ) -> tuple[Tensors, Tensors]:
        scalars = auxiliary_scalars(hyper, step)
        weights: Tensors = {}
        buffers: Tensors = {}
        for name in (segment.name for segment in self.packing.segments if not segment.is_matrix):
            weights[name], buffers[f"exp_avg/{name}"], buffers[f"exp_avg_sq/{name}"] = scalars.apply(
                params[name], grads[name], state[f"exp_avg/{name}"], state[f"exp_avg_sq/{name}"]
            )
        return weights, buffers

    def _matrix_step(
        self, segment: Segment, weight: torch.Tensor, grad: torch.Tensor, momentum: torch.Tensor, hyper: Hyper
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scalars = Beside(partial(_step_scalars, hyper, weight), "scalars")
        momentum = torch.lerp(momentum, grad, scalar(1 - hyper["momentum"], grad))
        direction = torch.lerp(grad, momentum, scalar(hyper["momentum"], grad)) if self.nesterov else momentum
        stacks = [bucket.stack(direction) for bucket in segment.buckets]
        sized = [partial(bucket.scaled, factor=self.scale.factor) for bucket in segment.buckets]
        orthogonal = orthogonalise(stacks, [QUINTIC] * self.newton_schulz_steps, sized)
        update = torch.cat([stack.reshape(-1) for stack in orthogonal]).to(weight.dtype)
        keep, amount = scalars.result()
        return torch.addcmul(weight * keep, update, amount), momentum


def _step_scalars(hyper: Hyper, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What weight decay leaves of a weight, and the negative learning rate."""
    keep = 1 - hyper["learning_rate"] * hyper["weight_decay"]
    return scalar(keep, like), scalar(-hyper["learning_rate"], like)


def auxiliary_scalars(hyper: Hyper, step: torch.Tensor) -> AdamScalars:
    """The scalars of a matrix rule's AdamW for vector segments, from the `aux_*` hyperparameters."""
    return AdamScalars.at(
        step,
        learning_rate=hyper["learning_rate"] * hyper["aux_learning_rate_ratio"],
        beta1=hyper["aux_beta1"],
        beta2=hyper["aux_beta2"],
        eps=hyper["aux_eps"],
        weight_decay=hyper["aux_weight_decay"],
    )
