"""The matrix view: the true structure of every trainable tensor of a NequIP or Allegro model.

e3nn keeps many matrices in one flat vector, and the libraries' dense layers keep theirs as (in, out). Here each tensor
is cut into blocks that say what an update rule may treat as a linear map and what is only a list of coefficients.
Modules are recognised by class name and attributes: a model from a package has classes of its own, under mangled
module names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch

from tunebench.optim.blocks import Block, View


class FctpView(StrEnum):
    """How the weight of a FullyConnectedTensorProduct is read, path by path, stored (u, v, w) with v the atom's type.

    FLAT: one vector, left to the auxiliary rule. PER_TYPE: v matrices (u, w) that share a preconditioner. MERGED: one
    matrix (u * v, w).
    """

    FLAT = "flat"
    PER_TYPE = "per_type"
    MERGED = "merged"


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """A model's trainable parameters by name; a shared one once, under the first of its names."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def matrix_view(
    model: torch.nn.Module, *, fctp_view: FctpView = FctpView.MERGED, split_heads: bool = False
) -> tuple[Block, ...]:
    """Blocks that cover every element of every trainable parameter exactly once, in the model's order.

    Matrices are the paths of e3nn's `Linear` (in, out), the paths of a FullyConnectedTensorProduct (u, v, w) and the
    layers of dense networks (in, out). Embeddings, the whole readout (the network that ends in one number), scales and
    shifts, tensor-product coefficients, spline coefficients, biases and maps from or to one channel are vectors.

    Args:
        model: NequIP's or Allegro's, or anything that contains one, such as NequIP's training module.
        fctp_view: how weights of FullyConnectedTensorProducts are read.
        split_heads: cut a network's last layer where its output is one weight per tensor-product path or per irrep
            side by side: one (in, channels) block for each.

    Raises:
        ValueError: a trainable tensor of unknown meaning; named with its shape and the class that owns it.
    """
    modules = dict(model.named_modules())
    vectors = _readout_weights(modules.values())
    heads = _heads(modules.values()) if split_heads else {}
    blocks: list[Block] = []
    for name, parameter in trainable_parameters(model).items():
        tensor = _Tensor.of(name, parameter, modules)
        if id(parameter) in vectors:
            blocks.append(tensor.vector())
        elif id(parameter) in heads:
            blocks += [tensor.columns(part) for part in heads[id(parameter)]]
        else:
            blocks += _blocks(tensor, FctpView(fctp_view))
    return tuple(blocks)


@dataclass(frozen=True)
class _Columns:
    """Columns first, first + step, ... of a matrix, `count` of them."""

    path: str
    first: int
    count: int
    step: int = 1


@dataclass(frozen=True)
class _Tensor:
    """A parameter, the module that gives it its meaning, and its name there."""

    name: str
    role: str
    shape: tuple[int, ...]
    owner: Any

    @classmethod
    def of(cls, name: str, parameter: torch.nn.Parameter, modules: dict[str, torch.nn.Module]) -> _Tensor:
        path, _, role = name.rpartition(".")
        if isinstance(modules[path], torch.nn.ParameterList):
            path, _, role = path.rpartition(".")
        return cls(name, role, tuple(parameter.shape), modules[path])

    def vector(self) -> Block:
        return Block.whole(self.name, self.shape)

    def path(self, label: str, offset: int, shape: Sequence[int], view: View) -> Block:
        return _unless_thin(Block.slice(self.name, label, offset, tuple(shape), view))

    def columns(self, part: _Columns) -> Block:
        rows, width = self.shape
        strides = (width, part.step)
        return _unless_thin(Block(self.name, part.path, part.first, (rows, part.count), strides, View.MATRIX))


def _unless_thin(block: Block) -> Block:
    """The block, as a vector where its map has one row or one column and so nothing to precondition across."""
    _, rows, cols = block.matrices
    return block if min(rows, cols) > 1 else replace(block, view=View.VECTOR)


def _blocks(tensor: _Tensor, fctp_view: FctpView) -> list[Block]:
    kind = type(tensor.owner).__name__
    if tensor.role in _COEFFICIENTS.get(kind, ()):
        return [tensor.vector()]
    read = _MAPS.get((kind, tensor.role))
    blocks = read(tensor, fctp_view) if read else []
    if sum(block.numel for block in blocks) != math.prod(tensor.shape):
        known = ", ".join(sorted({*_COEFFICIENTS, *(kind for kind, _ in _MAPS)}))
        raise ValueError(
            f"{tensor.name}: found a trainable tensor of shape {tensor.shape} in a {kind}, "
            f"allowed: the known weights of NequIP's, Allegro's and e3nn's {known}"
        )
    return blocks


def _linear_paths(tensor: _Tensor, _: FctpView) -> list[Block]:
    """Paths of e3nn's Linear; none for torch's class of the same name, which stores (out, in)."""
    linear = tensor.owner
    if not hasattr(linear, "instructions") or len(tensor.shape) != 1:
        return []
    blocks, offset = [], 0
    for path in linear.instructions:
        if path.i_in < 0:  # a bias, kept in a tensor of its own
            continue
        label = f"{linear.irreps_in[path.i_in].ir} -> {linear.irreps_out[path.i_out].ir}"
        blocks.append(tensor.path(label, offset, path.path_shape, View.MATRIX))
        offset += blocks[-1].numel
    return [block for block in blocks if block.numel]


def _fctp_paths(tensor: _Tensor, fctp_view: FctpView) -> list[Block]:
    """Paths (u, v, w) of a FullyConnectedTensorProduct, in the order of e3nn's own `weight_views`."""
    if fctp_view is FctpView.FLAT:
        return [tensor.vector()]
    product, view = tensor.owner, View(fctp_view.value)
    blocks, offset = [], 0
    for path in product.instructions:
        if not path.has_weight:
            continue
        blocks.append(tensor.path(_product_label(product, path), offset, path.path_shape, view))
        offset += blocks[-1].numel
    return [block for block in blocks if block.numel]


def _dense(tensor: _Tensor, _: FctpView) -> list[Block]:
    return [tensor.path("", 0, tensor.shape, View.MATRIX)] if len(tensor.shape) == 2 else []


_MAPS: dict[tuple[str, str], Callable[[_Tensor, FctpView], list[Block]]] = {
    ("Linear", "weight"): _linear_paths,
    ("FullyConnectedTensorProduct", "weight"): _fctp_paths,
    ("ScalarLinearLayer", "weight"): _dense,
    ("DeepLinearMLP", "weights"): _dense,
}

# Lists of coefficients: tables looked up by type, and weights that scale one number each.
_COEFFICIENTS: dict[str, tuple[str, ...]] = {
    "Embedding": ("weight",),
    "ScalarLinearLayer": ("bias",),
    "Linear": ("bias",),
    "PerTypeScaleShift": ("scales", "shifts"),
    "BesselEdgeLengthEncoding": ("bessel_weights",),
    "LennardJones": ("epsilon", "sigma", "delta"),
    "Contracter": ("weights",),
    "CuEquivarianceContracter": ("weights",),
    "TritonContracter": ("weights",),
}


def _readout_weights(modules: Iterable[torch.nn.Module]) -> set[int]:
    """Identities of the weights of networks that end in one number: the energy of an atom or an edge."""
    readouts = (module for module in modules if type(module).__name__ == "ScalarMLPFunction")
    weights = [_weights(mlp) for mlp in readouts]
    return {id(weight) for mlp in weights for weight in mlp if mlp[-1].shape[1] == 1}


def _heads(modules: Iterable[Any]) -> dict[int, list[_Columns]]:
    """Last weights of networks with several outputs side by side, by identity, and the columns of each output."""
    heads: dict[int, list[_Columns]] = {}
    for module in modules:
        kind = type(module).__name__
        if kind == "InteractionBlock":
            heads[_last(module.edge_mlp)] = _product_columns(module.tp_scatter.tp)
        elif kind == "TwoBodySphericalHarmonicTensorEmbed":
            irreps = module.irreps_out[module.tensor_basis_out_field]
            heads[_last(module.env_embed_linear)] = _channel_columns(module._edge_weighter, irreps, first=0)
        elif kind == "Allegro_Module":
            heads |= _allegro_heads(module)
    return heads


def _allegro_heads(allegro: Any) -> dict[int, list[_Columns]]:
    """Allegro's scalar features and, but for the last layer, the weights of the next layer's environment."""
    scalars, irreps = allegro.num_scalar_features, allegro.irreps_in[allegro.tensor_basis_in_field]
    parts = [_Columns("scalars", 0, scalars), *_channel_columns(allegro._env_weighter, irreps, first=scalars)]
    return {_last(mlp): parts for mlp in (allegro.first_layer_env_embed_projection, *list(allegro.latents)[:-1])}


def _product_columns(product: Any) -> list[_Columns]:
    """One run of columns per weighted path of a convolution's tensor product."""
    columns, first = [], 0
    for path in product.instructions:
        count = math.prod(path.path_shape) if path.has_weight else 0
        if count:
            columns.append(_Columns(_product_label(product, path), first, count))
        first += count
    return columns


def _channel_columns(weighter: Any, irreps: Any, first: int) -> list[_Columns]:
    """Columns of Allegro's MakeWeightedChannels, stored (channels, irreps): those of one irrep lie `irreps` apart."""
    channels = weighter.multiplicity_out
    if not weighter.weight_individual_irreps:
        return [_Columns("all irreps", first, channels)]
    return [_Columns(str(ir), first + index, channels, len(irreps)) for index, (_, ir) in enumerate(irreps)]


def _product_label(product: Any, path: Any) -> str:
    left, right = product.irreps_in1[path.i_in1].ir, product.irreps_in2[path.i_in2].ir
    return f"{left} x {right} -> {product.irreps_out[path.i_out].ir}"


def _weights(mlp: Any) -> list[torch.nn.Parameter]:
    """The matrices of a dense network, first to last; biases left out."""
    return [parameter for parameter in mlp.parameters() if parameter.ndim == 2]


def _last(mlp: Any) -> int:
    return id(_weights(mlp)[-1])
