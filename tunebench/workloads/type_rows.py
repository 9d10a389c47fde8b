"""Weights of a model with some types put into a model of the same architecture with other types.

Types are matched by name. Most tensors know nothing of types and are copied whole; of the others each row, or each pair
of rows, belongs to a type. Modules are recognised by class name: a model from a package has classes of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tunebench.study.spec import InWords
from tunebench.workloads.errors import WorkloadError

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class TypeMap:
    """How the types of a model correspond to those of the file it starts from.

    Attributes:
        own: the model's type names. others: the file's.
    """

    own: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def new(self) -> tuple[str, ...]:
        """The model's types that the file does not know."""
        return tuple(name for name in self.own if name not in self.others)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Positions (here, there) of the types that both know."""
        return [(here, self.others.index(name)) for here, name in enumerate(self.own) if name in self.others]


def mapped_tensors(model: torch.nn.Module, other: torch.nn.Module, types: TypeMap) -> Tensors:
    """All tensors of a model by name, with the values of another one that has other types.

    What belongs to a type that only the model knows stays as it is. Scales, shifts and numbers of neighbours are left
    out: they are arguments of the builder.

    Args:
        model: NequIP's GraphModel with types `types.own`.
        other: one of the same architecture with types `types.others`.
        types: how they correspond.

    Raises:
        WorkloadError: a tensor is missing in the other model, or has another shape there than its types explain.
    """
    mapped: Tensors = {}
    others = dict(other.named_modules())
    for path, module in model.named_modules():
        if type(module).__name__ in _SET_BY_ARGUMENTS:
            continue
        for role, tensor in _own_tensors(module).items():
            name = f"{path}.{role}".lstrip(".")
            there = _own_tensors(others[path]).get(role) if path in others else None
            if there is None:
                raise _mismatch(name, "no such tensor", tensor)
            put = _PUT.get((type(module).__name__, _role(name)), _whole)
            mapped[name] = put(name, tensor.detach(), there.detach(), types)
    return mapped


_SET_BY_ARGUMENTS = ("PerTypeScaleShift", "AvgNumNeighborsNorm", "ZBL")

Put = Callable[[str, torch.Tensor, torch.Tensor, TypeMap], torch.Tensor]


def _own_tensors(module: torch.nn.Module) -> Tensors:
    """Parameters and buffers that are the module's and not its parts'."""
    found = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _role(name: str) -> str:
    """What a tensor is to its module, with the module's own name where that tells embeddings apart."""
    parts = name.split(".")
    if parts[-1] != "weight":
        return parts[-1]
    if "categorical_graph_field_embed_modules" in parts:
        return "label"
    return "pair" if parts[-2] == "class_embed" else "type"


def _whole(name: str, own: torch.Tensor, there: torch.Tensor, types: TypeMap) -> torch.Tensor:
    """The other model's values; its tensor has the same shape."""
    if own.shape != there.shape:
        raise _mismatch(name, f"shape {tuple(there.shape)}", own)
    return there.to(own.dtype, copy=True)


def _rows(name: str, own: torch.Tensor, there: torch.Tensor, types: TypeMap) -> torch.Tensor:
    """One row for each type."""
    if own.shape[1:] != there.shape[1:] or (len(own), len(there)) != (len(types.own), len(types.others)):
        raise _mismatch(name, f"shape {tuple(there.shape)} for {len(types.others)} types", own)
    return _replaced(own, there, types.pairs)


def _pair_rows(name: str, own: torch.Tensor, there: torch.Tensor, types: TypeMap) -> torch.Tensor:
    """One row for each ordered pair of types, row-major; a single value stands for all."""
    if own.ndim == 0 and there.ndim == 0:
        return _whole(name, own, there, types)
    here, other = len(types.own), len(types.others)
    if own.shape[1:] != there.shape[1:] or (len(own), len(there)) != (here**2, other**2):
        raise _mismatch(name, f"shape {tuple(there.shape)} for {other} types", own)
    pairs = [(i * here + j, a * other + b) for i, a in types.pairs for j, b in types.pairs]
    return _replaced(own, there, pairs)


def _triangle(name: str, own: torch.Tensor, there: torch.Tensor, types: TypeMap) -> torch.Tensor:
    """A symmetric matrix over types of which the upper triangle is kept."""
    if own.ndim != 2:
        return _whole(name, own, there, types)
    full = there + there.T - torch.diag(torch.diagonal(there))
    both = own + own.T - torch.diag(torch.diagonal(own))
    rows = _pair_rows(name, both.reshape(-1), full.reshape(-1), types)
    return torch.triu(rows.reshape(own.shape))


def _replaced(own: torch.Tensor, there: torch.Tensor, pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
    found = own.clone()
    for here, other in pairs:
        found[here] = there[other].to(own.dtype)
    return found


_PUT: dict[tuple[str, str], Put] = {
    ("Embedding", "type"): _rows,
    ("Embedding", "pair"): _pair_rows,
    ("EdgeLengthNormalizer", "_rmax_recip"): _pair_rows,
    ("LennardJones", "epsilon"): _triangle,
    ("LennardJones", "sigma"): _triangle,
    ("LennardJones", "delta"): _triangle,
}


def _mismatch(name: str, found: str, own: torch.Tensor) -> WorkloadError:
    return WorkloadError("init.path", InWords(f"{found} for {name}"), f"shape {tuple(own.shape)}, as the study's model")
