"""NequIP and Allegro models as pure functions of their weights, with forces and stress.

NequIP computes forces with `torch.autograd.grad` inside the model, which `torch.func` transforms cannot see through. A
trace with fake tensors of the static batch shapes unrolls that derivative into plain operations, and takes a second or
two where NequIP's own symbolic trace takes up to a minute. Fake tensors hold no values, so that nothing of the example
batch can get into the graph: an operation that depends on values ends the trace.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from nequip.data import AtomicDataDict
from nequip.nn.graph_model import GraphModel
from nequip.utils.fx import nequip_decomp_table
from torch.func import functional_call, functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from tunebench.engine.graph_store import GraphSource, GraphStore, graph_key, one_line, tensor_layouts
from tunebench.engine.rewrites import simplify
from tunebench.optim.matrix_view import trainable_parameters

aten = torch.ops.aten

Tensors = Mapping[str, torch.Tensor]

OUTPUTS = (AtomicDataDict.TOTAL_ENERGY_KEY, AtomicDataDict.FORCE_KEY, AtomicDataDict.STRESS_KEY)


class Untraceable(Exception):
    """A model that cannot be written as a function of its weights; the message is one line that says why."""


@dataclass(frozen=True, eq=False)
class FunctionalModel:
    """A model as a pure function, valid for batches of the shapes and the device it was traced with.

    Attributes:
        fields: input keys that it reads.
        outputs: keys of what it returns.
        weight_names: names of the trainable parameters, as `trainable_parameters` gives them.
        constant_names: names of the other tensors that it reads, buffers and frozen parameters.
        slot_constants: those of them that depend on which training labels a trial has: energy scales and shifts.
        held: the constants' values, used where a call names no other.
        graph: takes fields, weights and constants in these orders, and returns the outputs in theirs.
    """

    fields: tuple[str, ...]
    outputs: tuple[str, ...]
    weight_names: tuple[str, ...]
    constant_names: tuple[str, ...]
    slot_constants: tuple[str, ...]
    held: Tensors
    graph: GraphSource

    def __call__(self, weights: Tensors, constants: Tensors, batch: Tensors) -> dict[str, torch.Tensor]:
        """Outputs for one batch: energies eV (frames, 1), forces eV/Å (atoms, 3), stress eV/Å³ (frames, 3, 3).

        Differentiable in the weights, and `vmap` may map over weights, constants and batch.

        Args:
            weights: all weights by name.
            constants: constants by name; those left out are the traced model's.
            batch: the fields, of the traced shapes; other keys are left alone.
        """
        inputs = [batch[name] for name in self.fields]
        inputs += [weights[name] for name in self.weight_names]
        inputs += [constants[name] if name in constants else self.held[name] for name in self.constant_names]
        return dict(zip(self.outputs, self.graph(*inputs), strict=True))

    @cached_property
    def description(self) -> str:
        """SHA-256 of the graph and of the constants that no slot replaces: equal descriptions, equal functions."""
        digest = hashlib.sha256(self.graph.code.encode())
        for value in self.graph.constants:
            digest.update(_content(value))
        digest.update(repr((self.fields, self.outputs, self.weight_names, self.constant_names)).encode())
        for name in self.constant_names:
            value = self.held[name]
            digest.update(repr((name, tuple(value.shape), value.dtype)).encode())
            if name not in self.slot_constants:
                digest.update(_content(value))
        return digest.hexdigest()


def functional_model(
    model: torch.nn.Module, example: Tensors, outputs: Sequence[str] = OUTPUTS[:2], cache: Path | None = None
) -> FunctionalModel:
    """Trace a model, forces included, to a function of its weights, or load its graph from the cache.

    What comes out is compared with the model on the example. A graph from the cache that differs is traced anew.

    Args:
        model: the module that NequIP's training module holds, or a bare NequIP or Allegro model; left as it was.
        example: one batch of the shapes, dtypes and device that will be used.
        outputs: any of total_energy, forces and stress.
        cache: folder of kept graphs; without it nothing is kept.

    Raises:
        Untraceable: an operation that depends on values, draws random numbers or changes the model; several models; a
            trace that computes something else than the model.
    """
    prefix, graph_model = _graph_model(model)
    fields = [key for key in graph_model.model_input_fields if key in example]
    store = GraphStore(cache, _key(model, example, fields, outputs) if cache else "")
    kept = store.read_plain("model")
    if kept is not None:
        function = _assembled(model, kept["read"], outputs, GraphSource.from_plain(kept))
        difference = _difference(function, model, example)
        if difference <= _TOLERANCE[graph_model.model_dtype]:
            return function
        store.refuse("model", ValueError(f"relative difference {difference:.1e} from the model"))
    function = _assembled(model, *_traced_model(model, prefix, graph_model, example, fields, outputs))
    difference = _difference(function, model, example)
    if not difference <= _TOLERANCE[graph_model.model_dtype]:
        raise Untraceable(f"the trace differs from the model by {difference:.1e}, relative to the largest output")
    read = [*function.fields, *function.weight_names, *function.constant_names]
    store.write_plain("model", {**function.graph.to_plain(), "read": read})
    return function


# Largest difference between a model and its trace on one batch, where both round differently, relative to the largest
# value of an output, or to 0.1 eV, eV/Å or eV/Å³ where all values are smaller: those of a perfect crystal are rounding.
_TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-9}
_SMALL = 0.1


def _assembled(
    model: torch.nn.Module, read: Sequence[str], outputs: Sequence[str], graph: GraphSource
) -> FunctionalModel:
    """The function of a graph that reads these fields, weights and constants, in this order."""
    weights = trainable_parameters(model)
    state = _constants(model, weights)
    constants = tuple(name for name in read if name in state)
    per_slot = _statistics(model)
    return FunctionalModel(
        fields=tuple(name for name in read if name not in weights and name not in state),
        outputs=tuple(outputs),
        weight_names=tuple(weights),
        constant_names=constants,
        slot_constants=tuple(name for name in constants if name in per_slot),
        held={name: state[name].clone() for name in constants},
        graph=graph,
    )


def _traced_model(
    model: torch.nn.Module,
    prefix: str,
    graph_model: Any,
    example: Tensors,
    fields: Sequence[str],
    outputs: Sequence[str],
) -> tuple[list[str], Sequence[str], GraphSource]:
    """Names of what the graph reads, the outputs, and the graph."""
    weights = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
    state = weights | _constants(model, weights)

    def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
        batch = dict(zip(fields, tensors, strict=False))
        values = dict(zip((name.removeprefix(prefix) for name in state), tensors[len(fields) :], strict=True))
        found = functional_call(graph_model.model, values, (batch,))
        return [found[key] for key in outputs]

    with _in_training(model):
        graph = _traced(flat, [*(example[key] for key in fields), *state.values()])
    read = _keep_read_inputs(graph, [*fields, *state], always=weights)
    return read, outputs, GraphSource.of(graph)


def _difference(function: FunctionalModel, model: torch.nn.Module, example: Tensors) -> float:
    """Largest difference of any output from the model's own, as `_TOLERANCE` counts it."""
    _, graph_model = _graph_model(model)
    weights = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
    batch = {key: example[key].clone() for key in graph_model.model_input_fields if key in example}
    with _in_training(model), torch.enable_grad():
        expected = GraphModel.forward(graph_model, batch)
    with torch.no_grad():
        found = function(weights, {}, example)
    return max(_relative(found[key], expected[key].detach()) for key in function.outputs)


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Difference of an output; infinite where NaN, which marks a stress without a volume, is not in the same places."""
    real = ~torch.isnan(expected)
    if not torch.equal(real, ~torch.isnan(found)):
        return math.inf
    scale = torch.where(real, expected.abs(), torch.zeros_like(expected)).max().clamp_min(_SMALL)
    return float(torch.where(real, (found - expected).abs(), torch.zeros_like(expected)).max() / scale)


def _key(model: torch.nn.Module, example: Tensors, fields: Sequence[str], outputs: Sequence[str]) -> str:
    """A key of the model's structure, without the values of its parameters and buffers, and of the example's layout."""
    modules = [(name, type(module).__qualname__, _settings(module)) for name, module in model.named_modules()]
    parameters = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    buffers = [(name, tuple(buffer.shape), str(buffer.dtype)) for name, buffer in model.named_buffers()]
    layouts = tensor_layouts([example[key] for key in fields])
    return graph_key(modules, parameters, buffers, list(fields), layouts, list(outputs))


def _settings(module: torch.nn.Module) -> list[tuple[str, str]]:
    """What a module computes with besides its parameters and buffers: numbers, names, irreps, functions, code."""
    kept = [(name, value) for name, value in vars(module).items() if name not in _NO_SETTINGS]
    code = [("code", module.code)] if isinstance(module, GraphModule) else []
    return sorted(code + [(name, text) for name, value in kept if (text := _setting(value)) is not None])


_NO_SETTINGS = ("training", "_parameters", "_buffers", "_modules", "_metadata", "_graph")


def _setting(value: Any) -> str | None:
    """A text that is the same in every process; None for an object that has none."""
    if isinstance(value, torch.Tensor):
        return _content(value).hex()
    if isinstance(value, FunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    text = repr(value)
    return None if " at 0x" in text else text


def _content(value: torch.Tensor) -> bytes:
    return value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _graph_model(model: torch.nn.Module) -> tuple[str, Any]:
    """NequIP's GraphModel, and the prefix of the names of the tensors inside it."""
    if isinstance(model, torch.nn.ModuleDict):
        if len(model) != 1:
            raise Untraceable(f"model: found {len(model)} models ({', '.join(model)}), allowed: one")
        ((name, inner),) = model.items()
        prefix, found = _graph_model(inner)
        return f"{name}.{prefix}", found
    if not getattr(model, "is_graph_model", False):
        raise Untraceable(
            f"model: found a {type(model).__name__}, allowed: NequIP's GraphModel, alone or in a ModuleDict"
        )
    return "model.", model


def _constants(model: torch.nn.Module, weights: Tensors) -> dict[str, torch.Tensor]:
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters() if name not in weights}
    return parameters | dict(model.named_buffers())


def _statistics(model: torch.nn.Module) -> set[str]:
    """Names of the tensors that NequIP's builders fill with energy scales and shifts.

    Classes are recognised by name: a model from a package has classes of its own.
    """
    owners = (name for name, module in model.named_modules() if type(module).__name__ == "PerTypeScaleShift")
    return {f"{owner}.{role}" for owner in owners for role in ("scales", "shifts")}


@contextmanager
def _in_training(model: torch.nn.Module) -> Iterator[None]:
    """NequIP keeps the graph of the forces in training mode only."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _traced(function: Any, inputs: list[torch.Tensor]) -> GraphModule:
    """The function's graph without in-place operations."""
    try:
        with torch.enable_grad():
            unrolled = make_fx(
                function, decomposition_table=nequip_decomp_table(), tracing_mode="fake", _allow_non_fake_inputs=True
            )(*inputs)
            graph = make_fx(
                functionalize(unrolled, remove="mutations"), tracing_mode="fake", _allow_non_fake_inputs=True
            )(*inputs)
    except Exception as error:  # whatever a model's own code meets under the trace
        raise Untraceable(f"the trace ends with {one_line(error)}") from error
    _refuse_impure(graph)
    return simplify(graph)


def _refuse_impure(graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise Untraceable(f"the model draws random numbers: {node.target}")
        if not _is_static(node.meta["val"]):
            raise Untraceable(f"the model reads data-dependent numbers or shapes: {node.target}")
        if node.target is aten.as_strided.default:
            raise Untraceable("the model reads memory by strides: aten.as_strided")
        if node.target._schema.is_mutable:
            raise Untraceable(f"the model changes a tensor that it is given: {node.target}")


def _is_static(value: Any) -> bool:
    """Whether a traced value is a tensor, or several, whose shape does not depend on what the inputs hold."""
    if isinstance(value, (list, tuple)):
        return all(_is_static(part) for part in value)
    return isinstance(value, torch.Tensor) and all(isinstance(size, int) for size in value.shape)


def _keep_read_inputs(graph: GraphModule, names: Sequence[str], always: Tensors) -> list[str]:
    """Drop inputs that the graph does not read, but for those in `always`; return the names of the others."""
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    kept = []
    for name, node in zip(names, placeholders, strict=True):
        if node.users or name in always:
            kept.append(name)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return kept
