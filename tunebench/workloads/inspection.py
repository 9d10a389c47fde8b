# mypy: allow-untyped-calls
"""What a prepared data set holds, in numbers that a user checks before training on it."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase import Atoms
from numpy.typing import NDArray

from tunebench.study.record import Split
from tunebench.workloads.data import PreparedData
from tunebench.workloads.frames import prepared_frames
from tunebench.workloads.statistics import training_statistics
from tunebench.workloads.structure_files import read_prepared

Array = NDArray[np.float64]


def inspect(prepared: PreparedData, r_max: float = 5.0) -> dict[str, Any]:
    """Describe a data set: frames, species, energies, forces, stress and neighbours.

    Args:
        prepared: the data set.
        r_max: cutoff for the neighbours, Å.

    Returns:
        A tree of plain values, ready for JSON. Energies eV/atom, forces eV/Å, stress eV/Å³. ``shifts`` says whether the
        training compositions determine the energy shifts.
    """
    statistics = training_statistics(prepared, r_max)
    return {
        "folder": str(prepared.folder),
        "hash": prepared.hash,
        "level_of_theory": prepared.level_of_theory,
        "species": list(prepared.type_names),
        "periodic": prepared.periodic,
        "has_stress": prepared.has_stress,
        "splits": {name: _describe(prepared, name, r_max) for name in prepared.splits},
        "shifts": {
            "ev": dict(zip(prepared.type_names, statistics.per_type_energy_shifts, strict=True)),
            "degenerate": statistics.degenerate,
            "note": statistics.note,
        },
        "r_max_angstrom": r_max,
        "unseen_in_training": _unseen(prepared),
    }


def _describe(prepared: PreparedData, split: str, r_max: float) -> dict[str, Any]:
    file = prepared.splits[split]
    frames = read_prepared(file.path)
    energies = np.array([frame.get_potential_energy() / len(frame) for frame in frames], dtype=np.float64)
    forces = np.concatenate([frame.get_forces() for frame in frames])
    net = np.array([np.linalg.norm(frame.get_forces().sum(axis=0)) for frame in frames], dtype=np.float64)
    stress = [frame.get_stress(voigt=True) for frame in frames if "stress" in frame.calc.results]
    return {
        "frames": file.frames,
        "atoms": {"min": file.atoms_min, "max": file.atoms_max},
        "formulas": len({frame.symbols.formula.format("hill") for frame in frames}),
        "energy_per_atom": _spread(energies),
        "forces": {
            "rms": float(np.sqrt(np.mean(np.square(forces)))),
            "max_norm": float(np.linalg.norm(forces, axis=1).max()),
            "max_net": float(net.max()),
        },
        "stress": {"frames": len(stress), **_spread(np.concatenate(stress))} if stress else None,
        "neighbours": _neighbours(prepared, split, r_max),
    }


def _spread(values: Array) -> dict[str, float]:
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        "mean": float(values.mean()),
        "std": float(values.std()),
    }


def _neighbours(prepared: PreparedData, split: str, r_max: float) -> dict[str, float | int]:
    counts = []
    for frame in prepared_frames(prepared, split, r_max).frames:
        atoms = int(frame["pos"].shape[0])
        counts.append(np.bincount(frame["edge_index"][0].numpy(), minlength=atoms))
    per_atom = np.concatenate(counts)
    return {
        "mean": float(per_atom.mean()),
        "max": int(per_atom.max()),
        "atoms_without": int(np.count_nonzero(per_atom == 0)),
        "max_edges_a_frame": int(max(int(count.sum()) for count in counts)),
    }


def _unseen(prepared: PreparedData) -> list[str]:
    seen = _symbols(read_prepared(prepared.splits[Split.TRAIN].path))
    return [name for name in prepared.type_names if name not in seen]


def _symbols(frames: list[Atoms]) -> set[str]:
    return {symbol for frame in frames for symbol in frame.symbols}
