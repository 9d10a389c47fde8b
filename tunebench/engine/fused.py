"""Loss gradients and evaluations of many slots in one call, and their compiled form.

A function over slots is traced to one joint graph, forward and backward, with concrete shapes. The graph runs as it is
(`Unfused`) or compiled by Inductor (`Fused`). Both are kept on disk under a key of everything they depend on.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from nequip.data import AtomicDataDict
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor import standalone_compile
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.cache_dir_utils import temporary_cache_dir
from torch._inductor.standalone_compile import CompiledArtifact
from torch.func import functionalize, grad_and_value, vmap
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

from tunebench.engine.compile_part import compile_at_once
from tunebench.engine.divided import Compiled, Divided, Division, divide
from tunebench.engine.functional import FunctionalModel, Tensors
from tunebench.engine.graph_store import GraphSource, GraphStore, graph_key, one_line, tensor_layouts
from tunebench.engine.graphs import Replayed, synchronize
from tunebench.engine.loss import LossWeights, weighted_loss
from tunebench.engine.rewrites import (
    constants_as_inputs,
    long_sums_in_parts,
    own_memory_for_scatter_bases,
    padded_sums_as_concatenations,
    simplify,
    small_products_as_sums,
)
from tunebench.study.processes import usable_cores

log = logging.getLogger(__name__)

RTOL = 1e-4
"""Largest relative difference between the compiled and the plain form of a single-precision model."""

_TIMED_CALLS = 3
_MOST_PARTS = 4
_NODES_OF_A_PART = 1000


class SlotFunction(Protocol):
    """A pure function of mappings of stacked tensors, and a text that is equal for equal functions only."""

    @property
    def description(self) -> str:
        """Part of the cache key."""

    def __call__(self, weights: Tensors, constants: Tensors, batch: Tensors) -> Any:
        """Tensors, tuples of tensors or dictionaries of tensors, all with a leading slot axis."""


@dataclass(frozen=True, eq=False)
class LossGradient:
    """Training loss and its gradient in every slot: each has its own weights, constants, batch and label mask."""

    model: FunctionalModel
    loss_weights: LossWeights

    @property
    def description(self) -> str:
        """Part of the cache key."""
        return f"loss gradient {self.loss_weights} {self.model.description}"

    @property
    def batch_keys(self) -> tuple[str, ...]:
        """Keys of a batch that are read: the model's fields, the labels and the atoms of each frame."""
        weights = self.loss_weights
        labels = [AtomicDataDict.TOTAL_ENERGY_KEY, AtomicDataDict.NUM_NODES_KEY]
        labels += [AtomicDataDict.FORCE_KEY] if weights.forces > 0 else []
        labels += [AtomicDataDict.STRESS_KEY] if weights.stress > 0 else []
        return (*self.model.fields, *(key for key in labels if key not in self.model.fields))

    def __call__(
        self, weights: Tensors, constants: Tensors, batch: Tensors
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Losses (slots,) and gradients {name: (slots, ...)}; every tensor given has a leading slot axis.

        A NaN label is a missing one; ghost frames and atoms have none.
        """

        def loss(weights: Tensors, constants: Tensors, batch: Tensors) -> torch.Tensor:
            return weighted_loss(self.model(weights, constants, batch), batch, self.loss_weights)

        gradients, losses = vmap(grad_and_value(loss))(dict(weights), dict(constants), dict(batch))
        return losses, gradients


@dataclass(frozen=True, eq=False)
class Evaluate:
    """Predictions of every slot, on one batch for all of them or on one batch each."""

    model: FunctionalModel
    batch_per_slot: bool = False

    @property
    def description(self) -> str:
        """Part of the cache key."""
        return f"evaluate {self.batch_per_slot} {self.model.description}"

    @property
    def batch_keys(self) -> tuple[str, ...]:
        """Keys of a batch that are read."""
        return self.model.fields

    def __call__(self, weights: Tensors, constants: Tensors, batch: Tensors) -> dict[str, torch.Tensor]:
        """The model's outputs {key: (slots, ...)}; the batch has a slot axis only if it is one per slot."""
        axis = 0 if self.batch_per_slot else None
        return vmap(self.model, in_dims=(0, 0, axis))(dict(weights), dict(constants), dict(batch))


@dataclass(frozen=True, eq=False)
class Unfused:
    """The joint graph, run operation by operation.

    Attributes:
        reason: why it is not compiled, in one line; empty for the plain form of a `Fused`.
        seconds: what it took to ``trace`` or ``load`` it.
    """

    layout: _Layout
    source: GraphSource
    seconds: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def nodes(self) -> int:
        """Operations and inputs in the graph."""
        return self.source.nodes

    def __call__(self, *inputs: Tensors) -> Any:
        """The function's outputs for inputs of the shapes it was traced with."""
        with torch.no_grad():
            return self.layout.outputs(self.source(*self.layout.inputs(inputs)))


@dataclass(frozen=True, eq=False)
class Fused:
    """The joint graph compiled by Inductor.

    Attributes:
        unfused: the same function uncompiled.
        difference: the worst relative difference between both on the example inputs.
        seconds: what it took to ``compile`` or ``load`` it.
    """

    unfused: Unfused
    compiled: Callable[..., Sequence[torch.Tensor]]
    seconds: Mapping[str, float]
    difference: float = math.nan

    def __call__(self, *inputs: Tensors) -> Any:
        """The function's outputs for inputs of the shapes, strides and device it was compiled with."""
        layout = self.unfused.layout
        with torch.no_grad():
            return layout.outputs(self.compiled(*layout.inputs(inputs), *self.unfused.source.constants))


class Disagreement(Exception):
    """A compiled graph that computes something else than the graph; the message is one line."""


def fuse(
    function: SlotFunction, example_inputs: Sequence[Tensors], cache: Path | None = None, rtol: float = RTOL
) -> Fused | Unfused:
    """Trace a function over slots and compile it, or load both from the cache.

    The compiled form is compared with the plain one on the example inputs. Where it cannot be made or differs, one line
    is logged, and the plain form is returned, or where it was one of several parts, the whole graph compiled. A cache
    file that cannot be read is made anew, and processes may share a cache.

    Args:
        function: a function over slots.
        example_inputs: its arguments with real values and the shapes, strides, dtypes and device of all later calls.
        cache: its folder; without it nothing is kept.
        rtol: largest relative difference of any output in any slot.
    """
    store = GraphStore(cache, _key(function, example_inputs))
    unfused, module = _unfused(function, example_inputs, store)
    reason = ""
    for parts in sorted({1, _number_of_parts(unfused, example_inputs)}, reverse=True):
        try:
            fused = _compiled(function, example_inputs, unfused, module, store, parts)
            fused = replace(fused, difference=agrees(fused, unfused, example_inputs, rtol))
        except Exception as error:  # Inductor raises whatever its compilers do; the plain form needs none of them
            reason = f"not compiled{f' in {parts} parts' if parts > 1 else ''}, {one_line(error)}"
            log.warning("%s: %s", type(function).__name__, reason)
            if isinstance(error, torch.OutOfMemoryError):
                break
            if parts > 1:
                store.forget("inductor")
        else:
            took = {**unfused.seconds, **fused.seconds}
            if "compile" in took:
                said = ", ".join(f"{what} {seconds:.1f} s" for what, seconds in took.items())
                log.info("%s: %s", type(function).__name__, said)
            return fused
    return replace(unfused, reason=reason)


def unfuse(function: SlotFunction, example_inputs: Sequence[Tensors], cache: Path | None = None) -> Unfused:
    """Trace a function over slots, or load its graph from the cache; arguments as for `fuse`."""
    return _unfused(function, example_inputs, GraphStore(cache, _key(function, example_inputs)))[0]


def agrees(fused: Callable[..., Any], unfused: Callable[..., Any], inputs: Sequence[Tensors], rtol: float) -> float:
    """The worst relative difference between two forms of a function, over its outputs and slots.

    A difference counts relative to the largest value of that output in that slot, or to rounding of the slot's largest
    output of the same dtype where that is larger.

    Raises:
        Disagreement: it is above `rtol`, or a value is finite in one form only.
    """
    worst = max(_differences(_by_path(fused(*inputs)), _by_path(unfused(*inputs))))
    if not worst <= rtol:
        raise Disagreement(
            f"relative difference {worst:.1e} between the compiled and the plain graph, allowed: {rtol:g}"
        )
    return worst


def quickest(function: SlotFunction, example_inputs: Sequence[Tensors], cache: Path | None = None) -> Fused | Unfused:
    """`fuse`, and of both forms the one that takes less time on this device, as it will be called.

    Which one it is is kept in the cache: timing captures the plain form too, which takes long for large graphs.
    Arguments as for `fuse`.
    """
    store = GraphStore(cache, _key(function, example_inputs))
    times = store.read_plain("times")
    if times is not None and times["plain"] < times["compiled"]:
        return replace(_unfused(function, example_inputs, store)[0], reason=_slower(**times))
    fused = fuse(function, example_inputs, cache)
    if times is not None or isinstance(fused, Unfused):
        return fused
    try:
        times = {"compiled": _seconds(fused, example_inputs), "plain": _seconds(fused.unfused, example_inputs)}
    except torch.OutOfMemoryError:  # the compiled form needs less
        return fused
    store.write_plain("times", times)
    if times["compiled"] <= times["plain"]:
        return fused
    reason = _slower(**times)
    log.info("%s: %s", type(function).__name__, reason)
    return replace(fused.unfused, reason=reason)


def _slower(compiled: float, plain: float) -> str:
    return f"not compiled, which takes {1e3 * compiled:.2f} ms where the plain graph takes {1e3 * plain:.2f} ms"


def _seconds(form: Fused | Unfused, inputs: Sequence[Tensors]) -> float:
    """Seconds of one call, the shortest of three; on CUDA of a captured graph."""
    device = next(iter(inputs[0].values())).device

    def work() -> None:
        form(*inputs)

    replayed = Replayed(work, device)
    for _ in range(2):  # the second call captures
        replayed()
    times = []
    for _ in range(_TIMED_CALLS):
        synchronize(device)
        began = time.perf_counter()
        replayed()
        synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _by_path(outputs: Any) -> list[torch.Tensor]:
    """The tensors of an output in an order that does not depend on a dictionary's."""
    leaves, _ = tree_flatten_with_path(outputs)
    return [leaf for _, leaf in sorted((keystr(path), leaf) for path, leaf in leaves)]


def _differences(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> Iterator[float]:
    scales = [_per_slot(value) for value in expected]
    largest: dict[torch.dtype, torch.Tensor] = {}
    for value, scale in zip(expected, scales, strict=True):
        largest[value.dtype] = torch.maximum(largest.get(value.dtype, scale), scale)
    for one, other, scale in zip(found, expected, scales, strict=True):
        if one.shape != other.shape or not torch.equal(one.isfinite(), other.isfinite()):
            yield math.inf
            continue
        rounding = 1e3 * torch.finfo(other.dtype).eps
        floor = (rounding * largest[other.dtype]).clamp_min(torch.finfo(other.dtype).tiny)
        difference = _per_slot(torch.where(other.isfinite(), one - other, torch.zeros_like(other)))
        yield float((difference / torch.maximum(scale, floor)).max())


def _per_slot(value: torch.Tensor) -> torch.Tensor:
    """The largest finite absolute value in every slot, (slots,)."""
    size = torch.where(value.isfinite(), value.abs(), torch.zeros_like(value)).reshape(value.shape[0], -1)
    return size.amax(dim=1) if size.shape[1] else size.new_zeros(value.shape[0])


@dataclass(frozen=True)
class _Layout:
    """Order of the tensors in a call's mappings, and the structure of what it returns (torch's TreeSpec as text)."""

    keys: tuple[tuple[str, ...], ...]
    returned: str = ""

    @classmethod
    def of(cls, inputs: Sequence[Tensors]) -> _Layout:
        return cls(tuple(tuple(sorted(mapping)) for mapping in inputs))

    def inputs(self, mappings: Sequence[Tensors]) -> list[torch.Tensor]:
        return [mapping[key] for keys, mapping in zip(self.keys, mappings, strict=True) for key in keys]

    def mappings(self, tensors: Sequence[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        rest = iter(tensors)
        return [{key: next(rest) for key in keys} for keys in self.keys]

    def outputs(self, tensors: Sequence[torch.Tensor]) -> Any:
        return tree_unflatten(list(tensors), self._spec)

    @cached_property
    def _spec(self) -> TreeSpec:
        return treespec_loads(self.returned)


def _unfused(
    function: SlotFunction, example_inputs: Sequence[Tensors], store: GraphStore
) -> tuple[Unfused, GraphModule | None]:
    """The joint graph from the store, or traced, and then with its module."""
    began = time.perf_counter()
    kept = store.read_plain("graph")
    if kept is not None:
        layout = replace(_Layout.of(example_inputs), returned=kept["returned"])
        return Unfused(layout, GraphSource.from_plain(kept), {"load": time.perf_counter() - began}), None
    module, layout = joint_graph(function, example_inputs)
    source = GraphSource.of(module)
    store.write_plain("graph", {**source.to_plain(), "returned": layout.returned})
    return Unfused(layout, source, {"trace": time.perf_counter() - began}), module


def joint_graph(function: SlotFunction, example_inputs: Sequence[Tensors]) -> tuple[GraphModule, _Layout]:
    """One functional graph of a function over slots, forward and backward, and the order of its inputs and outputs."""
    layout = _Layout.of(example_inputs)
    returned: list[TreeSpec] = []

    def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
        leaves, spec = tree_flatten(function(*layout.mappings(tensors)))
        returned.append(spec)
        return leaves

    with torch.no_grad():
        module = make_fx(
            functionalize(flat),
            decomposition_table=select_decomp_table(),
            tracing_mode="fake",
            _allow_non_fake_inputs=True,
        )(*layout.inputs(example_inputs))
    module = GraphModule(module, fx_graph_cse(simplify(module).graph))
    padded_sums_as_concatenations(module)
    own_memory_for_scatter_bases(module)
    if _on_cuda(example_inputs):  # not measured elsewhere
        long_sums_in_parts(module)
    return module, replace(layout, returned=treespec_dumps(returned[-1]))


def _on_cuda(inputs: Sequence[Tensors]) -> bool:
    return any(tensor.is_cuda for mapping in inputs for tensor in mapping.values())


def _compiled(
    function: SlotFunction,
    example_inputs: Sequence[Tensors],
    unfused: Unfused,
    module: GraphModule | None,
    store: GraphStore,
    parts: int,
) -> Fused:
    """The compiled form from the store, or compiled as so many parts."""
    began = time.perf_counter()
    kept = _read_compiled(store)
    if kept is not None:
        return Fused(unfused, kept, {"load": time.perf_counter() - began})
    if module is None:
        module, _ = joint_graph(function, example_inputs)
        constants_as_inputs(module)
    if _on_cuda(example_inputs):  # not measured elsewhere
        small_products_as_sums(module)
    inputs: list[Any] = [*unfused.layout.inputs(example_inputs), *unfused.source.constants]
    with torch.no_grad(), _inductor_files(store):
        compiled = _compiled_whole(module, inputs, store) if parts == 1 else _compiled_in(parts, module, inputs, store)
    return Fused(unfused, compiled, {"compile": time.perf_counter() - began})


def _compiled_whole(module: GraphModule, inputs: list[Any], store: GraphStore) -> Compiled:
    compiled = standalone_compile(module, inputs, dynamic_shapes="from_example_inputs")
    if store.folder is not None:
        try:
            _keep(store, None, [_saved(compiled)])
        except Exception as error:  # Inductor cannot keep every kind of graph
            store.not_kept("inductor", error)
    return compiled


def _compiled_in(parts: int, module: GraphModule, inputs: list[Any], store: GraphStore) -> Compiled:
    division, graphs = divide(module, inputs, parts)
    artefacts = compile_at_once(graphs)
    _keep(store, division, artefacts)
    return Divided(division, [_loaded(artefact) for artefact in artefacts])


def _number_of_parts(unfused: Unfused, inputs: Sequence[Tensors]) -> int:
    """In how many parts to compile a graph. On a CPU in one: its compiler takes the time, in processes as it is."""
    if not _on_cuda(inputs):
        return 1
    return max(1, min(_MOST_PARTS, unfused.nodes // _NODES_OF_A_PART, usable_cores() // 2))


def _keep(store: GraphStore, division: Division | None, artefacts: Sequence[bytes]) -> None:
    kept = [torch.frombuffer(bytearray(artefact), dtype=torch.uint8) for artefact in artefacts]
    store.write_plain("inductor", {"division": division and division.to_plain(), "artefacts": kept})


def _read_compiled(store: GraphStore) -> Compiled | None:
    kept = store.read_plain("inductor")
    if kept is None:
        return None
    try:
        with _inductor_files(store):
            parts = [_loaded(artefact.numpy().tobytes()) for artefact in kept["artefacts"]]
        return Divided(Division.from_plain(kept["division"]), parts) if kept["division"] else parts[0]
    except Exception as error:  # whatever Inductor's own formats raise
        store.refuse("inductor", error)
        return None


def _loaded(artefact: bytes) -> Compiled:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(artefact)
        return CompiledArtifact.load(path=file.name)


def _saved(compiled: CompiledArtifact) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        compiled.save(path=file.name)
        return Path(file.name).read_bytes()


@contextmanager
def _inductor_files(store: GraphStore) -> Iterator[None]:
    """Inductor's generated sources and binaries lie in the cache too: loading builds none of them again."""
    if store.folder is None:
        yield
        return
    with temporary_cache_dir(str(store.folder.resolve() / "inductor")):
        yield


def _key(function: SlotFunction, example_inputs: Sequence[Tensors]) -> str:
    """A key of everything that the graph and its compiled form depend on."""
    layout = _Layout.of(example_inputs)
    tensors = tensor_layouts(layout.inputs(example_inputs))
    numerics = (torch.get_float32_matmul_precision(), torch.get_num_threads())
    return graph_key(function.description, layout.keys, tensors, numerics)
