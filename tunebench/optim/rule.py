"""What every update rule is: pure functions of packed weights, gradients and state.

A rule never branches on a tensor's value, so the same code runs once for a single model, under `torch.func.vmap` for
the slots of a cohort with different hyperparameters, and inside a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Protocol

import torch

from tunebench.optim.packing import Packing, Tensors

Hyper = Mapping[str, torch.Tensor]
"""Hyperparameters as zero-dimensional float64 tensors on the weights' device (one per slot under `vmap`)."""


class Phase(StrEnum):
    """What a step has to do beyond its plain update; the host knows it before the step.

    PLAIN: nothing. REFRESH: preconditioners may be due. START: a first step among the slots. A later phase includes
    the earlier ones and leaves every slot that is not due exactly as PLAIN would.
    """

    PLAIN = "plain"
    REFRESH = "refresh"
    START = "start"


class UpdateRule(Protocol):
    """One optimizer's mathematics.

    Attributes:
        packing: how weights are packed; all dictionaries of weights and gradients are keyed by its segments' names.
    """

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Names that `update` reads from `hyper`."""
        ...

    @property
    def packing(self) -> Packing:
        """How weights are packed."""
        ...

    def init(self, params: Tensors) -> Tensors:
        """State before the first step."""
        ...

    def update(
        self,
        grads: Tensors,
        state: Tensors,
        params: Tensors,
        hyper: Hyper,
        step: torch.Tensor,
        phase: Phase = Phase.PLAIN,
    ) -> tuple[Tensors, Tensors]:
        """One step: new weights and new state; nothing is changed in place.

        Args:
            grads: gradients, one vector per segment.
            state: from `init` or the last `update`.
            params: weights, one vector per segment.
            hyper: the rule's hyperparameters.
            step: number of this step, counted from 1, int64, zero-dimensional.
            phase: at least what this step needs, see `phase`.
        """
        ...

    def phase(self, step: int, hyper: Mapping[str, float]) -> Phase:
        """What step number `step` (from 1) needs under these hyperparameters."""
        ...


Renewal = Callable[[Tensors, Phase], Tensors]
"""From the state of one slot after a plain step to the tensors that a step of this phase leaves otherwise."""


def renewal_of(rule: UpdateRule) -> Renewal | None:
    """What makes a whole step out of a plain one; None for rules whose step cannot be divided, or is always plain.

    So that who updates many slots at once has those renewed that are due, and no others.
    """
    found: Renewal | None = getattr(rule, "renewal", None)
    return found


def scalar(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A float64 scalar in the dtype of the vector it multiplies (under `vmap` it would promote the vector)."""
    return value.to(like.dtype)
