"""Phonons of the reference method itself, from the forces that a data set holds of displaced supercells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunebench.properties.measured import Floats, Measured, PropertyFailure
from tunebench.properties.phonons import PhononSettings, phonopy_of, spectrum
from tunebench.properties.structures import atoms_of

if TYPE_CHECKING:
    from ase import Atoms

_MOVED = 1e-4  # Å; less is rounding of a file
_LARGEST_DISPLACEMENT = 0.5  # Å; an atom further from its site belongs to another structure


def phonons_from_forces(
    frames: Sequence[Atoms], settings: PhononSettings, base: Path | None = None, *, displaced_atoms: int | None = None
) -> Measured:
    """Phonons of displaced supercells with forces, by symmetry-adapted least squares (symfc).

    The lattice constant of the settings' structure must be that of the frames; nothing is relaxed.

    Args:
        frames: supercells with forces, of the structure and supercell of `settings`, at any origin and in any order of
            atoms.
        settings: structure, supercell, points and mesh.
        base: folder that relative paths start from.
        displaced_atoms: take only frames with so many displaced atoms; 1 is a classical set of finite displacements,
            2 one of third-order force constants, whose pairs carry more anharmonicity.

    Raises:
        PropertyFailure: a frame is no displaced form of the supercell, no frame is left, or imaginary modes.
    """
    phonon = phonopy_of(atoms_of(settings.structure, base), settings)
    found = [_displacements(frame, phonon.supercell) for frame in frames]
    if displaced_atoms is not None:
        found = [pair for pair in found if _moved(pair[0]) == displaced_atoms]
    if not found:
        raise PropertyFailure(f"found no frame with {displaced_atoms} displaced atoms among {len(frames)}")
    displacements, forces = (np.array(parts, dtype=np.float64) for parts in zip(*found, strict=True))
    phonon.dataset = {"displacements": displacements, "forces": forces}
    phonon.produce_force_constants(fc_calculator="symfc")
    return spectrum(phonon, settings)


def _moved(displacements: Floats) -> int:
    return int((np.linalg.norm(displacements, axis=1) > _MOVED).sum())


def _displacements(frame: Atoms, supercell: Any) -> tuple[Floats, Floats]:
    """Displacements and forces of a frame, both of shape (atoms, 3), in the order of the supercell's atoms."""
    atoms = len(frame)
    if atoms != len(supercell) or not np.allclose(frame.cell.array, supercell.cell, atol=1e-3):
        raise PropertyFailure(f"a frame of {atoms} atoms is not the supercell of {len(supercell)} atoms")
    same = np.flatnonzero(np.array(supercell.numbers) == frame.numbers[0])
    origins = supercell.positions[same] - frame.positions[0]
    place, moved = min((_assigned(frame, supercell, origin) for origin in origins), key=lambda pair: _extent(pair[1]))
    if len(set(place.tolist())) < atoms or _extent(moved) > _LARGEST_DISPLACEMENT:
        raise PropertyFailure(f"a frame has atoms further than {_LARGEST_DISPLACEMENT:g} Å from the supercell's sites")
    # A shift of all atoms does nothing; the median finds it where a single atom moved as well as where all did.
    return moved - np.median(moved, axis=0), np.array(frame.get_forces(), dtype=np.float64)[place]


def _assigned(frame: Atoms, supercell: Any, origin: Floats) -> tuple[np.ndarray, Floats]:
    """Index of the frame's nearest atom of the same kind for every site, and its displacement from there, Å."""
    shifts = (frame.get_scaled_positions() + origin @ np.linalg.inv(supercell.cell))[None]
    between = shifts - supercell.scaled_positions[:, None]
    vectors = (between - np.round(between)) @ supercell.cell
    lengths = np.linalg.norm(vectors, axis=2)
    lengths[np.array(supercell.numbers)[:, None] != frame.numbers[None]] = np.inf
    place = lengths.argmin(axis=1)
    return place, np.array(vectors[np.arange(len(place)), place], dtype=np.float64)


def _extent(displacements: Floats) -> float:
    return float(np.linalg.norm(displacements, axis=1).max())
