"""Which atoms are bonded, and which have come too close, by covalent radii."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from ase import Atoms

_BONDED = 1.25  # times the sum of covalent radii


def bonds(atoms: Atoms) -> dict[tuple[int, int], float]:
    """Length in Å of every bond by its pair of atoms, the lower index first; the shortest of several images."""
    from ase.neighborlist import neighbor_list

    first, second, lengths = neighbor_list("ijd", atoms, _radii(atoms, _BONDED))
    found: dict[tuple[int, int], float] = {}
    for i, j, length in zip(first.tolist(), second.tolist(), lengths.tolist(), strict=True):
        if i < j:
            found[i, j] = min(length, found.get((i, j), np.inf))
    return found


def collapsed(atoms: Atoms, factor: float) -> bool:
    """Whether two atoms are closer than `factor` times the sum of their covalent radii."""
    from ase.neighborlist import neighbor_list

    return factor > 0 and len(neighbor_list("i", atoms, _radii(atoms, factor))) > 0


def _radii(atoms: Atoms, factor: float) -> list[float]:
    """Radii whose sum is the cutoff of a pair, Å."""
    from ase.data import covalent_radii

    return [float(radius) for radius in factor * covalent_radii[atoms.numbers]]
