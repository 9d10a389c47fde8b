"""Independent computations as parallel branches of a CUDA graph.

A batched product of a few small matrices fills a fraction of a GPU, and a chain of scalars next to nothing. While a
graph is captured, each computation goes to a stream of its own, so that the graph may run them side by side; everywhere
else they run one after another.

Memory that is freed goes to the next allocation on the stream it came from, whoever may still read it. So no two
purposes may share a stream, and torch has 32 of them, which it hands out in turns, again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

_Result = TypeVar("_Result")
_BRANCHES = 12  # for the main stream and for what runs beside it: with that and their origins 29 of 32 streams
_STREAMS_OF_TORCH = 32
_streams: dict[tuple[str, int, int], list[torch.cuda.Stream]] = {}


def in_branches(calls: Sequence[Callable[[], _Result]]) -> list[_Result]:
    """The results of calls that do not depend on each other, in their order.

    Tensors that a branch makes may be used freely after it: the branches join before this returns, and every later
    branch starts from where the caller is then.
    """
    if len(calls) < 2 or not _capturing():
        return [call() for call in calls]
    main = torch.cuda.current_stream()
    streams = _streams_from(main, "branches", _BRANCHES)[: len(calls)]
    if not streams:
        return [call() for call in calls]
    for stream in streams:
        stream.wait_stream(main)
    results = []
    for number, call in enumerate(calls):
        with torch.cuda.stream(streams[number % len(streams)]):
            results.append(call())
    for stream in streams:
        main.wait_stream(stream)
    return results


class Beside(Generic[_Result]):
    """A computation that runs beside what follows, until its result is asked for.

    Whatever it reads must not be changed before `result` was called; it is kept alive until then.

    Args:
        call: the computation, with all it reads.
        lane: computations that are under way at once need lanes of their own.
    """

    def __init__(self, call: Callable[[], _Result], lane: str) -> None:
        self._call = call
        self._stream: torch.cuda.Stream | None = None
        if _capturing():
            main = torch.cuda.current_stream()
            self._stream = next(iter(_streams_from(main, lane, 1)), None)
            if self._stream is not None:
                self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            self._result = call()

    def result(self) -> _Result:
        """What the computation returned, once it is done."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        return self._result


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _streams_from(main: torch.cuda.Stream, lane: str, number: int) -> list[torch.cuda.Stream]:
    """Streams that only this lane of `main` uses: shared ones would wait for each other, and share memory.

    At most `number`; fewer, even none, where torch has no more that nobody uses.
    """
    key = lane, main.device_index, main.cuda_stream
    if key not in _streams:
        taken = {main.cuda_stream} | {origin for _, _, origin in _streams}
        taken |= {used.cuda_stream for of_lane in _streams.values() for used in of_lane}
        offered = [torch.cuda.Stream(main.device_index) for _ in range(_STREAMS_OF_TORCH)]  # type: ignore[no-untyped-call]
        unused = {stream.cuda_stream: stream for stream in offered if stream.cuda_stream not in taken}
        _streams[key] = list(unused.values())[:number]
    return _streams[key]
