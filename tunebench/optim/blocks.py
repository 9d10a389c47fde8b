"""Blocks: the pieces of a parameter tensor that an update rule treats as one object.

A stored tensor is often not the object that the mathematics names: e3nn keeps many matrices in one flat vector, a
fused head keeps one matrix per tensor-product path side by side. A block says where such an object lies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch


class View(StrEnum):
    """How an update rule reads a block.

    VECTOR: no linear map; the auxiliary rule. MATRIX: stored (in, out). PER_TYPE: stored (u, v, w), read as v matrices
    (u, w) that share their preconditioner. MERGED: stored (u, v, w), read as one matrix (u * v, w).
    """

    VECTOR = "vector"
    MATRIX = "matrix"
    PER_TYPE = "per_type"
    MERGED = "merged"


@dataclass(frozen=True)
class Block:
    """A strided slice of one parameter's storage.

    Attributes:
        parameter: name of the parameter, as in `named_parameters`.
        path: what the slice is inside the parameter (`0e -> 1o`, `columns 32:64`); empty for a whole tensor.
        offset: first element, counted in the flattened parameter.
        shape: of the slice as stored: (in, out), (u, v, w), or any for VECTOR.
        strides: elements between neighbours along each axis of `shape`, in the flattened parameter.
        view: how an update rule reads it.
    """

    parameter: str
    path: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    view: View

    def __post_init__(self) -> None:
        axes = {View.MATRIX: 2, View.PER_TYPE: 3, View.MERGED: 3}.get(self.view, len(self.shape))
        if len(self.shape) != axes or len(self.strides) != len(self.shape):
            raise ValueError(f"{self.parameter}: found shape {self.shape}, allowed for {self.view}: {axes} axes")

    @classmethod
    def whole(cls, parameter: str, shape: tuple[int, ...], view: View = View.VECTOR, path: str = "") -> Block:
        """The block that covers a contiguous parameter of this shape."""
        return cls.slice(parameter, path, 0, shape, view)

    @classmethod
    def slice(cls, parameter: str, path: str, offset: int, shape: tuple[int, ...], view: View) -> Block:
        """A contiguous run of a parameter's elements, read with this shape."""
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return cls(parameter, path, offset, tuple(shape), strides, view)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def is_matrix(self) -> bool:
        """Whether a matrix rule treats it; else the auxiliary rule does."""
        return self.view is not View.VECTOR

    @property
    def matrices(self) -> tuple[int, int, int]:
        """(matrices, in, out) under the view; a vector of n elements is (1, 1, n)."""
        if self.view is View.VECTOR:
            return 1, 1, self.numel
        if self.view is View.MATRIX:
            return 1, self.shape[0], self.shape[1]
        u, v, w = self.shape
        return (v, u, w) if self.view is View.PER_TYPE else (1, u * v, w)

    def index(self) -> torch.Tensor:
        """Positions of its elements in the flattened parameter, int64, shaped as `matrices` (on the CPU)."""
        position = torch.full(self.shape, self.offset, dtype=torch.int64)
        for axis, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            steps = torch.arange(size, dtype=torch.int64) * stride
            position += steps.reshape([size if a == axis else 1 for a in range(len(self.shape))])
        if self.view is View.PER_TYPE:
            position = position.movedim(1, 0)
        return position.reshape(self.matrices)
