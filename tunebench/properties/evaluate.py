"""From a calculator, a plan and a reference to rows; a failure costs its own property and no other."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tunebench.properties.calculators import calculator_named
from tunebench.properties.measured import Curve, Measured, PropertyFailure, Value
from tunebench.properties.phonons import PhononSettings
from tunebench.properties.phonons_from_forces import phonons_from_forces
from tunebench.properties.plan import PropertyPlan, Reference, settings_hash
from tunebench.properties.registry import AnySettings, check_installed, property_of
from tunebench.properties.rows import PropertyRow
from tunebench.properties.stated import stated_values
from tunebench.study.paths import existing_file
from tunebench.workloads.errors import WorkloadError

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

_log = logging.getLogger(__name__)

Outcome = Measured | PropertyFailure
"""What became of a property."""

_LONGEST_REASON = 300


def evaluate(
    calculator: Calculator,
    plan: PropertyPlan,
    references: Mapping[str, Outcome],
    *,
    model: str,
    base: Path | None = None,
) -> tuple[PropertyRow, ...]:
    """All properties of a plan for one model, compared with references that `references_of` made once for all models.

    Args:
        calculator: the model.
        plan: properties and settings.
        references: outcome of the reference by entry; an entry without one has values and no errors.
        model: how the rows name it.
        base: folder that the plan's relative paths start from.

    Returns:
        A row for every scalar the plan's properties promise, failed or not, and for every curve with a reference.

    Raises:
        WorkloadError: a structure of the plan cannot be had.
    """
    outcomes = measure(calculator, plan, base)
    return tuple(
        row
        for entry, settings in plan.properties.items()
        for row in compare(entry, settings, outcomes[entry], references.get(entry), model=model, base=base)
    )


def measure(calculator: Calculator, plan: PropertyPlan, base: Path | None = None) -> dict[str, Outcome]:
    """Outcome of every entry of a plan, curves included; whatever a property raises is its failure.

    Raises:
        RunError: matcalc or phonopy is not installed.
        WorkloadError: a structure of the plan cannot be had.
    """
    check_installed()
    for settings in plan.properties.values():
        settings_hash(settings, base)  # what the plan itself lacks is no failure of the model
    return {entry: measure_one(calculator, settings, base) for entry, settings in plan.properties.items()}


def measure_one(calculator: Calculator, settings: AnySettings, base: Path | None = None) -> Outcome:
    """Outcome of one property; never raises for what the calculator does."""
    kind = property_of(settings)
    try:
        measured = kind.measure(calculator, settings, base)
        _check_finite(measured)
        _check_promise(measured, kind.units(settings, base))
    except PropertyFailure as failure:
        return failure
    except Exception as error:  # a model may break any library below in any way, which must not cost the others
        _log.info("%s", settings.property, exc_info=True)  # the row has the reason
        return PropertyFailure(" ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON])
    return measured


def references_of(plan: PropertyPlan, base: Path | None = None, device: str = "cpu") -> dict[str, Outcome]:
    """The reference's outcome for every entry that has one: what is stated, else forces, else the calculator.

    Raises:
        RunError: the reference's calculator cannot be had.
        WorkloadError: a structure or a file cannot be had.
    """
    reference = plan.reference
    calculator = calculator_named(reference.calculator, device, base) if reference.calculator else None
    found: dict[str, Outcome] = {}
    for entry, settings in plan.properties.items():
        if entry in reference.values or entry in reference.files:
            found[entry] = _stated(reference, entry, property_of(settings).units(settings, base), base)
        elif entry in reference.forces:
            assert isinstance(settings, PhononSettings)
            found[entry] = _from_forces(reference, entry, settings, base)
        elif calculator is not None:
            found[entry] = measure_one(calculator, settings, base)
    return found


def compare(
    entry: str,
    settings: AnySettings,
    outcome: Outcome,
    reference: Outcome | None,
    *,
    model: str,
    base: Path | None = None,
) -> list[PropertyRow]:
    """Rows of one entry; arguments as for `evaluate`."""
    kind = property_of(settings)
    units = dict(kind.units(settings, base))
    values: dict[str, Value | None] = {**outcome.values} if isinstance(outcome, Measured) else {}
    known = {**reference.values} if isinstance(reference, Measured) else {}
    if isinstance(reference, Measured):
        for name, unit in kind.curves.items():
            if name not in reference.curves:  # stated values have none
                continue
            quantity = f"{name}.rmse"
            units[quantity], known[quantity] = unit, Value(value=0.0, unit=unit)
            if isinstance(outcome, Measured):
                values[quantity] = _difference(outcome.curves[name], reference.curves[name])
    reason = str(outcome) if isinstance(outcome, PropertyFailure) else ""
    if not reason and isinstance(reference, PropertyFailure):
        reason = f"no reference: {reference}"
    of_entry = {
        "model": model,
        "entry": entry,
        "property": str(settings.property),
        "settings_hash": settings_hash(settings, base),
    }
    return [_row(of_entry, name, unit, values.get(name), known.get(name), reason) for name, unit in units.items()]


def _row(
    of_entry: Mapping[str, str], quantity: str, unit: str, value: Value | None, reference: Value | None, reason: str
) -> PropertyRow:
    return PropertyRow(
        **of_entry,
        quantity=quantity,
        unit=unit,
        value=value.value if value else None,
        standard_error=value.standard_error if value else None,
        reference=reference.value if reference else None,
        reference_standard_error=reference.standard_error if reference else None,
        error=value.value - reference.value if value and reference else None,
        failed=value is None,
        reason=reason or ("" if value else "its points are not those of the reference"),
    )


def _check_finite(measured: Measured) -> None:
    for name, value in measured.values.items():
        if not np.isfinite(value.value):
            raise PropertyFailure(f"{name} is {value.value}")
    for name, curve in measured.curves.items():
        if not (np.isfinite(curve.x).all() and np.isfinite(curve.y).all()):
            raise PropertyFailure(f"{name} has points that are not finite")


def _check_promise(measured: Measured, units: Mapping[str, str]) -> None:
    given = {name: value.unit for name, value in measured.values.items()}
    if given != dict(units):
        changed = ", ".join(sorted(given.keys() ^ units.keys())) or "units"
        raise PropertyFailure(f"the structure is another one after its relaxation: {changed} came or went")


def _difference(curve: Curve, reference: Curve) -> Value | None:
    """Root mean square difference; None where the curves do not lie on the same points.

    Points of a path between named marks are the same however long the path is in a crystal of another size.
    """
    named, of_reference = ([name for name, _ in one.marks] for one in (curve, reference))
    if curve.y.shape != reference.y.shape or named != of_reference:
        return None
    if not named and not np.allclose(curve.x, reference.x, rtol=1e-6, atol=1e-9):
        return None
    return Value(value=float(np.sqrt(np.mean(np.square(curve.y - reference.y)))), unit=curve.y_unit)


def _stated(reference: Reference, entry: str, units: Mapping[str, str], base: Path | None) -> Measured:
    values = stated_values(reference.files[entry], units, base) if entry in reference.files else {}
    values |= reference.values.get(entry, {})
    return Measured(values={name: Value(value=value, unit=units[name]) for name, value in values.items()})


def _has_forces(frame: Atoms) -> bool:
    return frame.calc is not None and frame.calc.results.get("forces") is not None


def _from_forces(reference: Reference, entry: str, settings: PhononSettings, base: Path | None) -> Outcome:
    from tunebench.workloads.structure_files import read_structures

    named = reference.forces[entry]
    key = f"reference.forces.{entry}.path"
    frames = read_structures(existing_file(named.path, base or Path.cwd()), key)
    bare = next((index for index, frame in enumerate(frames) if not _has_forces(frame)), None)
    if bare is not None:
        raise WorkloadError(key, f"{named.path} with no forces in frame {bare}", "frames with forces, eV/Å")
    try:
        return phonons_from_forces(frames, settings, base, displaced_atoms=named.displaced_atoms)
    except PropertyFailure as failure:
        return failure
