"""Kronecker factors of packed gradients and rotations into their eigenbases, for all blocks at once.

A block of matrices G has a factor for its rows, the sum of G G^T over its matrices, and one for its columns, the sum
of G^T G (SOAP, arXiv:2409.11321, section 4). Factors of one dimension are stacked over all buckets, so whatever is done
to them is one batched call per dimension. They are summed and kept in float64, see `eigenbasis`; bases have the
weights' dtype. Rotations in float32 must not be shortened to TF32, which would mix the columns of a basis: whoever runs
a rule on CUDA keeps `torch.backends.cuda.matmul.allow_tf32` off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch

from tunebench.optim.branches import in_branches
from tunebench.optim.packing import Bucket, Packing, Segment, Tensors

# Matrices of a block whose Gram matrices are summed inside one product.
_SUMMED_AT_ONCE = 8


class Sides(StrEnum):
    """Which axes of a matrix are rotated. ONE: the smaller side only, the in-axis of a square matrix."""

    TWO = "two"
    ONE = "one"


@dataclass(frozen=True)
class Side:
    """Where the matrices of one axis of one bucket lie in the stack of their dimension.

    Attributes:
        group: key of the stack, `dtype/dimension`.
        start, stop: first matrix and the one behind the last.
    """

    group: str
    start: int
    stop: int

    def of(self, stacks: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Its part of the stack, (count, ...); a view."""
        return stacks[self.group][self.start : self.stop]


class Factors:
    """The fixed layout of all factors of a packing.

    Args:
        packing: its matrix segments are covered, its auxiliary segments are left alone.
        max_dim: an axis longer than this is not rotated.
        sides: which axes are rotated at all.

    Attributes:
        groups: shape (matrices, d, d) and the weights' dtype of each stack, by `dtype/d`.

    Raises:
        ValueError: matrices of another dtype than float32 or float64.
    """

    def __init__(self, packing: Packing, max_dim: int, sides: Sides) -> None:
        self.groups: dict[str, tuple[torch.Size, torch.dtype]] = {}
        self._axes: dict[tuple[str, Bucket], tuple[Side | None, Side | None]] = {}
        for segment in (segment for segment in packing.segments if segment.is_matrix):
            if segment.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{segment.name}: found {segment.dtype}, allowed: torch.float32, torch.float64")
            for bucket in segment.buckets:
                cols = bucket.cols if sides is Sides.TWO else max_dim + 1
                self._axes[segment.name, bucket] = (
                    self._append(segment.dtype, bucket.rows, bucket.count) if bucket.rows <= max_dim else None,
                    self._append(segment.dtype, bucket.cols, bucket.count) if cols <= max_dim else None,
                )

    def _append(self, dtype: torch.dtype, dim: int, count: int) -> Side:
        group = f"{str(dtype).removeprefix('torch.')}/{dim}"
        start = self.groups[group][0][0] if group in self.groups else 0
        self.groups[group] = torch.Size((start + count, dim, dim)), dtype
        return Side(group, start, start + count)

    def zeros(self, device: torch.device) -> Tensors:
        """A stack of factors per group, all zero."""
        return {group: torch.zeros(s, dtype=torch.float64, device=device) for group, (s, _) in self.groups.items()}

    def identities(self, device: torch.device) -> Tensors:
        """A stack of bases per group, all the identity."""
        return {
            group: torch.eye(shape[-1], dtype=dtype, device=device).repeat(shape[0], 1, 1)
            for group, (shape, dtype) in self.groups.items()
        }

    def grams(self, grads: Mapping[str, torch.Tensor]) -> Tensors:
        """The gradients' own factors, a stack per group; `grads` is one vector per segment."""
        wide = {segment: grads[segment].to(torch.float64) for segment in dict.fromkeys(name for name, _ in self._axes)}
        sides: list[Side] = []
        products: list[Callable[[], torch.Tensor]] = []
        for (segment, bucket), (rows, cols) in self._axes.items():
            grad = bucket.of(wide[segment])
            if rows is not None:
                sides.append(rows)
                products.append(partial(_rows_gram, grad))
            if cols is not None:
                sides.append(cols)
                products.append(partial(_cols_gram, grad))
        pieces: dict[str, list[torch.Tensor]] = {group: [] for group in self.groups}
        for side, gram in zip(sides, in_branches(products), strict=True):
            pieces[side.group].append(gram)
        return {group: torch.cat(found) for group, found in pieces.items()}

    def rotate(self, segment: Segment, vector: torch.Tensor, bases: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Into the eigenbases, QL^T X QR for every matrix X: a segment's vector (numel,) to the same."""
        return self._turned(segment, [vector], bases, back=False)[0]

    def rotate_both(
        self, segment: Segment, first: torch.Tensor, second: torch.Tensor, bases: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`rotate` of two vectors, side by side."""
        one, other = self._turned(segment, [first, second], bases, back=False)
        return one, other

    def rotate_back(self, segment: Segment, vector: torch.Tensor, bases: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Out of the eigenbases, QL X QR^T: the inverse of `rotate`."""
        return self._turned(segment, [vector], bases, back=True)[0]

    def permute(self, segment: Segment, vector: torch.Tensor, orders: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A vector in the eigenbases after their columns were reordered; `orders` is (matrices, d) per group."""
        pieces = []
        for bucket in segment.buckets:
            x = bucket.of(vector)
            rows, cols = self._axes[segment.name, bucket]
            if rows is not None:
                x = x.gather(-2, rows.of(orders)[:, None, :, None].expand(x.shape))
            if cols is not None:
                x = x.gather(-1, cols.of(orders)[:, None, None, :].expand(x.shape))
            pieces.append(x.reshape(-1))
        return torch.cat(pieces)

    def _turned(
        self, segment: Segment, vectors: Sequence[torch.Tensor], bases: Mapping[str, torch.Tensor], *, back: bool
    ) -> list[torch.Tensor]:
        turn = partial(self._turned_bucket, segment, bases, back=back)
        calls = [partial(turn, bucket.of(vector), bucket) for vector in vectors for bucket in segment.buckets]
        pieces, each = in_branches(calls), len(segment.buckets)
        return [torch.cat(pieces[first : first + each]) for first in range(0, len(pieces), each)]

    def _turned_bucket(
        self, segment: Segment, bases: Mapping[str, torch.Tensor], x: torch.Tensor, bucket: Bucket, *, back: bool
    ) -> torch.Tensor:
        rows, cols = self._axes[segment.name, bucket]
        if cols is not None:
            basis = cols.of(bases)
            tall = x.reshape(bucket.count, bucket.batch * bucket.rows, bucket.cols)
            x = (tall @ (basis.mT if back else basis)).reshape(x.shape)
        if rows is not None:
            basis = rows.of(bases).unsqueeze(1)
            x = (basis if back else basis.mT) @ x
        return x.reshape(-1)


def _rows_gram(grad: torch.Tensor) -> torch.Tensor:
    return (grad @ grad.mT).sum(1)


def _cols_gram(grad: torch.Tensor) -> torch.Tensor:
    # A sum over thousands of rows in one product leaves most of a GPU idle, one product per matrix costs memory.
    count, batch, rows, cols = grad.shape
    parts = batch // math.gcd(batch, _SUMMED_AT_ONCE)
    tall = grad.reshape(count, parts, batch // parts * rows, cols)
    return (tall.mT @ tall).sum(1)
