"""Frames as NequIP trains on them: a dataset over one split of a prepared folder."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from nequip.data import AtomicDataDict, from_ase
from nequip.data.dataset import AtomicDataset
from nequip.data.transforms import AddNaNStressTransform, ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
from nequip.utils import torch_default_dtype

from tunebench.workloads.data import PreparedData, load_prepared
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.labels import split_labels
from tunebench.workloads.structure_files import read_prepared

Frame = dict[str, torch.Tensor]

# Twelve splits of a thousand 21-atom frames at 5 Å take less than 0.3 GiB; a trial reads three to five splits.
_KEPT_SPLITS = 12


class PreparedFrames(AtomicDataset):  # type: ignore[misc]  # nequip carries no types
    """One split of a prepared data set, for NequIP's own config by ``_target_`` and for both engines.

    Every frame holds NequIP's keys, numbers in float64: ``pos`` (atoms, 3) Å, ``cell`` (1, 3, 3) Å, ``pbc`` (1, 3),
    ``atom_types`` (atoms,), ``atomic_numbers`` (atoms,), ``edge_index`` (2, edges), ``edge_cell_shift`` (edges, 3),
    ``total_energy`` (1, 1) eV, ``forces`` (atoms, 3) eV/Å and, where the data set has it, ``stress`` (1, 3, 3) eV/Å³.
    Forces of frames that lose their labels are NaN, and so is a missing stress; NequIP's losses and metrics skip them
    with ``ignore_nan``.

    Files are read and neighbour lists built once per process and shared by all datasets of the same split, cutoff and
    types. Frames come out as copies, because NequIP's models write into the tensors they are given.

    Args:
        folder: folder of the prepared data set.
        split: ``train``, ``val``, ``test`` or ``ood:NAME``.
        r_max: cutoff, Å.
        type_names: the model's type names, chemical symbols; left out, those of the data set.
        force_fraction: fraction of the frames that keep their forces; `train` and `val` only.
        label_seed: seed that chooses them.

    Raises:
        WorkloadError: no such split, or a species that is not among the type names.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        r_max: float,
        type_names: list[str] | tuple[str, ...] | None = None,
        force_fraction: float = 1.0,
        label_seed: int = 0,
    ) -> None:
        super().__init__(transforms=[])
        prepared = load_prepared(Path(folder).expanduser().resolve())
        if split not in prepared.splits:
            raise WorkloadError("data", f"split {split}", ", ".join(prepared.splits))
        names = prepared.type_names if type_names is None else tuple(type_names)
        self.split = split
        self.frames = _built_frames(prepared.folder, split, float(r_max), names)
        self.labelled = split_labels(split, len(self.frames), force_fraction, label_seed)

    def __len__(self) -> int:
        return len(self.frames)

    def num_atoms(self, indices: Any) -> list[int]:
        """Atoms of each frame named, without copying frames."""
        return [int(self.frames[index]["pos"].shape[0]) for index in self._positions(indices)]

    def _positions(self, indices: Any) -> list[int]:
        return list(range(len(self))[indices]) if isinstance(indices, slice) else [int(index) for index in indices]

    def _get_data_list(self, indices: Any) -> list[Frame]:
        return [self._frame(index) for index in self._positions(indices)]

    def _frame(self, index: int) -> Frame:
        frame = {key: value.clone() for key, value in self.frames[index].items()}
        if not self.labelled[index]:
            frame[AtomicDataDict.FORCE_KEY].fill_(float("nan"))
        return frame


def prepared_frames(
    prepared: PreparedData, split: str, r_max: float, force_fraction: float = 1.0, label_seed: int = 0
) -> PreparedFrames:
    """The dataset of one split of a data set at hand; arguments and errors as for `PreparedFrames`."""
    return PreparedFrames(prepared.folder, split, r_max, prepared.type_names, force_fraction, label_seed)


@lru_cache(maxsize=_KEPT_SPLITS)
def _built_frames(folder: Path, split: str, r_max: float, type_names: tuple[str, ...]) -> tuple[Frame, ...]:
    prepared = load_prepared(folder)
    unknown = sorted(set(prepared.type_names) - set(type_names))
    if unknown:
        raise WorkloadError("data", f"species {', '.join(unknown)}", f"the model's types: {', '.join(type_names)}")
    transforms: list[torch.nn.Module] = [AddNaNStressTransform()] if prepared.has_stress else []
    transforms.append(ChemicalSpeciesToAtomTypeMapper(model_type_names=list(type_names)))
    transforms.append(NeighborListTransform(r_max=r_max))
    frames = []
    with torch_default_dtype(torch.float64):
        for atoms in read_prepared(prepared.splits[split].path):
            frame: Frame = from_ase(atoms)
            for transform in transforms:
                frame = transform(frame)
            frames.append(frame)
    return tuple(frames)
