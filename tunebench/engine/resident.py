"""A split that lives on the device, and padded batches that are put together there.

The training batches of a cohort are gathered from arrays that stay on the device, by indices that are on the device
too, into tensors whose shapes never change: no collation, no transfer, no waiting for the host. Real frames come first,
with the atoms and edges in the order of NequIP's own collation; one ghost frame at the end takes all padding. Its atoms
stand two cutoffs apart, so the padding edges between them carry a cutoff factor, and a slope, of exactly zero; its
labels are NaN, which loss and errors leave out.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from nequip.data import AtomicDataDict
from numpy.typing import NDArray

from tunebench.engine.padding import BatchShape, FrameSizes, filled, smallest_shape
from tunebench.workloads.frames import Frame, PreparedFrames

Batch = dict[str, torch.Tensor]

_POSITIONS, _FORCES = AtomicDataDict.POSITIONS_KEY, AtomicDataDict.FORCE_KEY
_EDGES, _SHIFTS = AtomicDataDict.EDGE_INDEX_KEY, AtomicDataDict.EDGE_CELL_SHIFT_KEY
# What one ghost atom and the ghost frame hold; the cell only has to have a volume, for a model that divides by it.
_GHOST_ATOM: dict[str, float | torch.Tensor] = {
    _POSITIONS: 0.0,
    _FORCES: float("nan"),
    AtomicDataDict.ATOM_TYPE_KEY: 0,
    AtomicDataDict.ATOMIC_NUMBERS_KEY: 0,
}
_GHOST_FRAME: dict[str, float | torch.Tensor] = {
    AtomicDataDict.CELL_KEY: torch.eye(3, dtype=torch.float64),
    AtomicDataDict.PBC_KEY: False,
    AtomicDataDict.TOTAL_ENERGY_KEY: float("nan"),
    AtomicDataDict.STRESS_KEY: float("nan"),
}
_FIELDS = (*_GHOST_ATOM, *_GHOST_FRAME, _EDGES, _SHIFTS)


@dataclass(frozen=True, kw_only=True, eq=False)
class ResidentFrames:
    """One split packed end to end on a device, with one ghost after the last frame, atom and edge.

    Index ``len(frames)`` is a frame of one ghost atom without labels: it fills a batch that lacks frames.

    Attributes:
        sizes: atoms and edges of the frames, on the host.
        spacing_angstrom: distance of neighbouring ghost atoms, twice the cutoff.
        labelled: frames that keep their force labels, (frames,); the forces themselves are all there.
        atoms: per-atom fields, each (atoms + 1, ...).
        frames: per-frame fields, each (frames + 1, ...).
        edge_index: ends of the edges, counted within their frame, int32 (2, edges + 1).
        edge_cell_shift: periodic cells that an edge crosses, int16 (edges + 1, 3).
        num_atoms: atoms of each frame, int64 (frames + 1,).
        num_edges: edges of each frame, int64 (frames + 1,).
        first_atom: row of each frame's first atom, int64 (frames + 1,).
        first_edge: row of each frame's first edge, int64 (frames + 1,).
    """

    sizes: FrameSizes
    spacing_angstrom: float
    labelled: torch.Tensor
    atoms: Mapping[str, torch.Tensor]
    frames: Mapping[str, torch.Tensor]
    edge_index: torch.Tensor
    edge_cell_shift: torch.Tensor
    num_atoms: torch.Tensor
    num_edges: torch.Tensor
    first_atom: torch.Tensor
    first_edge: torch.Tensor

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        """Memory on the device, bytes."""
        own = (getattr(self, name) for name in _OWN_TENSORS)
        return sum(tensor.nbytes for tensor in (*own, *self.atoms.values(), *self.frames.values()))


_OWN_TENSORS = ("labelled", "edge_index", "edge_cell_shift", "num_atoms", "num_edges", "first_atom", "first_edge")


def resident_frames(
    prepared: PreparedFrames,
    r_max_angstrom: float,
    device: torch.device | str,
    leave_out: Collection[str] = (),
) -> ResidentFrames:
    """Pack a split and put it on a device.

    Args:
        prepared: the split, with neighbour lists; which frames keep their force labels is its choice.
        r_max_angstrom: cutoff of the neighbour lists, Å.
        device: where the split shall live.
        leave_out: fields that no model, loss or metric at hand reads, such as ``atomic_numbers`` and ``pbc``.

    Raises:
        ValueError: the frames carry a field that has no ghost value, or differ in their fields; or the cutoff is not
            positive, which would put all ghost atoms in one place, where the slope of a distance is not defined.
    """
    if not r_max_angstrom > 0:
        raise ValueError(f"r_max_angstrom: found {r_max_angstrom}, allowed: above 0")
    kept = _kept_fields(prepared.frames, leave_out)
    num_atoms = np.array([len(frame[_POSITIONS]) for frame in prepared.frames], dtype=np.int64)
    num_edges = np.array([frame[_EDGES].shape[1] for frame in prepared.frames], dtype=np.int64)
    return ResidentFrames(
        sizes=FrameSizes(atoms=num_atoms, edges=num_edges),
        spacing_angstrom=2.0 * r_max_angstrom,
        labelled=torch.as_tensor(prepared.labelled, dtype=torch.bool, device=device),
        atoms=_packed(prepared.frames, _GHOST_ATOM, kept, device),
        frames=_packed(prepared.frames, _GHOST_FRAME, kept, device),
        edge_index=_packed_edges(prepared.frames).to(device),
        edge_cell_shift=_packed_shifts(prepared.frames).to(device),
        num_atoms=torch.as_tensor(np.append(num_atoms, 1), device=device),
        num_edges=torch.as_tensor(np.append(num_edges, 0), device=device),
        first_atom=torch.as_tensor(np.append(0, num_atoms.cumsum()), device=device),
        first_edge=torch.as_tensor(np.append(0, num_edges.cumsum()), device=device),
    )


def assemble(
    frames: ResidentFrames, indices: torch.Tensor, shape: BatchShape, labelled: torch.Tensor | None = None
) -> Batch:
    """Gather a padded batch on the device: what NequIP's collation of these frames holds, then the ghost frame.

    Makes no host synchronisation, works under `torch.vmap` over `indices` and `labelled`, and can be captured. Nothing
    is checked here: whether the frames fit is known on the host before (`tunebench.engine.padding.fits`).

    Args:
        frames: the split.
        indices: frames of the batch, int64 (batch,) on the device; ``len(frames)`` where there is none.
        shape: static sizes, which the frames must fit; ``shape.frames`` is batch + 1.
        labelled: frames of the split whose forces count, bool (frames,); left out, the split's own choice.

    Returns:
        NequIP's keys: per atom (shape.atoms, ...), ``edge_index`` int64 (2, shape.edges), ``edge_cell_shift``
        (shape.edges, 3), per frame (shape.frames, ...). Labels are NaN where there are none.
    """
    ghost = len(frames)
    chosen = torch.cat([indices, indices.new_full((1,), ghost)])
    atoms = _Rows.of(frames.num_atoms[chosen], frames.first_atom[chosen], shape.atoms)
    edges = _Rows.of(frames.num_edges[chosen], frames.first_edge[chosen], shape.edges)
    atom_rows = atoms.source.clamp_max(frames.atoms[_POSITIONS].shape[0] - 1)
    edge_rows = edges.source.clamp_max(frames.edge_cell_shift.shape[0] - 1)

    batch = {key: values[chosen] for key, values in frames.frames.items()}
    batch |= {key: values[atom_rows] for key, values in frames.atoms.items()}
    batch[_POSITIONS] = batch[_POSITIONS] + _ghost_positions(atoms, frames.spacing_angstrom)
    has_forces = frame_labels(frames.labelled if labelled is None else labelled, indices)[atoms.frame].unsqueeze(-1)
    batch[_FORCES] = torch.where(has_forces, batch[_FORCES], float("nan"))
    ends = frames.edge_index[:, edge_rows].to(torch.int64)
    batch[_EDGES] = ends + atoms.start[edges.frame] + _ghost_ends(atoms, edges)
    batch[_SHIFTS] = frames.edge_cell_shift[edge_rows].to(torch.float64)
    batch[AtomicDataDict.BATCH_KEY] = atoms.frame
    batch[AtomicDataDict.NUM_NODES_KEY] = torch.cat([frames.num_atoms[indices], atoms.padding.unsqueeze(0)])
    return batch


def frame_labels(labelled: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Which frames of a padded batch have force labels: (frames,) of the split and (batch,) give (batch + 1,).

    Ghosts have none. Works under `torch.vmap` over either.
    """
    none = labelled.new_zeros((1,))
    return torch.cat([torch.cat([labelled, none])[indices], none])


@dataclass(frozen=True, kw_only=True, eq=False)
class StaticBatches:
    """An evaluation split as padded batches of one shape; every frame once, in order, without a slot axis.

    Attributes:
        shape: static sizes of each batch.
        indices: frames of the batches, int64 (batches, batch), ``len(frames)`` where the last one lacks frames.
        stacked: NequIP's keys with an axis of batches in front.
    """

    shape: BatchShape
    indices: torch.Tensor
    stacked: Batch

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Batch:
        """One batch: views, so nobody may write into them."""
        return {key: values[position] for key, values in self.stacked.items()}


def static_batches(
    frames: ResidentFrames, batch_size: int, *, masked: bool = True, usual: BatchShape | None = None
) -> StaticBatches:
    """All frames of a split as padded batches of the smallest shape that holds them all.

    Args:
        frames: the split.
        batch_size: frames of a batch; at most those of the split are used.
        masked: force labels as the split itself masks them; False keeps them all, for slots that each leave out their
            own (`tunebench.engine.errors.error_sums` takes the mask that `frame_labels` makes).
        usual: a shape that there is a graph for; taken where it makes little more to compute.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: found {batch_size}, allowed: at least 1")
    order = evaluation_order(len(frames), batch_size)
    shape = smallest_shape(frames.sizes, order)
    if usual is not None:
        filling = filled(frames.sizes, usual)
        if filling is not None and _costs_little(filling, usual, order, shape):
            order, shape = filling, usual
    indices = torch.as_tensor(order, device=frames.num_atoms.device)
    labelled = None if masked else torch.ones_like(frames.labelled)
    batches = [assemble(frames, row, shape, labelled) for row in indices]
    stacked = {key: torch.stack([batch[key] for batch in batches]) for key in batches[0]}
    return StaticBatches(shape=shape, indices=indices, stacked=stacked)


def evaluation_order(num_frames: int, batch_size: int) -> NDArray[np.int64]:
    """Frames of the batches that run through a split once, (batches, batch); filled up with `num_frames` at the end."""
    batch_size = min(batch_size, num_frames)
    batches = -(-num_frames // batch_size)
    order = np.minimum(np.arange(batches * batch_size, dtype=np.int64), num_frames)
    return order.reshape(batches, batch_size)


def _costs_little(
    filling: NDArray[np.int64], usual: BatchShape, order: NDArray[np.int64], smallest: BatchShape
) -> bool:
    """Whether the batches of the usual shape have at most a quarter more edges, and those of one batch."""
    return len(filling) * usual.edges <= 1.25 * len(order) * smallest.edges + usual.edges


@dataclass(frozen=True, eq=False)
class _Rows:
    """Where the rows of a ragged batch come from: a static number of atoms or edges, padding at the end.

    `frame` and `source` give each row's frame in the batch and row in the split, both (rows,); padding runs past the
    split's last row. `start` is the first row of each frame, the ghost frame included. `padding` is the number of
    padding rows, and `rank` counts them, 0 for all real rows.
    """

    frame: torch.Tensor
    source: torch.Tensor
    start: torch.Tensor
    padding: torch.Tensor
    rank: torch.Tensor

    @classmethod
    def of(cls, counts: torch.Tensor, first: torch.Tensor, size: int) -> _Rows:
        """Lay out frames of `counts` rows that begin at row `first` of the split; both (frames,), the ghost last."""
        rows = torch.arange(size, dtype=torch.int64, device=counts.device)
        ends = counts[:-1].cumsum(0)
        frame = (rows.unsqueeze(-1) >= ends).sum(-1)
        start = torch.cat([torch.zeros_like(ends[:1]), ends])
        source = rows + (first - start)[frame]
        rank = (rows - ends[-1]).clamp_min(0)
        return cls(frame=frame, source=source, start=start, padding=size - ends[-1], rank=rank)


def _ghost_positions(atoms: _Rows, spacing: float) -> torch.Tensor:
    """Ghost atoms on a line, (atoms, 3); zero for real atoms."""
    line = atoms.rank.to(torch.float64) * spacing
    return torch.stack([line, torch.zeros_like(line), torch.zeros_like(line)], dim=-1)


def _ghost_ends(atoms: _Rows, edges: _Rows) -> torch.Tensor:
    """Ends of the padding edges, counted within the ghost frame, (2, edges); zero for real edges.

    They are spread over all pairs of neighbouring ghost atoms, in order of the first end as a neighbour list is, so
    that sums over edges do not all add to one atom.
    """
    paired = atoms.padding - atoms.padding % 2
    first = edges.rank * paired // edges.padding.clamp_min(1)
    ends = torch.stack([first, first ^ 1])
    return torch.where(edges.frame == atoms.start.shape[0] - 1, ends, 0)


def _kept_fields(frames: tuple[Frame, ...], leave_out: Collection[str]) -> frozenset[str]:
    found = frozenset(frames[0])
    if unknown := sorted(found - set(_FIELDS)):
        raise ValueError(f"fields of a frame: found {', '.join(unknown)}, allowed: {', '.join(_FIELDS)}")
    for index, frame in enumerate(frames):
        if frame.keys() != found:
            raise ValueError(f"fields of frame {index}: found {', '.join(frame)}, allowed: {', '.join(frames[0])}")
    return found - frozenset(leave_out)


def _packed(
    frames: tuple[Frame, ...],
    ghosts: Mapping[str, float | torch.Tensor],
    kept: frozenset[str],
    device: torch.device | str,
) -> Batch:
    """Fields of all frames end to end, each with the ghost's value behind it."""
    packed = {}
    for key, ghost in ghosts.items():
        if key in kept:
            values = [frame[key] for frame in frames]
            last = torch.zeros_like(values[0][:1]) + torch.as_tensor(ghost).to(values[0].dtype)
            packed[key] = torch.cat([*values, last]).to(device)
    return packed


def _packed_edges(frames: tuple[Frame, ...]) -> torch.Tensor:
    ghost = torch.zeros((2, 1), dtype=torch.int32)
    return torch.cat([*(frame[_EDGES].to(torch.int32) for frame in frames), ghost], dim=1)


def _packed_shifts(frames: tuple[Frame, ...]) -> torch.Tensor:
    ghost = torch.zeros((1, 3), dtype=torch.int16)
    return torch.cat([*(frame[_SHIFTS].to(torch.int16) for frame in frames), ghost])
