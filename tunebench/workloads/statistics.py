"""Statistics of the training split that initialise a model: energy shifts, force scale, number of neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunebench.study.record import Split
from tunebench.workloads.data import PreparedData, load_prepared
from tunebench.workloads.frames import PreparedFrames, prepared_frames

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class TrainingStatistics:
    """What a model is initialised with.

    Attributes:
        per_type_energy_shifts: energy of an atom of each type, eV, in the order of the type names.
        degenerate: whether compositions of the training frames do not determine the shifts one by one.
        force_rms: root mean square of the labelled force components, eV/Å; stands for the scale of the energies.
        avg_num_neighbors: mean number of neighbours of an atom within the cutoff.
        labelled_frames: training frames that keep their forces.
        note: what is unusual, in one line; empty if nothing is.
    """

    per_type_energy_shifts: tuple[float, ...]
    degenerate: bool
    force_rms: float
    avg_num_neighbors: float
    labelled_frames: int
    note: str


@dataclass(frozen=True, kw_only=True)
class EnergyShifts:
    """Least-squares energies per type, shape (types,), eV; residuals per atom, shape (frames,), eV; rank of the fit."""

    shifts: Array
    residuals: Array
    rank: int


def training_statistics(
    prepared: PreparedData, r_max: float, force_fraction: float = 1.0, label_seed: int = 0
) -> TrainingStatistics:
    """Compute the statistics from what training may see: the training split and its labelled forces.

    Without a labelled force, the force scale falls back on the standard deviation of the energy per atom that the
    shifts leave over. Results are kept for the life of the process.

    Args:
        prepared: the data set.
        r_max: cutoff, Å.
        force_fraction: fraction of the training frames that keep their forces.
        label_seed: seed that chooses them.
    """
    return _training_statistics(prepared.folder, float(r_max), float(force_fraction), label_seed)


def fit_energy_shifts(counts: Array, energies: Array) -> EnergyShifts:
    """Fit total energies by a sum over atoms of one energy per type, every frame weighted per atom as in the loss.

    Args:
        counts: atoms of each type, shape (frames, types).
        energies: total energies, eV, shape (frames,).

    Returns:
        The least-squares solution; the one of smallest norm where compositions are linearly dependent.
    """
    atoms = counts.sum(axis=1)
    fractions, per_atom = counts / atoms[:, None], energies / atoms
    shifts, _, rank, _ = np.linalg.lstsq(fractions, per_atom, rcond=1e-10)
    return EnergyShifts(shifts=shifts, residuals=per_atom - fractions @ shifts, rank=int(rank))


@lru_cache(maxsize=64)
def _training_statistics(folder: Path, r_max: float, force_fraction: float, label_seed: int) -> TrainingStatistics:
    prepared = load_prepared(folder)
    dataset = prepared_frames(prepared, Split.TRAIN, r_max, force_fraction, label_seed)
    fit = fit_energy_shifts(*composition(dataset, len(prepared.type_names)))
    force_rms, notes = _force_scale(dataset, fit)
    types = len(prepared.type_names)
    if fit.rank < types:
        few = f"{fit.rank} independent compositions for {types} species"
        notes.insert(0, f"{few}: shifts are the minimum-norm solution")
    edges = sum(int(frame["edge_index"].shape[1]) for frame in dataset.frames)
    atoms = sum(int(frame["pos"].shape[0]) for frame in dataset.frames)
    if edges == 0:
        notes.append(f"no neighbours within {r_max:g} Å: their number is taken as 1")
    return TrainingStatistics(
        per_type_energy_shifts=tuple(float(shift) for shift in fit.shifts),
        degenerate=fit.rank < types,
        force_rms=force_rms,
        avg_num_neighbors=edges / atoms if edges else 1.0,
        labelled_frames=int(dataset.labelled.sum()),
        note="; ".join(notes),
    )


def composition(dataset: PreparedFrames, types: int) -> tuple[Array, Array]:
    """Atoms of each type, shape (frames, types), and total energies, eV, shape (frames,)."""
    counts = [np.bincount(frame["atom_types"].numpy(), minlength=types) for frame in dataset.frames]
    energies = [frame["total_energy"].item() for frame in dataset.frames]
    return np.array(counts, dtype=np.float64), np.array(energies, dtype=np.float64)


def _force_scale(dataset: PreparedFrames, fit: EnergyShifts) -> tuple[float, list[str]]:
    labelled = [frame["forces"].numpy() for frame, kept in zip(dataset.frames, dataset.labelled, strict=True) if kept]
    if labelled:
        scale = float(np.sqrt(np.mean(np.square(np.concatenate(labelled)))))
        if scale > 0.0:
            return scale, []
        return 1.0, ["all labelled forces are zero: the force scale is taken as 1 eV/Å"]
    scale = float(np.std(fit.residuals))
    if scale > 0.0:
        return scale, ["no labelled forces: the force scale is the standard deviation of the energy per atom"]
    return 1.0, ["no labelled forces and no spread of energies: the force scale is taken as 1 eV/Å"]
