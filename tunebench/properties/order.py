"""How crystalline an atom's surroundings are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tunebench.properties.measured import Floats

if TYPE_CHECKING:
    from ase import Atoms

_DEGREE = 6


def averaged_bond_order(atoms: Atoms, cutoff: float) -> Floats:
    """Averaged Steinhardt parameter q6 of every atom: about 0.5 in a hot fcc or bcc crystal, 0.2 to 0.3 in its melt.

    Lechner and Dellago, J. Chem. Phys. 129, 114707 (2008), eq. 6: the bond order is averaged over the atom and its
    neighbours before it is made invariant, which tells a crystal from its melt better than an atom's own.

    Args:
        atoms: a periodic structure.
        cutoff: end of the first neighbour shell, Å.

    Returns:
        Between 0 and 1, shape (atoms,); 0 for an atom whose neighbourhood is empty.
    """
    from ase.neighborlist import neighbor_list
    from scipy.special import sph_harm_y

    first, second, vectors = neighbor_list("ijD", atoms, cutoff)
    lengths = np.linalg.norm(vectors, axis=1)
    polar = np.arccos(np.clip(vectors[:, 2] / lengths, -1.0, 1.0))
    azimuth = np.arctan2(vectors[:, 1], vectors[:, 0])
    total = np.zeros(len(atoms), dtype=np.float64)
    neighbours = np.bincount(first, minlength=len(atoms))
    for order in range(-_DEGREE, _DEGREE + 1):
        harmonics = sph_harm_y(_DEGREE, order, polar, azimuth)
        own = _summed(harmonics, first, len(atoms)) / np.maximum(neighbours, 1)
        around = own + _summed(own[second], first, len(atoms))
        total += np.square(np.abs(around / (neighbours + 1)))
    return np.sqrt(4.0 * np.pi / (2 * _DEGREE + 1) * total)


def _summed(values: np.ndarray, places: np.ndarray, size: int) -> np.ndarray:
    real, imaginary = (np.bincount(places, part, minlength=size) for part in (values.real, values.imag))
    return np.asarray(real + 1j * imaginary)
