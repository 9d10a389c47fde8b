"""Packing: all weights of a model as a few long vectors in which equal blocks lie side by side.

Update rules work on these vectors. An elementwise operation is then one kernel for the whole model, and blocks of one
shape are one batched matrix product. Matrices that are taller than wide are stored transposed, so (64, 32) and
(32, 64) share a bucket.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from tunebench.optim.blocks import Block

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Bucket:
    """Blocks of one shape, contiguous in a segment.

    Attributes:
        start: first element in the segment.
        count: number of blocks.
        batch: matrices per block (they share a preconditioner); 1 but for the per-type view.
        rows, cols: of each matrix, rows <= cols; a vector has one row.
        upright: the first `upright` blocks are stored (in, out) = (rows, cols), the others transposed.
    """

    start: int
    count: int
    batch: int
    rows: int
    cols: int
    upright: int

    @property
    def stop(self) -> int:
        """Position behind the last element in the segment."""
        return self.start + self.count * self.batch * self.rows * self.cols

    def of(self, segment: torch.Tensor) -> torch.Tensor:
        """The bucket of a segment, shape (count, batch, rows, cols); a view."""
        return segment[self.start : self.stop].reshape(self.count, self.batch, self.rows, self.cols)

    def stack(self, segment: torch.Tensor) -> torch.Tensor:
        """All matrices of the bucket, (count * batch, rows, cols); a view."""
        return self.of(segment).flatten(0, 1)

    def scaled(self, stack: torch.Tensor, factor: Callable[[int, int], float]) -> torch.Tensor:
        """A `stack` whose matrices are multiplied by `factor(in, out)`."""
        upright, transposed = factor(self.rows, self.cols), factor(self.cols, self.rows)
        if upright == transposed:
            return stack * upright
        split = self.upright * self.batch
        return torch.cat([stack[:split] * upright, stack[split:] * transposed])

    def maps(self) -> list[tuple[int, int]]:
        """(in, out) of each block."""
        upright = [(self.rows, self.cols)] * self.upright
        return upright + [(self.cols, self.rows)] * (self.count - self.upright)


@dataclass(frozen=True)
class Segment:
    """One packed vector: the blocks of one dtype and one rule.

    Attributes:
        name: key of the vector in a packed dictionary.
        dtype: of the weights.
        is_matrix: whether the matrix rule treats it.
        blocks: in packed order.
        buckets: cover the vector in order, without gaps.
        lr_factor: on the learning rate of these weights.
    """

    name: str
    dtype: torch.dtype
    is_matrix: bool
    blocks: tuple[Block, ...]
    buckets: tuple[Bucket, ...]
    lr_factor: float = 1.0

    @property
    def numel(self) -> int:
        """Elements of the vector."""
        return sum(block.numel for block in self.blocks)

    def block_sums(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the elements of each block: (numel,) to (blocks,)."""
        return torch.cat([bucket.of(values).flatten(1).sum(1) for bucket in self.buckets])

    def spread(self, per_block: torch.Tensor) -> torch.Tensor:
        """One value per block to all elements of the block: (blocks,) to (numel,)."""
        first, pieces = 0, []
        for bucket in self.buckets:
            values = per_block[first : first + bucket.count].unsqueeze(1)
            pieces.append(values.expand(-1, bucket.batch * bucket.rows * bucket.cols).reshape(-1))
            first += bucket.count
        return torch.cat(pieces)


class Packing:
    """The fixed map between a model's named tensors and packed vectors.

    Args:
        parameters: name to tensor (only shape and dtype are read), in any order.
        blocks: cover every element of every parameter exactly once.
        factors: on the learning rates of parameters, by name; 1 for those left out.

    Attributes:
        segments: the packed vectors; one per dtype, rule and factor, none of them empty.
        parts: by factor, a packing of its weights alone; this one itself where all factors are 1.

    Raises:
        ValueError: an element is covered twice or not at all, or a block belongs to no parameter.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        blocks: Iterable[Block],
        factors: Mapping[str, float] | None = None,
    ) -> None:
        # Sorted, so that neither the order of parameters nor that of blocks changes a result.
        self._shapes = {name: torch.Size(parameters[name].shape) for name in sorted(parameters)}
        self._dtypes = {name: parameters[name].dtype for name in self._shapes}
        ordered = sorted(blocks, key=lambda block: (block.parameter, block.offset, block.path))
        _check_cover(self._shapes, ordered)
        factor_of = {name: (factors or {}).get(name, 1.0) for name in self._shapes}
        groups: dict[tuple[torch.dtype, bool, float], list[Block]] = defaultdict(list)
        for block in ordered:
            groups[self._dtypes[block.parameter], block.is_matrix, factor_of[block.parameter]].append(block)
        self.segments = tuple(
            _segment(*key, groups[key]) for key in sorted(groups, key=lambda key: (str(key[0]), not key[1], key[2]))
        )
        self.parts = {1.0: self} if set(factor_of.values()) <= {1.0} else _parts(parameters, ordered, factor_of)
        self._names = {dtype: [n for n in self._shapes if self._dtypes[n] is dtype] for dtype in self._dtypes.values()}
        self._indices = self._selections()
        self._copies: dict[str, dict[torch.device, torch.Tensor]] = {}

    @classmethod
    def shared(
        cls,
        parameters: Mapping[str, torch.Tensor],
        blocks: Iterable[Block],
        factors: Mapping[str, float] | None = None,
    ) -> Packing:
        """One object for all models of this layout: a cohort's trials share its tables, on every device."""
        layout = ((name, tuple(parameter.shape), parameter.dtype) for name, parameter in parameters.items())
        apart = tuple(sorted((name, factor) for name, factor in (factors or {}).items() if factor != 1.0))
        return _of_layout(tuple(sorted(layout, key=lambda entry: entry[0])), tuple(blocks), apart)

    @classmethod
    def elementwise(cls, parameters: Mapping[str, torch.Tensor], factors: Mapping[str, float] | None = None) -> Packing:
        """One vector per dtype and factor, one block per parameter: for rules that never look at a shape."""
        return cls.shared(parameters, [Block.whole(name, (p.numel(),)) for name, p in parameters.items()], factors)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, in packed order."""
        return tuple(block for segment in self.segments for block in segment.blocks)

    def pack(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """Named tensors, shaped as the parameters, to one vector per segment; works under `vmap`."""
        return self.arranged(self.joined({name: tensors[name].reshape(-1) for name in self._shapes}))

    def joined(self, vectors: Mapping[str, torch.Tensor]) -> dict[torch.dtype, torch.Tensor]:
        """One vector per dtype, as `arranged` takes it, of the parameters as vectors; leading axes are kept."""
        return {dtype: torch.cat([vectors[name] for name in names], dim=-1) for dtype, names in self._names.items()}

    def arranged(self, flat: Mapping[torch.dtype, torch.Tensor]) -> Tensors:
        """`pack`, from one vector per dtype that holds the tensors one after another, sorted by name."""
        return {segment.name: self._select(flat[segment.dtype], segment.name) for segment in self.segments}

    def buffers(self, device: torch.device, *leading: int) -> dict[torch.dtype, torch.Tensor]:
        """Empty vectors for `arranged`, with these leading axes."""
        return {
            dtype: torch.empty(*leading, sum(self._shapes[n].numel() for n in names), dtype=dtype, device=device)
            for dtype, names in self._names.items()
        }

    def flattened(self, packed: Mapping[str, torch.Tensor]) -> dict[torch.dtype, torch.Tensor]:
        """The inverse of `arranged`."""
        flat = {}
        for dtype in self._names:
            joined = torch.cat([packed[segment.name] for segment in self.segments if segment.dtype is dtype])
            flat[dtype] = self._select(joined, str(dtype))
        return flat

    def unpack(self, packed: Mapping[str, torch.Tensor]) -> Tensors:
        """The inverse of `pack`; the tensors may share storage."""
        return self.split(self.flattened(packed))

    def split(self, flat: Mapping[torch.dtype, torch.Tensor]) -> Tensors:
        """The named tensors, views, in one vector per dtype; leading axes of the vectors are kept."""
        tensors: Tensors = {}
        for dtype, names in self._names.items():
            pieces = torch.split(flat[dtype], [self._shapes[name].numel() for name in names], dim=-1)
            for name, piece in zip(names, pieces, strict=True):
                tensors[name] = piece.view(*piece.shape[:-1], *self._shapes[name])
        return tensors

    def _select(self, flat: torch.Tensor, what: str) -> torch.Tensor:
        index = self._indices[what]
        if index is None:
            return flat
        # A copy on each device stays where it is: CUDA graphs remember its address.
        copies = self._copies.setdefault(what, {})
        if flat.device not in copies:
            copies[flat.device] = index.to(flat.device)
        return flat.index_select(0, copies[flat.device])

    def _selections(self) -> dict[str, torch.Tensor | None]:
        """Positions to select, by segment from all weights of its dtype and by dtype back; None where all stay put."""
        found: dict[str, torch.Tensor] = {}
        sizes: dict[str, int] = {}
        for dtype, names in self._names.items():
            starts, total = {}, 0
            for name in names:
                starts[name] = total
                total += self._shapes[name].numel()
            own = {s.name: _segment_index(s, starts) for s in self.segments if s.dtype is dtype}
            found |= own | {str(dtype): _inverse(torch.cat(list(own.values())))}
            sizes |= dict.fromkeys((*own, str(dtype)), total)
        stays = {what: torch.equal(index, torch.arange(sizes[what])) for what, index in found.items()}
        return {what: None if stays[what] else index for what, index in found.items()}


@lru_cache(maxsize=64)
def _of_layout(
    layout: tuple[tuple[str, tuple[int, ...], torch.dtype], ...],
    blocks: tuple[Block, ...],
    apart: tuple[tuple[str, float], ...],
) -> Packing:
    parameters = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape, dtype in layout}
    return Packing(parameters, blocks, dict(apart))


def factor_suffix(factor: float) -> str:
    """What the names of segments with a factor on their learning rate end with."""
    return "" if factor == 1.0 else f" x{factor!r}"


def _parts(
    parameters: Mapping[str, torch.Tensor], blocks: Sequence[Block], factor_of: Mapping[str, float]
) -> dict[float, Packing]:
    """A packing for the weights of each factor."""
    parts = {}
    for factor in sorted(set(factor_of.values())):
        own = {name: parameters[name] for name in parameters if factor_of[name] == factor}
        parts[factor] = Packing.shared(own, [block for block in blocks if block.parameter in own])
    return parts


def _inverse(permutation: torch.Tensor) -> torch.Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation))
    return inverse


def _check_cover(shapes: Mapping[str, torch.Size], blocks: Sequence[Block]) -> None:
    counts = {name: torch.zeros(shape.numel(), dtype=torch.int64) for name, shape in shapes.items()}
    for block in blocks:
        if block.parameter not in counts:
            raise ValueError(f"block of {block.parameter}: found no such parameter, allowed: {', '.join(counts)}")
        index = block.index().reshape(-1)
        if index.numel() and int(index.max()) >= counts[block.parameter].numel():
            raise ValueError(
                f"{block.parameter}: found a block that ends at element {int(index.max())}, beyond its end"
            )
        counts[block.parameter].index_add_(0, index, torch.ones_like(index))
    for name, count in counts.items():
        if not bool((count == 1).all()):
            wrong = int((count != 1).sum())
            raise ValueError(f"{name}: found {wrong} elements in no block or in several, allowed: each in exactly one")


def _segment(dtype: torch.dtype, is_matrix: bool, lr_factor: float, blocks: Sequence[Block]) -> Segment:
    alike: dict[tuple[int, int, int], list[Block]] = defaultdict(list)
    for block in blocks:
        batch, rows, cols = block.matrices
        alike[batch, min(rows, cols), max(rows, cols)].append(block)
    ordered: list[Block] = []
    buckets: list[Bucket] = []
    start = 0
    for shape in sorted(alike):
        upright = [block for block in alike[shape] if not _is_tall(block)]
        ordered += upright + [block for block in alike[shape] if _is_tall(block)]
        buckets.append(Bucket(start, len(alike[shape]), *shape, upright=len(upright)))
        start = buckets[-1].stop
    rule = "matrix" if is_matrix else "auxiliary"
    name = f"{rule} {str(dtype).removeprefix('torch.')}{factor_suffix(lr_factor)}"
    return Segment(name, dtype, is_matrix, tuple(ordered), tuple(buckets), lr_factor)


def _segment_index(segment: Segment, starts: Mapping[str, int]) -> torch.Tensor:
    pieces = []
    for block in segment.blocks:
        index = block.index() + starts[block.parameter]
        pieces.append((index.mT if _is_tall(block) else index).reshape(-1))
    return torch.cat(pieces)


def _is_tall(block: Block) -> bool:
    _, rows, cols = block.matrices
    return rows > cols
