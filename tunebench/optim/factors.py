"""Kronecker factors of packed gradients and rotations into their eigenbases, for all blocks at once.

A block of matrices G has a factor for its rows, the sum of G G^T over its matrices, and one for its columns, the sum
of G^T G (SOAP, arXiv:2409.11321, section 4). Factors of one dimension are stacked over all buckets, so whatever is done
to them is one batched call per dimension. Float32 products must not be shortened to TF32, which would mix the columns
of a basis: whoever runs a rule on CUDA keeps `torch.backends.cuda.matmul.allow_tf32` off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch

from tunebench.optim.packing import Bucket, Packing, Segment, Tensors


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
        groups: shape (matrices, d, d) and dtype of each stack, by `dtype/d`.

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
        """A stack of zeros per group."""
        return {group: torch.zeros(shape, dtype=dtype, device=device) for group, (shape, dtype) in self.groups.items()}

    def identities(self, device: torch.device) -> Tensors:
        """A stack of identity matrices per group."""
        return {
            group: torch.eye(shape[-1], dtype=dtype, device=device).repeat(shape[0], 1, 1)
            for group, (shape, dtype) in self.groups.items()
        }

    def grams(self, grads: Mapping[str, torch.Tensor]) -> Tensors:
        """The gradients' own factors, a stack per group; `grads` is one vector per segment."""
        pieces: dict[str, list[torch.Tensor]] = {group: [] for group in self.groups}
        for (segment, bucket), (rows, cols) in self._axes.items():
            grad = bucket.of(grads[segment])
            if rows is not None:
                wide = grad.transpose(1, 2).reshape(bucket.count, bucket.rows, bucket.batch * bucket.cols)
                pieces[rows.group].append(wide @ wide.mT)
            if cols is not None:
                tall = grad.reshape(bucket.count, bucket.batch * bucket.rows, bucket.cols)
                pieces[cols.group].append(tall.mT @ tall)
        return {group: torch.cat(found) for group, found in pieces.items()}

    def rotate(self, segment: Segment, vector: torch.Tensor, bases: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Into the eigenbases, QL^T X QR for every matrix X: a segment's vector (numel,) to the same."""
        return self._turned(segment, vector, bases, back=False)

    def rotate_back(self, segment: Segment, vector: torch.Tensor, bases: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Out of the eigenbases, QL X QR^T: the inverse of `rotate`."""
        return self._turned(segment, vector, bases, back=True)

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
        self, segment: Segment, vector: torch.Tensor, bases: Mapping[str, torch.Tensor], *, back: bool
    ) -> torch.Tensor:
        pieces = []
        for bucket in segment.buckets:
            x = bucket.of(vector)
            rows, cols = self._axes[segment.name, bucket]
            if cols is not None:
                basis = cols.of(bases)
                tall = x.reshape(bucket.count, bucket.batch * bucket.rows, bucket.cols)
                x = (tall @ (basis.mT if back else basis)).reshape(x.shape)
            if rows is not None:
                basis = rows.of(bases).unsqueeze(1)
                x = (basis if back else basis.mT) @ x
            pieces.append(x.reshape(-1))
        return torch.cat(pieces)
