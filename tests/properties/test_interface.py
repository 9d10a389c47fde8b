from __future__ import annotations

import os

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT

from tunebench.properties.coexistence import InterfaceSettings
from tunebench.properties.interface import Look, follow, interface
from tunebench.properties.measured import PropertyFailure
from tunebench.properties.order import averaged_bond_order
from tunebench.properties.structures import BuiltCrystal

SOLID, MELT, LAYERS, SPACING, AREA = 0.5, 0.15, 40, 1.8, 100.0


def test_perfect_crystals_have_the_bond_order_of_their_lattice():
    # Steinhardt, Nelson and Ronchetti, Phys. Rev. B 28, 784 (1983), table I; averaging does nothing to equal atoms.
    assert averaged_bond_order(bulk("Cu", cubic=True).repeat(2), 3.1) == pytest.approx(np.full(32, 0.57452), abs=1e-5)
    assert averaged_bond_order(bulk("Fe", cubic=True).repeat(3), 3.2) == pytest.approx(np.full(54, 0.51069), abs=1e-5)
    assert averaged_bond_order(bulk("Cu", cubic=True).repeat(2), 1.0) == pytest.approx(np.zeros(32))


def moving_fronts(velocity: float, width: float, drift: float, samples: int) -> list[Look]:
    """Looks, 0.1 ps apart, at a slab of crystal whose two fronts move outwards at `velocity` Å/ps."""
    length, per_layer, looks = LAYERS * SPACING, 13, []
    places = np.repeat((np.arange(LAYERS) + 0.5) / LAYERS, per_layer) - 0.5
    noise = np.random.default_rng(0)
    for step in range(1, samples + 1):
        half = length / 4 + velocity * 0.1 * step
        x = places * length
        share = (np.tanh((x + half) / width) - np.tanh((x - half) / width)) / 2
        order = MELT + (SOLID - MELT) * share + noise.normal(0.0, 0.01, len(x))
        looks.append(Look(places=places + 0.31 + drift * step, order=order, length=length, area=AREA))
    return looks


@pytest.fixture
def settings(copper: BuiltCrystal) -> InterfaceSettings:
    return InterfaceSettings(
        structure=copper,
        supercell=(4, 4, 20),
        temperature_kelvin=1300.0,
        melt_kelvin=3000.0,
        timestep_fs=5.0,
        sample_every_steps=20,
        order_cutoff_angstrom=3.3,
    )


@pytest.mark.parametrize(("velocity", "width", "drift"), [(0.8, 3.0, 0.0), (-0.5, 5.0, 0.004), (0.0, 2.5, -0.03)])
def test_the_front_and_the_width_are_found_wherever_the_cell_drifts(
    settings: InterfaceSettings, velocity: float, width: float, drift: float
):
    found = follow(moving_fronts(velocity, width, drift, samples=100), settings).values
    assert found["front_velocity"].value == pytest.approx(100 * velocity, abs=2.0)
    assert found["width"].value == pytest.approx(2.197 * width, rel=0.1)
    assert found["solid_order"].value == pytest.approx(SOLID, abs=0.02)
    assert found["liquid_order"].value == pytest.approx(MELT, abs=0.02)
    assert found["solid_density"].value == pytest.approx(13 / SPACING / AREA, rel=0.01)


def test_a_front_is_followed_until_one_of_the_phases_is_used_up(settings: InterfaceSettings):
    found = follow(moving_fronts(-2.0, 2.5, 0.0, samples=150), settings)  # the last crystal is gone after 9 ps
    assert found.values["front_velocity"].value == pytest.approx(-200.0, abs=8.0)
    with pytest.raises(PropertyFailure, match=r"the crystal is used up after 0\.\d+ ps"):
        follow(moving_fronts(-21.0, 2.5, 0.0, samples=15), settings)
    with pytest.raises(PropertyFailure, match="7 samples are too few for 5 blocks"):
        follow(moving_fronts(0.0, 2.5, 0.0, samples=7), settings)


def test_a_cell_of_one_phase_has_no_interface(settings: InterfaceSettings):
    looks = moving_fronts(0.0, 2.5, 0.0, samples=20)
    melted = [Look(places=k.places, order=np.full_like(k.order, MELT), length=k.length, area=k.area) for k in looks]
    with pytest.raises(PropertyFailure, match=r"cannot be told apart: bond orders 0\.150 and 0\.150"):
        follow(melted, settings)


def test_a_half_that_does_not_melt_is_a_failed_property(settings: InterfaceSettings):
    cold = settings.model_copy(update={"supercell": (2, 2, 6), "melt_kelvin": 300.0, "melt_ps": 0.1, "crystal_ps": 0.1})
    with pytest.raises(PropertyFailure, match=r"the half did not melt at 300 K in 0\.1 ps: bond order"):
        interface(EMT(), cold)


@pytest.mark.skipif(not os.environ.get("TUNEBENCH_MELTING"), reason="takes minutes: TUNEBENCH_MELTING=1 runs it")
def test_copper_grows_below_its_melting_point_and_melts_above_it(settings: InterfaceSettings):
    # EMT's copper melts between 1300 and 1400 K (docs/properties.md), copper at 1358 K.
    slab = settings.model_copy(update={"supercell": (3, 3, 10), "melt_ps": 1.5, "duration_ps": 3.0, "blocks": 4})
    cold, hot = (interface(EMT(), slab.model_copy(update={"temperature_kelvin": t})) for t in (1000.0, 1700.0))
    assert cold.values["front_velocity"].value > 2 * cold.values["front_velocity"].standard_error
    assert hot.values["front_velocity"].value < -2 * hot.values["front_velocity"].standard_error
    for found in (cold.values, hot.values):
        assert found["solid_density"].value > found["liquid_density"].value
        assert 4.0 < found["width"].value < 15.0
