"""CUDA graphs of work on tensors that stay where they are."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from tunebench.optim.captured import garbage_kept


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
            with garbage_kept(), _workspaces_of_its_own(), torch.cuda.graph(graph):
                self._call()
            self._graph = graph
            graph.replay()


@contextmanager
def _workspaces_of_its_own() -> Iterator[None]:
    """What is captured within has memory of its own for cuBLAS, which otherwise keeps one piece for each stream.

    All graphs are captured on the same streams. Replayed side by side they would write into one piece.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


class Lanes:
    """Streams of one device for work that does not depend on each other; on the CPU it is done one after another.

    A captured graph of small products fills a fraction of a GPU; several run side by side.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: list[torch.cuda.Stream] = []
        self._taken = 0

    @contextmanager
    def lane(self) -> Iterator[None]:
        """What is launched within starts from where the caller is now, and runs beside other lanes until `join`."""
        if self._device.type != "cuda":
            yield
            return
        if self._taken == len(self._streams):
            self._streams.append(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]
        stream = self._streams[self._taken]
        self._taken += 1
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Whatever the caller launches from now on comes after all lanes."""
        for stream in self._streams[: self._taken]:
            torch.cuda.current_stream(self._device).wait_stream(stream)
        self._taken = 0
