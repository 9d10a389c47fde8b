"""Cells that give way to stress while Langevin dynamics goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from tunebench.properties.measured import PropertyFailure

if TYPE_CHECKING:
    from ase import Atoms

_LARGEST_STRAIN = 0.01  # of one correction; more is a stress that no relaxation of the cell should follow


class Barostat:
    """Scales a cell towards zero pressure by Berendsen's weak coupling (J. Chem. Phys. 81, 3684, 1984).

    Attached to a dynamics of ASE it scales after every so many steps; ASE's own barostats come with thermostats that
    scale all velocities alike, which would carry the heat of a moving front through the whole cell.

    Args:
        atoms: what moves; stress must be had from its calculator.
        axes: ``all`` scales the three edges alike by the mean pressure, ``z`` the third by its own.
        every_fs: time between two corrections.
        relaxation_fs: time in which a stress decays.
        bulk_modulus_gpa: how stiff the material is, roughly.
    """

    def __init__(
        self,
        atoms: Atoms,
        axes: Literal["all", "z"],
        *,
        every_fs: float,
        relaxation_fs: float,
        bulk_modulus_gpa: float,
    ) -> None:
        from ase.units import GPa

        self._atoms, self._axes = atoms, axes
        self._strain_per_stress = every_fs / relaxation_fs / (bulk_modulus_gpa * GPa) / (3.0 if axes == "all" else 1.0)

    def __call__(self) -> None:
        """Make one correction."""
        stress = self._atoms.get_stress(include_ideal_gas=True)[:3]  # ASE's sign: positive under tension
        chosen = np.full(3, stress.mean()) if self._axes == "all" else np.array([0.0, 0.0, stress[2]])
        strain = -self._strain_per_stress * chosen
        if not np.isfinite(strain).all():
            raise PropertyFailure("the stress is not finite")
        scale = 1.0 + np.clip(strain, -_LARGEST_STRAIN, _LARGEST_STRAIN)
        self._atoms.set_cell(self._atoms.cell.array * scale[None], scale_atoms=True)
