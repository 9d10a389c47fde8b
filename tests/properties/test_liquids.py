from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT

from tunebench.properties.liquids import LiquidSettings, liquid, mean_square_displacement, radial_distribution
from tunebench.properties.measured import PropertyFailure
from tunebench.properties.structures import BuiltCrystal, NamedMolecule, atoms_of


def test_independent_atoms_have_no_structure(copper: BuiltCrystal):
    generator = np.random.default_rng(0)
    gas = Atoms("Cu150Ni50", cell=[12.0, 12.0, 12.0], pbc=True)
    frames = generator.uniform(0.0, 12.0, (15, 200, 3))
    for pair in (None, ("Cu", "Ni")):
        settings = LiquidSettings(structure=copper, pair=pair, r_bin_angstrom=0.5)
        distances, density = radial_distribution(gas, frames, settings)
        assert density[distances > 2] == pytest.approx(np.ones((distances > 2).sum()), abs=0.1)


def test_a_crystal_has_its_shells(copper: BuiltCrystal):
    crystal = atoms_of(copper).repeat((3, 3, 3))
    settings = LiquidSettings(structure=copper)
    distances, density = radial_distribution(crystal, crystal.positions[None], settings)
    shells = 4 * np.pi * distances**2 * settings.r_bin_angstrom * density * 4 / 3.6**3
    near = distances < 3.0
    assert shells[near].sum() == pytest.approx(12, rel=0.01)
    assert distances[density.argmax()] == pytest.approx(3.6 / np.sqrt(2), abs=0.05)


def test_a_flight_goes_with_the_square_of_time_and_a_walk_with_time():
    steps = np.arange(50, dtype=np.float64)
    flight = np.broadcast_to(2.0 * steps[:, None, None], (50, 4, 3))
    assert mean_square_displacement(flight) == pytest.approx(3 * (2.0 * steps) ** 2)
    walk = np.random.default_rng(0).normal(0.0, 0.1, (400, 500, 3)).cumsum(axis=0)
    lags = mean_square_displacement(walk)
    assert lags[50] == pytest.approx(3 * 0.01 * 50, rel=0.05)


def test_molten_copper_flows_and_a_crystal_does_not(copper: BuiltCrystal):
    short = {"supercell": (2, 2, 2), "timestep_fs": 5.0, "sample_every_steps": 4, "duration_ps": 0.9, "blocks": 3}
    hot = LiquidSettings(
        structure=copper.model_copy(update={"a_angstrom": 3.8}),
        melt_kelvin=4000.0,
        melt_ps=0.4,
        temperature_kelvin=2500.0,
        equilibration_ps=0.2,
        **short,
    )
    crystal = LiquidSettings(structure=copper, temperature_kelvin=300.0, equilibration_ps=0.3, **short)
    melt, solid = (liquid(EMT(), settings) for settings in (hot, crystal))
    flow = melt.values["diffusion"]
    assert flow.value > 0.3
    assert 0 < (flow.standard_error or 0) < flow.value
    assert abs(solid.values["diffusion"].value) < 0.1
    assert solid.values["first_peak_height"].value > melt.values["first_peak_height"].value > 1.5
    assert solid.values["first_peak"].value == pytest.approx(3.6 / np.sqrt(2), abs=0.05)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"diffusing": "Ni"}, "no Ni in Cu"),
        ({"pair": ("Cu", "Ni")}, "no pairs of Cu and Ni in Cu"),
        ({"blocks": 50}, "samples are too few for 50 blocks"),
        ({"structure": NamedMolecule(kind="molecule", name="CO")}, "is not periodic"),
    ],
)
def test_what_has_no_such_liquid_fails_with_its_reason(copper: BuiltCrystal, changes: dict, reason: str):
    settings = LiquidSettings(structure=copper, equilibration_ps=0.0, duration_ps=0.2, sample_every_steps=2, blocks=3)
    with pytest.raises(PropertyFailure, match=reason):
        liquid(EMT(), settings.model_copy(update=changes))
