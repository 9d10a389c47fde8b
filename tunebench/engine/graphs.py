"""CUDA graphs of work on tensors that stay where they are."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all it was given; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Give back what nobody refers to any more, to the device too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Replayed:
    """A computation that is captured at its second call and replayed from then on; on the CPU it is only called.

    The first call runs as it is, so that lazy initialisation is over before the capture. Whatever the computation reads
    and writes must stay at its address, and it may return nothing.

    Args:
        call: the computation.
        device: where it runs.
    """

    def __init__(self, call: Callable[[], None], device: torch.device) -> None:
        self._call = call
        self._captures = device.type == "cuda"
        self._called = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        """Do it."""
        if self._graph is not None:
            self._graph.replay()
        elif not self._called or not self._captures:
            self._called = True
            self._call()
        else:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._call()
            self._graph = graph
            graph.replay()
