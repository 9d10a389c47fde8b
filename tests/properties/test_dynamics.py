from __future__ import annotations

import pickle

import numpy as np
import pytest
from ase import units
from ase.calculators.emt import EMT

from tests.properties.conftest import Altered
from tunebench.properties.blocks import line_through
from tunebench.properties.dynamics import (
    DriftSettings,
    Exploded,
    FailureTimeSettings,
    Limits,
    energy_drift,
    time_to_failure,
)
from tunebench.properties.measured import Measured, PropertyFailure
from tunebench.properties.structures import BuiltCrystal, NamedMolecule


def drift_settings(copper: BuiltCrystal, **changes: object) -> DriftSettings:
    short = {"timestep_fs": 5.0, "equilibration_ps": 0.1, "duration_ps": 0.5, "sample_every_steps": 5, "blocks": 4}
    return DriftSettings(structure=copper, supercell=(2, 2, 2), **{**short, **changes})


@pytest.fixture(scope="module")
def conserved(copper: BuiltCrystal) -> Measured:
    return energy_drift(EMT(), drift_settings(copper))


def test_forces_that_are_a_gradient_conserve_energy(conserved: Measured):
    drift = conserved.values["drift"]
    assert abs(drift.value) < 0.5
    assert drift.standard_error is not None
    assert 100 < conserved.values["temperature"].value < 600


def test_the_same_seed_gives_the_same_numbers_and_another_one_does_not(copper: BuiltCrystal, conserved: Measured):
    assert energy_drift(EMT(), drift_settings(copper)).values == conserved.values
    other = energy_drift(EMT(), drift_settings(copper, seed=1, equilibration_ps=0.0, duration_ps=0.1)).values
    same = energy_drift(EMT(), drift_settings(copper, equilibration_ps=0.0, duration_ps=0.1)).values
    assert other != same


def test_forces_along_the_velocity_heat_the_system_at_their_rate(copper: BuiltCrystal):
    rate = 0.4  # 1/ps; the work of a force rate * momentum is twice the kinetic energy times the rate
    pushed = Altered(lambda atoms, forces: forces + rate / (1000.0 * units.fs) * atoms.get_momenta())
    found = energy_drift(pushed, drift_settings(copper)).values
    kinetic = 1000.0 * 1.5 * units.kB * found["temperature"].value * 31 / 32  # meV/atom
    assert found["drift"].value == pytest.approx(2 * rate * kinetic, rel=0.3)


def test_the_slope_of_a_noisy_series_has_an_error_that_covers_it():
    generator, missed = np.random.default_rng(0), 0
    times = np.linspace(0.0, 1.0, 200)
    for _ in range(200):
        noise = np.convolve(generator.normal(size=219), np.ones(20) / 20, mode="valid")  # correlated
        line = line_through(times, 2.0 * times + noise, 8)
        missed += abs(line.slope - 2.0) > 2.5 * line.standard_error
    assert missed < 30  # 2.5 standard errors with 6 degrees of freedom: 5 %
    with pytest.raises(PropertyFailure, match="3 samples are too few for 8 blocks"):
        line_through(times[:3], times[:3], 8)


def test_a_crystal_lasts_and_a_step_that_is_too_long_ends_it(copper: BuiltCrystal):
    settings = FailureTimeSettings(structure=copper, supercell=(2, 2, 2), timestep_fs=5.0, duration_ps=0.2)
    lasted = time_to_failure(EMT(), settings).values
    assert (lasted["time"].value, lasted["survived"].value) == (0.2, 1.0)
    ended = time_to_failure(EMT(), settings.model_copy(update={"timestep_fs": 80.0, "duration_ps": 40.0})).values
    assert ended["survived"].value == 0.0
    assert 0 < ended["time"].value < 40


def test_an_error_of_the_program_is_no_time_to_failure(copper: BuiltCrystal):
    steps = iter(range(1000))

    def out_of_memory(atoms, forces):
        if next(steps) > 5:
            raise MemoryError("no room")
        return forces

    settings = FailureTimeSettings(structure=copper, supercell=(2, 2, 2), timestep_fs=5.0, duration_ps=0.1)
    with pytest.raises(MemoryError):
        time_to_failure(Altered(out_of_memory), settings)


def test_a_simulation_shorter_than_a_sample_is_simulated_to_its_end(copper: BuiltCrystal):
    steps: list[int] = []
    counted = Altered(lambda atoms, forces: (steps.append(1), forces)[1])
    settings = FailureTimeSettings(structure=copper, timestep_fs=5.0, duration_ps=0.015, sample_every_steps=100)
    assert time_to_failure(counted, settings).values["survived"].value == 1.0
    assert len(steps) >= 3


@pytest.mark.parametrize(
    ("limits", "change", "reason"),
    [
        ({"shortest_distance_factor": 1.2}, 0.0, "atoms closer than 1.2 times their covalent radii"),
        ({"temperature_factor": 1.1}, 40.0, r"temperature .* K, allowed: 600 K"),
        ({"potential_energy_ev_per_atom": 0.001}, 0.0, r"potential energy moved by 0\.\d+ eV/atom"),
        ({}, np.nan, "numbers that are not finite"),
    ],
)
def test_every_limit_ends_a_simulation_with_its_reason(copper: BuiltCrystal, limits: dict, change: float, reason: str):
    pushed = Altered(lambda atoms, forces: forces + change * np.where(np.arange(len(atoms)) % 2, 1.0, -1.0)[:, None])
    settings = drift_settings(copper, limits=Limits(**limits))
    with pytest.raises(Exploded, match=f"{reason} after [0-9.]+ ps") as caught:
        energy_drift(pushed, settings)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_bond_that_breaks_ends_a_molecule():
    torn = Altered(lambda atoms, forces: 8.0 * (atoms.positions - atoms.positions.mean(axis=0)))
    molecule = NamedMolecule(kind="molecule", name="CO")
    limits = Limits(longest_bond_factor=1.3, temperature_factor=1e6)
    settings = DriftSettings(structure=molecule, limits=limits, sample_every_steps=1)
    with pytest.raises(Exploded, match=r"bond O0-C1 stretched 1\.[34]\d* times"):
        energy_drift(torn, settings)
