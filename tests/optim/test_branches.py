"""Streams of a captured graph's branches, with torch's pool of streams played by a fake: no CUDA device is needed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
import torch

from tunebench.optim import branches
from tunebench.optim.branches import Beside, in_branches

POOL = 32


@dataclass
class FakeStream:
    """What torch gives out: a handle of the pool, in turns."""

    cuda_stream: int
    device_index: int = 0
    waited_for: list[int] = field(default_factory=list)

    def wait_stream(self, other: FakeStream) -> None:
        self.waited_for.append(other.cuda_stream)


class FakeCuda:
    """Hands out streams, and knows which one is current."""

    def __init__(self) -> None:
        self.handles = itertools.cycle(range(POOL))
        self.current = self.stream_of(0)

    def stream_of(self, device: int) -> FakeStream:
        return FakeStream(next(self.handles), device)

    def within(self, stream: FakeStream | None) -> _Within:
        return _Within(self, stream)


@dataclass
class _Within:
    cuda: FakeCuda
    stream: FakeStream | None

    def __enter__(self) -> None:
        self.before = self.cuda.current
        self.cuda.current = self.stream or self.before

    def __exit__(self, *raised: object) -> None:
        self.cuda.current = self.before


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """While a graph is captured."""
    fake = FakeCuda()
    monkeypatch.setattr(branches, "_streams", {})
    monkeypatch.setattr(branches, "_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", fake.stream_of)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: fake.current)
    monkeypatch.setattr(torch.cuda, "stream", fake.within)
    return fake


def test_no_two_purposes_share_a_stream(cuda: FakeCuda) -> None:
    main = cuda.current.cuda_stream
    used: dict[str, set[int]] = {"beside": set(), "branches beside": set(), "branches": set()}

    def noted(purpose: str) -> int:
        used[purpose].add(cuda.current.cuda_stream)
        return len(used[purpose])

    def nested() -> None:
        noted("beside")
        in_branches([lambda: noted("branches beside")] * 40)

    refresh = Beside(nested, "refresh")
    scalars = Beside(lambda: noted("beside"), "scalars")
    in_branches([lambda: noted("branches")] * 40)
    refresh.result()
    scalars.result()
    assert [len(found) for found in used.values()] == [2, branches._BRANCHES, branches._BRANCHES]
    assert len(set.union(*used.values())) == 2 + 2 * branches._BRANCHES
    assert main not in set.union(*used.values())


def test_branches_start_where_the_caller_is_and_are_over_when_it_goes_on(cuda: FakeCuda) -> None:
    main = cuda.current
    streams: list[FakeStream] = []
    assert in_branches([lambda: streams.append(cuda.current), lambda: streams.append(cuda.current)]) == [None, None]
    assert all(stream.waited_for == [main.cuda_stream] for stream in streams)
    assert main.waited_for == [stream.cuda_stream for stream in streams]


def test_without_a_stream_to_spare_everything_runs_on_the_callers(cuda: FakeCuda) -> None:
    for number in range(4):
        Beside(lambda: in_branches([int] * 20), f"lane {number}").result()
    main = cuda.current
    seen: list[FakeStream] = []
    assert in_branches([lambda: seen.append(cuda.current)] * 3) == [None] * 3
    assert Beside(lambda: seen.append(cuda.current), "one more").result() is None
    assert all(stream is main for stream in seen)
