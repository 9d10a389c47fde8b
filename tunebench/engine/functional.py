"""NequIP and Allegro models as pure functions of their weights, with forces and stress.

NequIP computes forces with `torch.autograd.grad` inside the model, which `torch.func` transforms cannot see through. A
trace with fake tensors of the static batch shapes unrolls that derivative into plain operations, and takes a second or
two where NequIP's own symbolic trace takes up to a minute. Fake tensors hold no values, so that nothing of the example
batch can get into the graph: an operation that depends on values ends the trace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from nequip.data import AtomicDataDict
from nequip.utils.fx import nequip_decomp_table
from torch.func import functional_call, functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

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
    graph: GraphModule

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
        digest.update(repr((self.fields, self.outputs, self.weight_names, self.constant_names)).encode())
        for name in self.constant_names:
            value = self.held[name]
            digest.update(repr((name, tuple(value.shape), value.dtype)).encode())
            if name not in self.slot_constants:
                digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def functional_model(model: torch.nn.Module, example: Tensors, outputs: Sequence[str] = OUTPUTS[:2]) -> FunctionalModel:
    """Trace a model, forces included, to a function of its weights.

    Args:
        model: the module that NequIP's training module holds, or a bare NequIP or Allegro model; left as it was.
        example: one batch of the shapes, dtypes and device that will be used.
        outputs: any of total_energy, forces and stress.

    Raises:
        Untraceable: an operation that depends on values, draws random numbers or changes the model; several models.
    """
    prefix, graph_model = _graph_model(model)
    fields = [key for key in graph_model.model_input_fields if key in example]
    weights = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
    state = weights | _constants(model, weights)

    def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
        batch = dict(zip(fields, tensors, strict=False))
        values = dict(zip((name.removeprefix(prefix) for name in state), tensors[len(fields) :], strict=True))
        found = functional_call(graph_model.model, values, (batch,))
        return [found[key] for key in outputs]

    with _in_training(model):
        graph = _traced(flat, [*(example[key] for key in fields), *state.values()])
    names = [*fields, *state]
    read = _keep_read_inputs(graph, names, always=weights)
    constants = tuple(name for name in read if name not in weights and name in state)
    per_slot = _statistics(model)
    return FunctionalModel(
        fields=tuple(name for name in read if name in fields),
        outputs=tuple(outputs),
        weight_names=tuple(weights),
        constant_names=constants,
        slot_constants=tuple(name for name in constants if name in per_slot),
        held={name: state[name] for name in constants},
        graph=graph,
    )


def one_line(error: Exception) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


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
        if node.target is aten.as_strided.default:
            raise Untraceable("the model reads memory by strides: aten.as_strided")
        if node.target._schema.is_mutable:
            raise Untraceable(f"the model changes a tensor that it is given: {node.target}")


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
