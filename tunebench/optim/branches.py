"""Independent computations as parallel branches of a CUDA graph.

A batched product of a few small matrices fills a fraction of a GPU. While a graph is captured, each computation goes to
a stream of its own, so that the graph may run them side by side; everywhere else they run one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

_Result = TypeVar("_Result")
_BRANCHES = 16
_streams: dict[int, list[torch.cuda.Stream]] = {}


def in_branches(calls: Sequence[Callable[[], _Result]]) -> list[_Result]:
    """The results of calls that do not depend on each other, in their order.

    Tensors that a branch makes may be used freely after it: the branches join before this returns, and every later
    branch starts from where the caller is then.
    """
    if len(calls) < 2 or not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return [call() for call in calls]
    main = torch.cuda.current_stream()
    streams = _streams_of(main.device_index)[: len(calls)]
    for stream in streams:
        stream.wait_stream(main)
    results = []
    for number, call in enumerate(calls):
        with torch.cuda.stream(streams[number % len(streams)]):
            results.append(call())
    for stream in streams:
        main.wait_stream(stream)
    return results


def _streams_of(device: int) -> list[torch.cuda.Stream]:
    if device not in _streams:
        _streams[device] = [torch.cuda.Stream(device) for _ in range(_BRANCHES)]  # type: ignore[no-untyped-call]
    return _streams[device]
