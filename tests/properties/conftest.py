from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from nequip.data import AtomicDataDict
from nequip.integrations.ase import NequIPCalculator
from nequip.utils.global_state import set_global_state

from tunebench.properties.structures import BuiltCrystal


@pytest.fixture(scope="session")
def copper() -> BuiltCrystal:
    """Copper near the lattice constant of EMT, 3.590 Å."""
    return BuiltCrystal(kind="crystal", formula="Cu", lattice="fcc", a_angstrom=3.6)


class TeacherModule(torch.nn.Module):
    """A teacher in the place of a trained network: NequIP's dictionaries in and out."""

    def __init__(self) -> None:
        super().__init__()
        self._teacher = EMT()  # kept, as the order of its neighbours decides the last digits of its sums

    def forward(self, data: AtomicDataDict.Type) -> AtomicDataDict.Type:
        cell = data[AtomicDataDict.CELL_KEY].reshape(3, 3).numpy()
        numbers = data[AtomicDataDict.ATOMIC_NUMBERS_KEY].reshape(-1).numpy()
        atoms = Atoms(numbers, positions=data[AtomicDataDict.POSITIONS_KEY].numpy(), cell=cell, pbc=True)
        atoms.calc = self._teacher
        return {
            AtomicDataDict.TOTAL_ENERGY_KEY: torch.tensor([[atoms.get_potential_energy()]]),
            AtomicDataDict.FORCE_KEY: torch.from_numpy(atoms.get_forces()),
            AtomicDataDict.STRESS_KEY: torch.from_numpy(atoms.get_stress(voigt=False)).reshape(1, 3, 3),
        }


@pytest.fixture(scope="session")
def wrapped_teacher() -> Calculator:
    """EMT behind NequIP's own ASE calculator, as a trained model is."""
    set_global_state()
    return NequIPCalculator(TeacherModule().eval(), device="cpu")


class Altered(Calculator):
    """EMT with its forces changed, which no energy belongs to any more."""

    implemented_properties = ("energy", "forces", "stress")

    def __init__(self, change: Callable[[Atoms, Any], Any]) -> None:
        super().__init__()
        self._change = change

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = None) -> None:
        super().calculate(atoms)
        judged = atoms.copy()
        judged.calc = EMT()
        self.results = {
            "energy": judged.get_potential_energy(),
            "forces": np.asarray(self._change(judged, judged.get_forces()), dtype=np.float64),
        }
        if judged.cell.rank == 3:
            self.results["stress"] = judged.get_stress()
