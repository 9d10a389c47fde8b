"""A rule's step as CUDA graphs: one launch in place of hundreds."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from tunebench.optim.branches import Beside
from tunebench.optim.packing import Tensors
from tunebench.optim.rule import Hyper, Phase, UpdateRule

_Key = tuple[Phase, tuple[int, ...]]


class CapturedStep:
    """One graph per phase, captured at the phase's second step; the first runs uncaptured, as does every START.

    Weights and state are changed in place. A graph is bound to addresses, so weights that moved are captured again.

    Args:
        rule: the update rule.
        parameters: the weights by name, on a CUDA device when the first step is made.
    """

    def __init__(self, rule: UpdateRule, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        self._rule = rule
        self._parameters = dict(parameters)
        self._flat_grads: dict[torch.dtype, torch.Tensor] = {}
        self._grads: Tensors = {}
        self._step: torch.Tensor | None = None
        self._seen: set[_Key] = set()
        self._graphs: dict[_Key, torch.cuda.CUDAGraph] = {}

    def __call__(
        self,
        grads: Mapping[str, torch.Tensor],
        live: Sequence[str],
        state: Tensors,
        hyper: Hyper,
        step: int,
        phase: Phase,
    ) -> None:
        """Make one step in place.

        Args:
            grads: gradients by parameter name.
            live: names of the parameters that may change.
            state: the rule's state; the same tensors at every call, or the graphs are captured anew.
            hyper: hyperparameters; likewise.
            step: number of this step, from 1.
            phase: what the rule says of this step.

        Raises:
            ValueError: the weights are not on a CUDA device.
        """
        device = next(iter(self._parameters.values())).device
        if device.type != "cuda":
            raise ValueError(f"capture: found weights on {device}, allowed: a CUDA device")
        self._fill_inputs(grads, step, device)
        used = (*(self._parameters[name] for name in live), *state.values(), *hyper.values())
        key = phase, tuple(tensor.data_ptr() for tensor in used)
        if key in self._graphs:
            self._graphs[key].replay()
        elif phase is Phase.START or key not in self._seen:
            self._seen.add(key)
            self._update(live, state, hyper, phase)
        else:
            self._graphs[key] = self._capture(live, state, hyper, phase)
            self._graphs[key].replay()

    def _fill_inputs(self, grads: Mapping[str, torch.Tensor], step: int, device: torch.device) -> None:
        if self._step is None or self._step.device != device:
            self._flat_grads = self._rule.packing.buffers(device)
            self._grads = self._rule.packing.split(self._flat_grads)
            self._step = torch.zeros((), dtype=torch.int64, device=device)
        torch._foreach_copy_(list(self._grads.values()), [grads[name] for name in self._grads])
        self._step.fill_(step)

    def _capture(self, live: Sequence[str], state: Tensors, hyper: Hyper, phase: Phase) -> torch.cuda.CUDAGraph:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with garbage_kept(), torch.cuda.graph(graph):
            self._update(live, state, hyper, phase)
        return graph

    def _update(self, live: Sequence[str], state: Tensors, hyper: Hyper, phase: Phase) -> None:
        assert self._step is not None
        packing = self._rule.packing
        # As `pack`, with one kernel for all weights in place of a concatenation of hundreds.
        flat = packing.buffers(self._step.device)
        copies = packing.split(flat)
        torch._foreach_copy_(list(copies.values()), [self._parameters[name] for name in copies])
        grads, weights = packing.arranged(self._flat_grads), packing.arranged(flat)
        weights, new = self._rule.update(grads, state, weights, hyper, self._step, phase)
        kept = Beside(partial(torch._foreach_copy_, [state[name] for name in new], list(new.values())), "state")
        named = packing.unpack(weights)
        torch._foreach_copy_([self._parameters[name] for name in live], [named[name] for name in live])
        kept.result()


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Nothing that only refers to itself is deleted within, while a graph is captured.

    A dead graph among it would be destroyed, which ends the capture.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
