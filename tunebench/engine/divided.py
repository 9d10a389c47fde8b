"""A large graph as several that run one after the other, so that processes can compile them at the same time.

Inductor compiles a graph in one thread of Python, in a time that grows with the number of its nodes. A graph is cut
where few bytes are alive: what is computed before a cut and read after it is written out, and fused over it no more.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from tunebench.engine.rewrites import REPEATS, VIEWS

# A cut lies within this share of a part's length of where parts of equal length would be cut.
_REACH = 0.25
_NO_TENSOR = 2**62
_FREE = VIEWS | REPEATS | {torch.ops.aten.full.default}

Compiled = Callable[..., Sequence[torch.Tensor]]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What a part of a graph reads and makes.

    Attributes:
        inputs: names that the tensors have in the whole graph.
        strides: those of the inputs, as the part is compiled for them.
        outputs: names as for the inputs.
    """

    inputs: tuple[str, ...]
    strides: tuple[tuple[int, ...], ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Division:
    """In which parts a graph runs.

    Attributes:
        inputs: names of the graph's inputs, in the order in which they are given.
        outputs: names of what it returns; a name may be that of an input.
        parts: in the order in which they run.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parts: tuple[Part, ...]

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Division:
        """The inverse of `to_plain`."""
        return cls(**plain | {"parts": tuple(Part(**part) for part in plain["parts"])})

    def to_plain(self) -> dict[str, Any]:
        """Tuples of text and numbers."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Divided:
    """A graph that runs in parts; called like the whole one. A part's values are let go after their last reader."""

    division: Division
    parts: Sequence[Compiled]

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """The graph's outputs."""
        division = self.division
        values = dict(zip(division.inputs, inputs, strict=True))
        for part, compiled, finished in zip(division.parts, self.parts, self._finished, strict=True):
            made = compiled(
                *(_laid_out(values[name], strides) for name, strides in zip(part.inputs, part.strides, strict=True))
            )
            values.update(zip(part.outputs, made, strict=True))
            del made
            for name in finished:
                del values[name]
        return [values[name] for name in division.outputs]

    @cached_property
    def _finished(self) -> list[list[str]]:
        """For each part the values that nobody reads after it."""
        last = {name: part for part in self.division.parts for name in (*part.inputs, *part.outputs)}
        kept = set(self.division.outputs)
        return [[name for name in last if last[name] is part and name not in kept] for part in self.division.parts]


def _laid_out(value: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
    """A value with the strides that it has in the graph; Inductor leaves some of what it returns with others."""
    if value.stride() == strides:
        return value
    return torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device).copy_(value)


def divide(module: GraphModule, inputs: Sequence[torch.Tensor], count: int) -> tuple[Division, list[GraphModule]]:
    """Cut a functional graph into parts of about equally many nodes.

    Args:
        module: a graph that holds no tensors of its own and returns a list of tensors.
        inputs: what it will be called with; shapes, strides, types and devices count.
        count: how many parts; 1 leaves it whole.

    Returns:
        The parts' names, and their graphs, whose inputs know their fake tensors (``meta["val"]``).
    """
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in inputs]
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*fakes)
    given = [node for node in module.graph.nodes if node.op == "placeholder"]
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    (returned,) = (node.args[0] for node in module.graph.nodes if node.op == "output")
    bounds = [0, *_cuts(calls, count), len(calls)]
    runs = [_with_free(calls[start:end]) for start, end in itertools.pairwise(bounds)]
    reads = [_reads(run) for run in runs]
    passed = {*returned, *itertools.chain(*reads)}
    makes = [[call for call in calls[start:end] if call in passed] for start, end in itertools.pairwise(bounds)]
    parts = tuple(
        Part(inputs=_names(read), strides=tuple(node.meta["val"].stride() for node in read), outputs=_names(made))
        for read, made in zip(reads, makes, strict=True)
    )
    division = Division(inputs=_names(given), outputs=_names(returned), parts=parts)
    return division, [_graph(*piece) for piece in zip(reads, runs, makes, strict=True)]


def _names(nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple(node.name for node in nodes)


def _with_free(calls: Sequence[Node]) -> list[Node]:
    """A run of calls and what it reads that takes no time: views are taken anew, what they view is passed."""
    run = list(calls)
    while free := [read for read in _reads(run) if read.target in _FREE]:
        run += free
    return sorted(run)


def _reads(calls: Sequence[Node]) -> list[Node]:
    """What a run of calls reads from outside."""
    own = set(calls)
    return list(dict.fromkeys(read for call in calls for read in call.all_input_nodes if read not in own))


def _graph(inputs: Sequence[Node], calls: Sequence[Node], outputs: Sequence[Node]) -> GraphModule:
    graph = Graph()
    copies: dict[Node, Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta.update(node.meta)
    for node in calls:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in outputs])
    return GraphModule(torch.nn.Module(), graph)


def _cuts(calls: Sequence[Node], count: int) -> list[int]:
    """Before which calls to cut: near the ends of equal parts, where the fewest bytes are alive."""
    alive = _bytes_alive(calls)
    length = len(calls) / count
    reach = int(_REACH * length)
    centres = [round(length * part) for part in range(1, count)]
    return [min(range(centre - reach, centre + reach + 1), key=alive.__getitem__) for centre in centres]


def _bytes_alive(calls: Sequence[Node]) -> list[int]:
    """Before each call, bytes of all that is computed by then and read from there on, also through views."""
    place = {call: index for index, call in enumerate(calls)}
    changes = [0] * (len(calls) + 1)
    last: dict[Node, int] = {}
    for call in reversed(calls):
        last[call] = max(
            (last[user] if user.target in _FREE else place[user] for user in call.users if user in place),
            default=place[call],
        )
        changes[place[call] + 1] += _bytes(call)
        changes[last[call] + 1] -= _bytes(call)
    return list(itertools.accumulate(changes))


def _bytes(call: Node) -> int:
    """Bytes that passing a call's value takes; of a tuple more than of any tensor, as parts pass tensors only."""
    value = call.meta["val"]
    if not isinstance(value, torch.Tensor):
        return _NO_TENSOR
    return 0 if call.target in _FREE else value.nbytes
