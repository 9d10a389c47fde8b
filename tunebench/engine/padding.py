"""Static batch shapes: how many atoms and edges a padded batch holds, which batches fit, and what the padding wastes.

Everything here runs on the host with the sizes of the frames; the device never decides which shape a step takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tunebench.study.seeds import named_seed

GHOST_ATOMS = 2
"""Atoms the ghost frame has at least: padding edges need two ends that are further apart than the cutoff."""

ALLOWED_WASTE = 0.1
"""Share of a mean batch of the guaranteed shape that may be padding before a second, tighter shape is worth having."""

WORTH_SAVING = 0.05
"""Share of the guaranteed atoms or edges that a tighter shape must save: each shape is compiled and captured anew."""

MISFIT_SHARE = 0.001
"""Share of the batches whose atoms, and likewise whose edges, may be too many for the usual shape."""

_SAMPLED_BATCHES = 8192

Sizes = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """Static sizes of a padded batch, the ghost frame with its atoms and the padding edges included."""

    frames: int
    atoms: int
    edges: int


@dataclass(frozen=True, kw_only=True)
class FrameSizes:
    """Atoms and edges of every frame of a split, two host arrays of shape (frames,).

    Raises:
        ValueError: the arrays differ in shape, there is no frame, or a frame has no atom.
    """

    atoms: Sizes
    edges: Sizes

    def __post_init__(self) -> None:
        if self.atoms.ndim != 1 or self.atoms.shape != self.edges.shape:
            raise ValueError(f"edges: found shape {self.edges.shape}, allowed: that of the atoms, {self.atoms.shape}")
        if not len(self) or self.atoms.min() < 1 or self.edges.min() < 0:
            raise ValueError("atoms: found no frame or an empty one, allowed: frames with at least one atom")

    def __len__(self) -> int:
        return len(self.atoms)

    def of_batches(self, indices: NDArray[np.int64] | Sequence[Sequence[int]]) -> tuple[Sizes, Sizes]:
        """Atoms and edges of batches, each of shape (...,), for indices of shape (..., batch).

        Index ``len(sizes)`` stands for no frame; it takes one ghost atom.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        return np.append(self.atoms, 1)[chosen].sum(axis=-1), np.append(self.edges, 0)[chosen].sum(axis=-1)


@dataclass(frozen=True, kw_only=True)
class Waste:
    """Share of the atoms and of the edges of a batch that is padding, 0 to 1; lower is better."""

    atoms: float
    edges: float


@dataclass(frozen=True, kw_only=True)
class PaddingPlan:
    """The shapes of a split's training batches.

    `guaranteed` holds every batch of distinct frames. `usual` holds nearly all of them and is the same as `guaranteed`
    where that wastes little. `misfits` is the share of the batches that are too large for `usual`.
    """

    guaranteed: BatchShape
    usual: BatchShape
    guaranteed_waste: Waste
    usual_waste: Waste
    misfits: float


def batch_shape(sizes: FrameSizes, batch_size: int, edges_in: int = 1) -> BatchShape:
    """The smallest shape that holds any `batch_size` distinct frames: those with the most atoms, or the most edges.

    Its number of edges is a multiple of `edges_in`.

    Raises:
        ValueError: the batch is empty or larger than the split.
    """
    if not 1 <= batch_size <= len(sizes):
        raise ValueError(f"batch_size: found {batch_size}, allowed: 1 to the number of frames, {len(sizes)}")
    atoms, edges = (int(np.sort(size)[-batch_size:].sum()) for size in (sizes.atoms, sizes.edges))
    return _with_ghosts(batch_size, atoms, edges, edges_in)


def smallest_shape(sizes: FrameSizes, indices: NDArray[np.int64]) -> BatchShape:
    """The smallest shape that holds all of these batches, indices of shape (batches, batch)."""
    atoms, edges = sizes.of_batches(indices)
    return _with_ghosts(indices.shape[-1], int(atoms.max()), int(edges.max()))


def padding_plan(
    sizes: FrameSizes, batch_size: int, allowed_waste: float = ALLOWED_WASTE, edges_in: int = 1
) -> PaddingPlan:
    """Choose the shapes of training batches, with multiples of `edges_in` edges.

    Where more than `allowed_waste` of the atoms or edges of a mean batch of the guaranteed shape is padding, the usual
    shape holds all but `MISFIT_SHARE` of the batches by atoms, and likewise by edges. Both quantiles are read off at
    least 8192 batches of shuffled epochs, drawn from a seed of their own, so a split always gets the same shapes. A
    usual shape that saves less than `WORTH_SAVING` is not used.

    Raises:
        ValueError: as for `batch_shape`.
    """
    guaranteed = batch_shape(sizes, batch_size, edges_in)
    waste = mean_waste(sizes, guaranteed)
    usual, misfits = guaranteed, 0.0
    if max(waste.atoms, waste.edges) > allowed_waste:
        usual, misfits = _usual_shape(sizes, guaranteed, edges_in)
    return PaddingPlan(
        guaranteed=guaranteed,
        usual=usual,
        guaranteed_waste=waste,
        usual_waste=mean_waste(sizes, usual),
        misfits=misfits,
    )


def fits(
    sizes: FrameSizes, indices: NDArray[np.int64] | Sequence[Sequence[int]], shape: BatchShape
) -> NDArray[np.bool_]:
    """Which batches the shape holds: indices of shape (..., batch) give (...,), a whole order at once.

    Raises:
        ValueError: the batches have another number of frames than the shape.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    if chosen.shape[-1] != shape.frames - 1:
        raise ValueError(f"indices: found batches of {chosen.shape[-1]} frames, allowed: {shape.frames - 1}")
    atoms, edges = sizes.of_batches(chosen)
    fitting: NDArray[np.bool_] = (atoms + GHOST_ATOMS <= shape.atoms) & (edges <= shape.edges)
    return fitting


def filled(sizes: FrameSizes, shape: BatchShape) -> NDArray[np.int64] | None:
    """All frames in their order in as few batches as the shape allows, (batches, batch) as `evaluation_order` has them.

    Returns:
        Indices, filled up with ``len(sizes)`` where a batch has fewer frames; None where a frame alone is too large.
    """
    batch_size, missing = shape.frames - 1, len(sizes)
    room = shape.atoms - GHOST_ATOMS - batch_size  # every place has an atom, a ghost where there is no frame
    batches: list[list[int]] = []
    atoms = edges = math.inf
    for frame, (more_atoms, more_edges) in enumerate(
        zip((sizes.atoms - 1).tolist(), sizes.edges.tolist(), strict=True)
    ):
        if more_atoms > room or more_edges > shape.edges:
            return None
        atoms, edges = atoms + more_atoms, edges + more_edges
        if atoms > room or edges > shape.edges or len(batches[-1]) == batch_size:
            batches.append([])
            atoms, edges = more_atoms, more_edges
        batches[-1].append(frame)
    return np.array([batch + [missing] * (batch_size - len(batch)) for batch in batches], dtype=np.int64)


def mean_waste(sizes: FrameSizes, shape: BatchShape) -> Waste:
    """Share of padding in the shape when it holds a mean batch of the split, the ghost atoms included."""
    batch_size = shape.frames - 1
    return Waste(
        atoms=1 - batch_size * float(sizes.atoms.mean()) / shape.atoms,
        edges=1 - batch_size * float(sizes.edges.mean()) / shape.edges,
    )


def _usual_shape(sizes: FrameSizes, guaranteed: BatchShape, edges_in: int) -> tuple[BatchShape, float]:
    """A shape that nearly all batches fit, with the share that does not; the guaranteed one where that saves little."""
    batch_size = guaranteed.frames - 1
    drawn = _drawn_batches(len(sizes), batch_size)
    atoms, edges = (int(np.quantile(held, 1 - MISFIT_SHARE, method="higher")) for held in sizes.of_batches(drawn))
    usual = _with_ghosts(batch_size, atoms, edges, edges_in)
    if max(1 - usual.atoms / guaranteed.atoms, 1 - usual.edges / guaranteed.edges) < WORTH_SAVING:
        return guaranteed, 0.0
    return usual, 1 - float(fits(sizes, drawn, usual).mean())


def _with_ghosts(batch_size: int, atoms: int, edges: int, edges_in: int = 1) -> BatchShape:
    # A batch of lone atoms still gets one edge, between ghosts: models are not made for batches without any.
    return BatchShape(frames=batch_size + 1, atoms=atoms + GHOST_ATOMS, edges=-(-max(edges, 1) // edges_in) * edges_in)


def _drawn_batches(num_frames: int, batch_size: int) -> NDArray[np.int64]:
    """Batches of shuffled epochs, the incomplete one at the end of each dropped; shape (batches, batch)."""
    rng = np.random.default_rng(named_seed(0, "padding"))
    per_epoch = num_frames // batch_size
    epochs = -(-_SAMPLED_BATCHES // per_epoch)
    order = rng.permuted(np.tile(np.arange(num_frames, dtype=np.int64), (epochs, 1)), axis=1)
    return order[:, : per_epoch * batch_size].reshape(-1, batch_size)
