"""Parameter groups that carry their blocks, as plain data that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tunebench.optim.blocks import Block, View
from tunebench.optim.matrix_view import FctpView, matrix_view, trainable_parameters
from tunebench.optim.trained import ALL, learning_rate_factors, trained_names

PlainBlock = tuple[str, int, tuple[int, ...], tuple[int, ...], str]
"""Path, offset, shape, strides and view of a block; its parameter is known from where it stands."""


def weight_groups(
    model: torch.nn.Module, *, train: str | Sequence[str] = ALL, lr_factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """One parameter group with the trained weights of a model, for rules that treat all elements alike.

    In a `nequip-train` config, beside the optimizer's `_target_`:
    ``param_groups: {_target_: tunebench.optim.weight_groups, train: readout}``.

    Args:
        model: the model, or a module that contains it.
        train: the weights that move, see `trained_names`.
        lr_factors: factors on the learning rate by pattern, see `learning_rate_factors`.

    Raises:
        UnknownWeights: a pattern that matches nothing, or two that match one weight.
    """
    return [_group(trainable_parameters(model), train, lr_factors)]


def matrix_groups(
    model: torch.nn.Module,
    *,
    fctp_view: str = FctpView.MERGED,
    split_heads: bool = False,
    train: str | Sequence[str] = ALL,
    lr_factors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """One parameter group with all trainable weights of a NequIP or Allegro model and their blocks.

    In a `nequip-train` config, beside the optimizer's `_target_`:
    ``param_groups: {_target_: tunebench.optim.matrix_groups, fctp_view: merged}``.

    Args:
        model: the model, or a module that contains it.
        fctp_view: flat, per_type or merged, see `FctpView`.
        split_heads: cut fused heads per tensor-product path.
        train: the weights that move, see `trained_names`.
        lr_factors: factors on the learning rate by pattern, see `learning_rate_factors`.

    Raises:
        ValueError: an unknown view, a tensor of unknown meaning, no matrix among the trained weights, a pattern that
            matches nothing, or two that match one weight.
    """
    if fctp_view not in list(FctpView):
        raise ValueError(f"fctp_view: found {fctp_view!r}, allowed: {', '.join(FctpView)}")
    group = _group(trainable_parameters(model), train, lr_factors)
    view = matrix_view(model, fctp_view=FctpView(fctp_view), split_heads=split_heads)
    blocks = [block for block in view if block.parameter in group["names"]]
    if not any(block.is_matrix for block in blocks):
        raise ValueError("matrix_groups: found no matrix in this model, allowed: at least one")
    plain: dict[str, list[PlainBlock]] = {name: [] for name in group["names"]}
    for b in blocks:
        plain[b.parameter].append((b.path, b.offset, b.shape, b.strides, b.view.value))
    return [group | {"blocks": tuple(tuple(found) for found in plain.values())}]


def _group(
    parameters: Mapping[str, torch.nn.Parameter],
    train: str | Sequence[str],
    lr_factors: Mapping[str, float] | None,
) -> dict[str, Any]:
    """Trained parameters, their names and, where there are any, their factors on the learning rate."""
    names = trained_names(parameters, train)
    group: dict[str, Any] = {"params": [parameters[name] for name in names], "names": names}
    if lr_factors:
        group["lr_factors"] = tuple(learning_rate_factors(names, lr_factors).values())
    return group


def group_blocks(group: Mapping[str, Any]) -> list[Block]:
    """The blocks of a parameter group, named as in `group_names`.

    Where the group carries none, a tensor of two axes is a matrix (in, out) and any other a vector.
    """
    names = group_names(group)
    if group.get("blocks") is None:
        shaped = zip(names, (tuple(p.shape) for p in group["params"]), strict=True)
        return [Block.whole(name, shape, View.MATRIX if _is_map(shape) else View.VECTOR) for name, shape in shaped]
    return [
        Block(name, path, offset, tuple(shape), tuple(strides), View(view))
        for name, plain in zip(names, group["blocks"], strict=True)
        for path, offset, shape, strides, view in plain
    ]


def group_names(group: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a group's parameters: the group's own, else their position."""
    names = group.get("names")
    return tuple(f"{index:06d}" for index in range(len(group["params"]))) if names is None else tuple(names)


def group_factors(group: Mapping[str, Any]) -> dict[str, float]:
    """Factors on the learning rates of a group's parameters, by name; empty where all have the group's own."""
    factors = group.get("lr_factors")
    return {} if factors is None else dict(zip(group_names(group), factors, strict=True))


def _is_map(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and min(shape) > 1
