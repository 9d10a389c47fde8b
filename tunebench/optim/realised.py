"""What an optimizer really does to how many weights, and whether that is what its search space promises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tunebench.optim.blocks import Block
from tunebench.optim.matrix_view import FctpView, matrix_view, trainable_parameters
from tunebench.optim.optimizer import RuleOptimizer
from tunebench.optim.packing import Packing

_NOT_SETTINGS = ("params", "names", "blocks", "lr_factors")

# What is left of a rule where no side of a matrix is rotated.
_UNROTATED = {"soap": "adam", "soap_muon": "orthogonalised adam"}


class BrokenPromise(ValueError):
    """An optimizer treats other weights than its search space promises."""


@dataclass
class _Row:
    settings: dict[str, Any]
    blocks: int = 0
    parameters: int = 0
    tensors: set[str] = field(default_factory=set)


def realised_groups(optimizer: RuleOptimizer) -> list[dict[str, Any]]:
    """What each update rule really treats, read off the blocks that the optimizer packs (rule F10).

    Returns:
        One row of plain data per parameter group, rule, view, number of rotated sides and learning rate: `rule`,
        `view` (how the rule reads the blocks, see `View`), `blocks`, `tensors` (that hold them), `parameters`, `share`
        of all weights the optimizer has, the group's `settings`, for rules that rotate `rotated_sides` of each matrix,
        and `lr_factor` where the learning rate is not the group's own. SOAP without a rotated side is Adam and is
        called so.
    """
    rows: dict[tuple[Any, ...], _Row] = {}
    for index, group in enumerate(optimizer.param_groups):
        settings = {name: value for name, value in group.items() if name not in _NOT_SETTINGS}
        for factor, block in _blocks(optimizer.packing_of(index)):
            sides = _rotated_sides(optimizer, group, block)
            key = (index, _rule(optimizer, block, sides), block.view.value, sides, factor)
            row = rows.setdefault(key, _Row(settings))
            row.blocks += 1
            row.parameters += block.numel
            row.tensors.add(block.parameter)
    total = sum(row.parameters for row in rows.values())
    return [_plain(key, row, total) for key, row in rows.items()]


def check_promise(
    name: str, rows: Iterable[Mapping[str, Any]], model: torch.nn.Module, fctp_view: FctpView | None
) -> None:
    """Hold realised groups against what a search space promises of its own rule.

    Args:
        name: of the optimizer, which is that of its own rule.
        rows: from `realised_groups`.
        model: whose weights are trained.
        fctp_view: the own rule treats exactly the matrices that `matrix_view` finds so, at least one; None where it
            treats every weight.

    Raises:
        BrokenPromise: with the share found and the one promised, in one line.
    """
    total = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    own = _counts((row["view"], row["blocks"], row["parameters"]) for row in rows if row["rule"] == name)
    found = f"{name}: found {name} on {_words(own, total)}"
    if fctp_view is None:
        if sum(parameters for _, parameters in own.values()) != total:
            raise BrokenPromise(f"{found}, allowed: all {total} weights of the model")
        return
    promised = _counts((b.view.value, 1, b.numel) for b in matrix_view(model, fctp_view=fctp_view) if b.is_matrix)
    if not promised:
        raise BrokenPromise(f"{name}: found no matrix in this model, allowed: at least one")
    if own != promised:
        raise BrokenPromise(f"{found}, allowed: {_words(promised, total)}, the matrices of fctp_view {fctp_view}")


def _rotated_sides(optimizer: RuleOptimizer, group: Mapping[str, Any], block: Block) -> int | None:
    """How many sides of a block's matrices are rotated; None where the rule rotates nothing by design."""
    if not block.is_matrix or "max_precondition_dim" not in group:
        return None
    _, rows, cols = block.matrices
    limit: int = group["max_precondition_dim"]
    sides = (min(rows, cols),) if group["sides"] == "one" else (rows, cols)
    return sum(side <= limit for side in sides)


def _rule(optimizer: RuleOptimizer, block: Block, rotated_sides: int | None) -> str:
    if optimizer.matrix_rule is None or not block.is_matrix:
        return optimizer.plain_rule
    return _UNROTATED[optimizer.matrix_rule] if rotated_sides == 0 else optimizer.matrix_rule


def _plain(key: tuple[Any, ...], row: _Row, total: int) -> dict[str, Any]:
    _, rule, view, sides, factor = key
    plain = {
        "rule": rule,
        "view": view,
        "blocks": row.blocks,
        "tensors": len(row.tensors),
        "parameters": row.parameters,
        "share": row.parameters / total,
        "settings": row.settings,
    }
    plain |= {} if sides is None else {"rotated_sides": sides}
    return plain | ({} if factor == 1.0 else {"lr_factor": factor})


def _blocks(packing: Packing) -> list[tuple[float, Block]]:
    """All blocks, each with the factor on its learning rate."""
    return [(segment.lr_factor, block) for segment in packing.segments for block in segment.blocks]


def _counts(parts: Iterable[tuple[str, int, int]]) -> dict[str, tuple[int, int]]:
    """Blocks and parameters by view, summed over (view, blocks, parameters)."""
    counts: dict[str, tuple[int, int]] = {}
    for view, blocks, parameters in parts:
        before = counts.get(view, (0, 0))
        counts[view] = before[0] + blocks, before[1] + parameters
    return counts


def _words(counts: Mapping[str, tuple[int, int]], total: int) -> str:
    blocks = " and ".join(f"{blocks} {view}" for view, (blocks, _) in counts.items()) or "0"
    share = sum(parameters for _, parameters in counts.values()) / total
    return f"{blocks} blocks ({100 * share:.2f} % of the weights)"
