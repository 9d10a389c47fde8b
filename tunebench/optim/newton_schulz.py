"""Newton-Schulz orthogonalisation of many matrices of unlike shapes with few kernels.

The iteration X <- a X + b (X X^T) X + c (X X^T)^2 X multiplies X0 from the left by polynomials of A0 = X0 X0^T only. So
all steps run on the small square A, whose size does not depend on the columns: matrices of unlike width, and, padded
with zeros, of unlike height, are iterated in one batch, and the long side enters twice, in A0 and in the last product.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from tunebench.optim.branches import in_branches

Coefficients = tuple[float, float, float]
"""(a, b, c) of one step: a singular value s becomes a s + b s^3 + c s^5."""

Finish = Callable[[torch.Tensor], torch.Tensor]
"""What is done to a stack of orthogonalised matrices before it is returned."""

QUINTIC: Coefficients = (3.4445, -4.7750, 2.0315)
"""Muon's step (Jordan et al., 2024): fast from below, then scatters singular values over about 0.7 to 1.2."""

CUBIC: Coefficients = (1.5, -0.5, 0.0)
"""The classical Newton-Schulz step, which converges to 1."""

# Matrices whose rows round up to the same multiple of this are iterated together, padded to the highest.
_TILE = 32

# Elements of a row that one product sums.
_SUMMED_AT_ONCE = 512


def newton_schulz(x: torch.Tensor, steps: int = 5, coefficients: Coefficients = QUINTIC) -> torch.Tensor:
    """Matrices with the singular vectors of `x` and singular values near 1, at any scale of `x`.

    Args:
        x: (matrices, rows, cols) with rows <= cols.
        steps: of the iteration.
        coefficients: of each step.

    Returns:
        Shaped as `x`, in at least float32. A zero matrix stays zero; one with NaN becomes NaN and spares the others.
    """
    return orthogonalise([x], [coefficients] * steps)[0]


def orthogonalise(
    stacks: Sequence[torch.Tensor], schedule: Sequence[Coefficients], finishes: Sequence[Finish] = ()
) -> list[torch.Tensor]:
    """`newton_schulz` of several stacks of matrices at once, with one triple of coefficients per step.

    Args:
        stacks: each (matrices, rows, cols) with rows <= cols; shapes and dtypes may differ between stacks.
        schedule: coefficients of each step.
        finishes: what to do to each stack at last; nothing where left out.

    Raises:
        ValueError: a stack with rows > cols.
    """
    for stack in stacks:
        if stack.shape[-2] > stack.shape[-1]:
            raise ValueError(f"Newton-Schulz: found shape {tuple(stack.shape)}, allowed: rows <= cols")
    stacks = [stack if stack.dtype == torch.float64 else stack.to(torch.float32) for stack in stacks]
    with _full_precision():
        groups: dict[tuple[int, torch.dtype], list[int]] = defaultdict(list)
        for position, stack in enumerate(stacks):
            groups[-(-stack.shape[-2] // _TILE) * _TILE, stack.dtype].append(position)
        calls = [
            partial(_iterated, [stacks[i] for i in group], schedule, [finishes[i] for i in group] if finishes else ())
            for group in groups.values()
        ]
        iterated = in_branches(calls)
    done: dict[int, torch.Tensor] = {}
    for positions, members in zip(groups.values(), iterated, strict=True):
        done |= dict(zip(positions, members, strict=True))
    return [done[position] for position in range(len(stacks))]


def _iterated(
    stacks: Sequence[torch.Tensor], schedule: Sequence[Coefficients], finishes: Sequence[Finish]
) -> list[torch.Tensor]:
    members = _unit(stacks)
    for part in _parts(schedule, stacks[0].dtype):
        members = _iterate(members, part)
    return [finish(member) for finish, member in zip(finishes, members, strict=True)] if finishes else members


def _unit(stacks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Matrices of Frobenius norm 1, or zero; the stacks have one dtype."""
    # In float64 the squares of any float32 gradient neither overflow nor vanish, so there is no scale below which an
    # update would shrink.
    norms = [torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float64) for x in stacks]
    dtype = stacks[0].dtype
    floored = torch.cat(norms).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    pieces = torch.split(floored, [x.shape[0] for x in stacks])
    return [x / norm for x, norm in zip(stacks, pieces, strict=True)]


def _parts(schedule: Sequence[Coefficients], dtype: torch.dtype) -> list[list[Coefficients]]:
    """Runs of steps that are safe on A alone.

    Round-off leaves A with eigenvalues of about -eps, which grow by a^2 per step and explode once they near -1. So
    after five quintic steps in float32, nine in float64, A is formed anew from X, which makes it positive again.
    """
    largest = {torch.float32: 5.0e2, torch.float64: 1.0e5}[dtype]
    parts: list[list[Coefficients]] = [[]]
    growth = 1.0
    for coefficients in schedule:
        growth *= coefficients[0]
        if growth > largest and parts[-1]:
            parts.append([])
            growth = coefficients[0]
        parts[-1].append(coefficients)
    return parts


def _iterate(stacks: Sequence[torch.Tensor], schedule: Sequence[Coefficients]) -> list[torch.Tensor]:
    if not schedule:
        return list(stacks)
    size = max(stack.shape[-2] for stack in stacks)
    grams = [_padded(_gram(x), size) for x in stacks]
    polynomial = _polynomial(torch.cat(grams), schedule)
    pieces = torch.split(polynomial, [stack.shape[0] for stack in stacks])
    return [piece[:, : x.shape[-2], : x.shape[-2]] @ x for piece, x in zip(pieces, stacks, strict=True)]


def _gram(x: torch.Tensor) -> torch.Tensor:
    """X X^T; a long row is summed in parts, since one product of few tiles leaves most of a GPU idle."""
    parts, rest = divmod(x.shape[-1], _SUMMED_AT_ONCE)
    if parts < 2 or rest:
        return x @ x.mT
    pieces = x.reshape(*x.shape[:-1], parts, _SUMMED_AT_ONCE).movedim(-2, -3)
    return (pieces @ pieces.mT).sum(-3)


def _padded(gram: torch.Tensor, size: int) -> torch.Tensor:
    missing = size - gram.shape[-1]
    return torch.nn.functional.pad(gram, (0, missing, 0, missing)) if missing else gram


def _polynomial(gram: torch.Tensor, schedule: Sequence[Coefficients]) -> torch.Tensor:
    """The product of all steps' polynomials a + b A + c A^2, where A follows the iteration."""
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    product: torch.Tensor | None = None
    for number, (a, b, c) in enumerate(schedule, start=1):
        polynomial = torch.baddbmm(torch.add(identity * a, gram, alpha=b), gram, gram, alpha=c)
        product = polynomial if product is None else polynomial @ product
        if number < len(schedule):
            gram = polynomial @ gram @ polynomial
    assert product is not None
    return product


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Without TF32, whose round-off of 5e-4 the iteration on A would amplify until it explodes."""
    # The newer of torch's two switches: it can be read after the older one was set, not the other way round.
    switch = torch.backends.cuda.matmul
    found = switch.fp32_precision
    if found != "tf32":
        yield
        return
    switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        # "none" inherits, so that turning TF32 off for all of torch later still reaches the products.
        inherited = torch.backends.fp32_precision  # type: ignore[attr-defined]
        switch.fp32_precision = "none" if inherited == found else found
