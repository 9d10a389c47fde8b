"""What rules without preconditioners have in common: every step is the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from tunebench.optim.packing import Packing, Tensors
from tunebench.optim.rule import Phase


@dataclass(frozen=True)
class PlainRule:
    """A rule whose state starts at zero and whose steps are all plain.

    Attributes:
        packing: how weights are packed.
        buffers: names of the vectors kept per segment, under `buffer/segment`.
    """

    packing: Packing
    buffers: ClassVar[tuple[str, ...]] = ()

    def init(self, params: Tensors) -> Tensors:
        """State before the first step: zeros, shaped as the weights."""
        return {f"{buffer}/{name}": torch.zeros_like(params[name]) for buffer in self.buffers for name in params}

    def phase(self, step: int, hyper: Mapping[str, float]) -> Phase:
        """Always `Phase.PLAIN`."""
        return Phase.PLAIN
