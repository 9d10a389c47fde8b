# mypy: allow-untyped-calls
"""One Langevin trajectory and its snapshots, labelled by GFN2-xTB.

`python -m tunebench.workloads.trajectory FILE` reads a request in JSON on standard input and writes the snapshots to
FILE; `tunebench.workloads.xtb` runs it once for each split.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.build import molecule
from ase.constraints import FixCom
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary
from ase.optimize import FIRE
from tblite.ase import TBLite

from tunebench.study.seeds import named_seed
from tunebench.study.spec import WATER_BOX, XtbData
from tunebench.workloads.molecules import MOLECULES
from tunebench.workloads.structure_files import labelled_atoms, write_frames

# Relaxation time 50 fs: five of them fit into the default equilibration, so snapshots have the temperature asked.
FRICTION_PER_FS = 0.02
# tblite's SCF tolerance in units of its default. Labels are recomputed from scratch with a tight one, because along a
# trajectory each SCF starts from the last step's charges, which makes the last digits depend on the path.
SAMPLING_ACCURACY = 1.0
LABEL_ACCURACY = 0.01
METHOD = "GFN2-xTB"
# tblite's periodic GFN2-xTB takes about twelve times as long as its GFN1-xTB (1.5 s against 0.12 s for eight molecules
# of water), so boxes are moved by the latter. The labels are GFN2-xTB everywhere.
PERIODIC_SAMPLING_METHOD = "GFN1-xTB"
WATER_RELAXATION_STEPS = 60
WATER_FORCE_TOLERANCE = 0.5  # eV/Å: enough to part molecules that the random orientations put too close
CUBIC_ANGSTROM_PER_CUBIC_CM = 1e24


def steps_of(data: XtbData) -> tuple[int, int]:
    """Time steps of the equilibration and between two snapshots, both rounded to the nearest."""
    return round(data.equilibration_fs / data.timestep_fs), round(data.interval_fs / data.timestep_fs)


def trajectory(
    data: XtbData, split: str, frames: int, kelvin: float, report: Callable[[int], None] | None = None
) -> list[Atoms]:
    """Snapshots of one Langevin trajectory, labelled by fresh GFN2-xTB calculations.

    Start, velocities and noise come from the seed named (data seed, ``xtb``, split), so a longer trajectory begins with
    the snapshots of a shorter one and no two splits share a trajectory. Molecules move on the GFN2-xTB surface, water
    boxes on that of GFN1-xTB.

    Args:
        data: system, time step, equilibration and interval, free of `xtb_checks.xtb_problems`.
        split: name of the split, for the seed.
        frames: snapshots wanted.
        kelvin: temperature of the thermostat.
        report: called with the number of snapshots made so far.

    Returns:
        Frames with energy (eV), forces (eV/Å) and, where periodic, stress (eV/Å³, positive under tension).
    """
    rng = np.random.default_rng(named_seed(data.seed, "xtb", split))
    atoms = _start(data, rng)
    MaxwellBoltzmannDistribution(atoms, temperature_K=kelvin, rng=rng)
    Stationary(atoms)
    atoms.set_constraint(FixCom())
    dynamics = Langevin(
        atoms,
        data.timestep_fs * units.fs,
        temperature_K=kelvin,
        friction=FRICTION_PER_FS / units.fs,
        fixcm=False,
        rng=rng,
    )
    equilibration, interval = steps_of(data)
    dynamics.run(equilibration)
    snapshots = []
    for made in range(1, frames + 1):
        dynamics.run(interval)
        snapshots.append(_labelled(atoms))
        if report is not None:
            report(made)
    return snapshots


def water_box(molecules: int, density_g_cm3: float, rng: np.random.Generator) -> Atoms:
    """A cubic periodic box of water molecules at a density, on a simple cubic lattice with random orientations.

    Args:
        molecules: number of molecules.
        density_g_cm3: mass density, g/cm³.
        rng: draws the occupied lattice sites and the orientations, uniform over rotations (Shoemake 1992).

    Returns:
        Unrelaxed structure of 3 * molecules atoms, Å.
    """
    water = molecule("H2O")
    mass_g = molecules * water.get_masses().sum() * units._amu * 1e3
    side = float(np.cbrt(mass_g / density_g_cm3 * CUBIC_ANGSTROM_PER_CUBIC_CM))
    per_edge = int(np.ceil(np.cbrt(molecules) - 1e-9))
    grid = np.stack(np.meshgrid(*[np.arange(per_edge)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    sites = grid[np.sort(rng.permutation(len(grid))[:molecules])] * (side / per_edge)
    centred = water.positions - water.get_center_of_mass()
    positions = np.concatenate([centred @ _rotation(rng).T + site for site in sites])
    return Atoms(numbers=np.tile(water.numbers, molecules), positions=positions, cell=[side] * 3, pbc=True)


def main() -> None:
    """Serve one request of `tunebench.workloads.xtb`; progress goes to standard output."""
    request = json.load(sys.stdin)
    data = XtbData.model_validate_json(json.dumps(request["data"]))
    split, frames = request["split"], request["frames"]
    every = max(1, frames // 5)

    def report(made: int) -> None:
        if made % every == 0:
            print(f"{split}: {made}/{frames} snapshots", flush=True)

    write_frames(Path(sys.argv[1]), trajectory(data, split, frames, request["kelvin"], report))


def _start(data: XtbData, rng: np.random.Generator) -> Atoms:
    if data.system != WATER_BOX:
        atoms: Atoms = molecule(MOLECULES.get(data.system, data.system))
        atoms.calc = _calculator(METHOD, SAMPLING_ACCURACY)
        return atoms
    atoms = water_box(data.molecules, data.density_g_cm3, rng)
    atoms.calc = _calculator(PERIODIC_SAMPLING_METHOD, SAMPLING_ACCURACY)
    FIRE(atoms, logfile=None).run(fmax=WATER_FORCE_TOLERANCE, steps=WATER_RELAXATION_STEPS)
    return atoms


def _rotation(rng: np.random.Generator) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    w, x, y, z = (quaternion := rng.normal(size=4)) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ],
        dtype=np.float64,
    )


class _Moving(TBLite):
    """TBLite for atoms of which nothing but the positions changes.

    Before each of three results a step ASE compares every array of the atoms with the last ones, a fifth of a step of a
    small molecule.
    """

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What has changed since the last calculation."""
        if self.atoms is None:
            return list(super().check_state(atoms, tol))
        return [] if np.array_equal(self.atoms.positions, atoms.positions) else ["positions"]


def _calculator(method: str, accuracy: float) -> TBLite:
    return _Moving(method=method, accuracy=accuracy, verbosity=0)


def _labelled(atoms: Atoms) -> Atoms:
    fresh = Atoms(
        numbers=atoms.numbers,
        positions=atoms.positions,
        cell=atoms.cell,
        pbc=atoms.pbc,
        magmoms=atoms.get_initial_magnetic_moments(),
    )
    fresh.calc = _calculator(METHOD, LABEL_ACCURACY)
    stress = fresh.get_stress(voigt=True) if fresh.pbc.any() else None
    return labelled_atoms(fresh, energy=fresh.get_potential_energy(), forces=fresh.get_forces(), stress=stress)


if __name__ == "__main__":
    main()
