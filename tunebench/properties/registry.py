"""All properties by name: their settings, what computes them, and what they promise to hand back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from tunebench.properties import coexistence, crystals, dynamics, interface, liquids, molecules, phonons
from tunebench.properties.measured import Measured
from tunebench.study.errors import RunError
from tunebench.study.spec import Section

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator


class PropertyName(StrEnum):
    """Names of properties, as the key ``property`` of their settings has them."""

    EQUATION_OF_STATE = "equation_of_state"
    ELASTIC = "elastic"
    PHONONS = "phonons"
    VIBRATIONS = "vibrations"
    TORSION = "torsion"
    ENERGY_DRIFT = "energy_drift"
    TIME_TO_FAILURE = "time_to_failure"
    LIQUID = "liquid"
    INTERFACE = "interface"


@dataclass(frozen=True, kw_only=True)
class Property:
    """A property.

    Attributes:
        settings: model of its settings.
        measure: computes it from a calculator, settings and the folder that relative paths start from.
        units: unit of every scalar by name, from the settings: what a failed property has failed to give.
        curves: unit of the values of every curve that is compared with the reference's; curves over time, which two
            potentials that differ in the last digit do not share, are not.
    """

    settings: type[Section]
    measure: Callable[[Calculator, Any, Path | None], Measured]
    units: Callable[[Any, Path | None], Mapping[str, str]]
    curves: Mapping[str, str]


PROPERTIES: Mapping[PropertyName, Property] = {
    PropertyName.EQUATION_OF_STATE: Property(
        settings=crystals.EquationOfStateSettings,
        measure=crystals.equation_of_state,
        units=lambda settings, base: crystals.EQUATION_OF_STATE_UNITS,
        curves={"energy_of_volume": "eV/atom"},
    ),
    PropertyName.ELASTIC: Property(
        settings=crystals.ElasticSettings,
        measure=crystals.elastic,
        units=lambda settings, base: crystals.elastic_units(settings),
        curves={},
    ),
    PropertyName.PHONONS: Property(
        settings=phonons.PhononSettings,
        measure=phonons.phonons,
        units=phonons.phonon_units,
        curves={"bands": "THz", "density_of_states": "states/THz/cell"},
    ),
    PropertyName.VIBRATIONS: Property(
        settings=molecules.VibrationSettings,
        measure=molecules.vibrations,
        units=molecules.vibration_units,
        curves={},
    ),
    PropertyName.TORSION: Property(
        settings=molecules.TorsionSettings,
        measure=molecules.torsion,
        units=lambda settings, base: molecules.TORSION_UNITS,
        curves={"energy": "meV"},
    ),
    PropertyName.ENERGY_DRIFT: Property(
        settings=dynamics.DriftSettings,
        measure=dynamics.energy_drift,
        units=lambda settings, base: dynamics.DRIFT_UNITS,
        curves={},
    ),
    PropertyName.TIME_TO_FAILURE: Property(
        settings=dynamics.FailureTimeSettings,
        measure=dynamics.time_to_failure,
        units=lambda settings, base: dynamics.FAILURE_TIME_UNITS,
        curves={},
    ),
    PropertyName.LIQUID: Property(
        settings=liquids.LiquidSettings,
        measure=liquids.liquid,
        units=lambda settings, base: liquids.LIQUID_UNITS,
        curves={"radial_distribution": "1", "mean_square_displacement": "Å²"},
    ),
    PropertyName.INTERFACE: Property(
        settings=coexistence.InterfaceSettings,
        measure=interface.interface,
        units=lambda settings, base: interface.INTERFACE_UNITS,
        curves={"order_profile": "1", "density_profile": "atoms/Å³"},
    ),
}

AnySettings = Annotated[
    crystals.EquationOfStateSettings
    | crystals.ElasticSettings
    | phonons.PhononSettings
    | molecules.VibrationSettings
    | molecules.TorsionSettings
    | dynamics.DriftSettings
    | dynamics.FailureTimeSettings
    | liquids.LiquidSettings
    | coexistence.InterfaceSettings,
    Field(discriminator="property"),
]


def check_installed() -> None:
    """Raises RunError where a library of the extra `properties` is missing, which is no failure of a model."""
    if missing := missing_libraries():
        allowed = "what pip install 'tunebench[properties]' installs"
        raise RunError(f"properties: found no {' and no '.join(missing)}, allowed: {allowed}")


def missing_libraries() -> list[str]:
    """Libraries of the extra `properties` that are not installed."""
    return [name for name in ("matcalc", "phonopy") if find_spec(name) is None]


def property_of(settings: AnySettings) -> Property:
    """The property that settings are of."""
    return PROPERTIES[PropertyName(settings.property)]
