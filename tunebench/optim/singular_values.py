"""Square roots of singular values without a singular value decomposition, which CUDA does one matrix at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

# Matrices whose rows round up to the same multiple of this are iterated together, padded to the highest.
_TILE = 32

# A step multiplies a small eigenvalue of A by (5/4)^4. Singular values above 1e-6 of the Frobenius norm end at
# round-off; with more steps the round-off in A's null space, about -1e-17, would reach 1 and explode.
_STEPS = 34


def square_root(stacks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """P S^(1/2) R^T of X = P S R^T, up to a positive factor per matrix.

    That is A^(-1/4) X with A = X X^T, by the coupled Newton iteration for inverse roots (Guo and Higham, SIAM J. Matrix
    Anal. Appl. 28 (2006) 788) in float64. Singular values below 1e-6 of the Frobenius norm come out too small.

    Args:
        stacks: each (matrices, rows, cols) with rows <= cols; shapes and dtypes may differ between stacks.

    Returns:
        Shaped and typed as `stacks`. A zero matrix stays zero; one with NaN becomes NaN and spares the others.
    """
    units = [_unit(stack.to(torch.float64)) for stack in stacks]
    groups: dict[int, list[int]] = defaultdict(list)
    for position, unit in enumerate(units):
        groups[-(-unit.shape[-2] // _TILE)].append(position)
    roots: dict[int, torch.Tensor] = {}
    for positions in groups.values():
        members = [units[position] for position in positions]
        size = max(unit.shape[-2] for unit in members)
        grams = [torch.nn.functional.pad(unit @ unit.mT, 2 * (0, size - unit.shape[-2])) for unit in members]
        inverses = torch.split(_inverse_fourth_root(torch.cat(grams)), [unit.shape[0] for unit in members])
        for position, unit, inverse in zip(positions, members, inverses, strict=True):
            rows = unit.shape[-2]
            roots[position] = (inverse[:, :rows, :rows] @ unit).to(stacks[position].dtype)
    return [roots[position] for position in range(len(stacks))]


def _unit(stack: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True)
    return stack / norm.clamp(min=torch.finfo(torch.float64).tiny)


def _inverse_fourth_root(gram: torch.Tensor) -> torch.Tensor:
    """A^(-1/4) for eigenvalues in (0, 1], (matrices, n, n) float64."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    root = identity.expand(gram.shape)
    for _ in range(_STEPS):
        change = torch.add(1.25 * identity, gram, alpha=-0.25)
        root = root @ change
        square = change @ change
        gram = square @ (square @ gram)
    return root
