"""Relaxed structures, or the reason why there is none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tunebench.properties.measured import PropertyFailure

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

_LARGEST_STRETCH = 2.0  # a cell that doubles or halves an edge has left the structure that was asked for


def relaxed(atoms: Atoms, calculator: Calculator, *, fmax: float, max_steps: int, cell: bool) -> Atoms:
    """A relaxed copy of a structure with the calculator attached.

    The cell's own convergence is asked for as well: matcalc 0.7 looks at forces on atoms alone, which vanish by
    symmetry in many crystals however large the stress.

    Args:
        atoms: structure to start from; constraints are kept.
        calculator: potential.
        fmax: largest force that remains, and with `cell` the largest component of the generalised force on the cell
            (stress times volume), eV/Å and eV.
        max_steps: of the optimizer.
        cell: relax the cell too.

    Raises:
        PropertyFailure: not converged, not finite, or the cell has lost its shape.
    """
    from ase.filters import FrechetCellFilter
    from ase.optimize import BFGS, FIRE

    found: Atoms = atoms.copy()
    found.calc = calculator
    optimizer = FIRE(FrechetCellFilter(found), logfile=None) if cell else BFGS(found, logfile=None)
    try:
        converged = optimizer.run(fmax=fmax, steps=max_steps)
    except (np.linalg.LinAlgError, ValueError, FloatingPointError, ZeroDivisionError) as error:
        raise PropertyFailure(f"relaxation broke off after {optimizer.nsteps} steps: {error}") from error
    if not np.isfinite(found.positions).all() or not np.isfinite(found.get_potential_energy()):
        raise PropertyFailure(f"relaxation reached numbers that are not finite after {optimizer.nsteps} steps")
    if cell:
        stretch = found.cell.lengths() / atoms.cell.lengths()
        if not ((stretch < _LARGEST_STRETCH) & (stretch > 1 / _LARGEST_STRETCH)).all():
            raise PropertyFailure(f"relaxation stretched the cell by {_text(stretch)}")
    if not converged:
        left = float(np.linalg.norm(found.get_forces(), axis=1).max())
        raise PropertyFailure(f"no convergence to {fmax:g} eV/Å in {max_steps} steps; {left:.2g} eV/Å left on an atom")
    return found


def _text(numbers: np.ndarray) -> str:
    return ", ".join(f"{number:.3g}" for number in numbers)
