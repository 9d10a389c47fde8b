"""What can be seen of a capture without a GPU: which parts of torch it calls, and in which surroundings."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tunebench.engine.graphs import Replayed


@pytest.fixture
def collecting(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether Python collects garbage at the beginning and at the end of each capture."""
    seen: list[bool] = []

    class Graph:
        def replay(self) -> None:
            seen.append(gc.isenabled())

    @contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        seen.append(gc.isenabled())
        yield
        seen.append(gc.isenabled())

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    return seen


def test_no_garbage_is_collected_while_a_graph_is_captured(collecting: list[bool]) -> None:
    replayed = Replayed(lambda: None, torch.device("cuda"))
    for _ in range(2):  # the second call captures
        replayed()
    assert collecting == [False, False, True]
    assert gc.isenabled()


def test_garbage_is_collected_again_after_a_capture_that_failed(collecting: list[bool]) -> None:
    calls = iter([None, RuntimeError("out of memory")])

    def call() -> None:
        if (error := next(calls)) is not None:
            raise error

    replayed = Replayed(call, torch.device("cuda"))
    replayed()
    with pytest.raises(RuntimeError, match="out of memory"):
        replayed()
    assert gc.isenabled()
