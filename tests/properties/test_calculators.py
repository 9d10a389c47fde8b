from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from tunebench.properties.calculators import calculator_named, calculator_of, teacher
from tunebench.study.errors import RunError
from tunebench.study.spec import Model
from tunebench.workloads.models import build_model, model_config
from tunebench.workloads.statistics import TrainingStatistics

FAMILIES = pytest.mark.parametrize("family", ["nequip", "allegro"])


def model(family: str) -> torch.nn.Module:
    statistics = TrainingStatistics(
        per_type_energy_shifts=(-3.0, -5.0),
        degenerate=False,
        force_rms=1.5,
        avg_num_neighbors=12.0,
        labelled_frames=1,
        note="",
    )
    pair = {"pair_potential": {"_target_": "nequip.nn.pair_potential.ZBL", "units": "metal"}}
    section = Model(family=family, r_max_angstrom=4.0, arguments=pair)
    return build_model(model_config(section, ("Cl", "Na"), statistics, seed=0)).eval()


def salt() -> Atoms:
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.positions += np.random.default_rng(0).normal(0.0, 0.1, (8, 3))
    return atoms


@FAMILIES
def test_forces_and_stress_are_the_slopes_of_the_energy_to_float64(family: str):
    atoms = salt()
    atoms.calc = calculator_of(model(family))
    forces, stress, step = atoms.get_forces(), atoms.get_stress(voigt=False), 1e-4

    def energy(shift: float = 0.0, shear: float = 0.0) -> float:
        moved = atoms.copy()
        moved.calc = atoms.calc
        moved.positions[3, 1] += shift
        moved.set_cell(atoms.cell.array @ (np.eye(3) + shear * np.eye(3, k=1)[:1].T @ np.eye(3)[:1]), scale_atoms=True)
        return float(moved.get_potential_energy())

    assert (energy(-step) - energy(step)) / (2 * step) == pytest.approx(forces[3, 1], abs=1e-6)
    sheared = (energy(shear=step) - energy(shear=-step)) / (2 * step) / atoms.get_volume()
    assert sheared == pytest.approx(stress[0, 1], abs=1e-7)


@FAMILIES
def test_float64_changes_the_arithmetic_and_neither_the_prediction_nor_the_model(family: str):
    trained, atoms = model(family), salt()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    made = calculator_of(trained)
    data = made.atoms_to_data(atoms)
    single = trained(data)["total_energy"].item()
    atoms.calc = made
    assert atoms.get_potential_energy() == pytest.approx(single, abs=2e-5)
    after = trained.state_dict()
    assert all(after[name].dtype == value.dtype and torch.equal(after[name], value) for name, value in before.items())


def test_positions_reach_the_model_in_float64_whatever_torchs_default_was():
    trained, default = model("nequip"), torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        data = calculator_of(trained).atoms_to_data(salt())
    finally:
        torch.set_default_dtype(default)
    assert data["pos"].dtype == torch.float64
    assert np.array_equal(data["pos"].numpy(), salt().positions)


def test_a_teacher_has_a_name_and_everything_else_must_be_a_model(tmp_path: Path):
    assert type(calculator_named("emt")) is type(teacher("emt"))
    with pytest.raises(
        RunError, match=r"emtt: found no model, allowed: emt, gfn2-xtb; did you mean emt\?, or an existing file"
    ):
        calculator_named("emtt")
    broken = tmp_path / "final.ckpt"
    broken.write_bytes(b"no checkpoint")
    with pytest.raises(RunError, match=r"final\.ckpt: found .*allowed: a model that NequIP can load"):
        calculator_named(str(broken))
