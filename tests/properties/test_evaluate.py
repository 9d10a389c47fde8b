from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT

from analysis.properties import failures, load_properties
from tests.properties.conftest import Altered
from tunebench.properties.evaluate import _difference, evaluate, measure, references_of
from tunebench.properties.measured import Curve, PropertyFailure
from tunebench.properties.plan import PropertyPlan, settings_hash
from tunebench.properties.registry import PROPERTIES, PropertyName
from tunebench.properties.rows import write_rows
from tunebench.workloads.errors import WorkloadError

COPPER = {"kind": "crystal", "formula": "Cu", "lattice": "fcc", "a_angstrom": 3.6}
MOVING = {"timestep_fs": 5.0, "sample_every_steps": 5, "equilibration_ps": 0.1}
CRYSTAL = {
    "eos": {"property": "equation_of_state", "structure": COPPER, "points": 5},
    "elastic": {"property": "elastic", "structure": COPPER, "relax_ions": False},
    "phonons": {"property": "phonons", "structure": COPPER, "supercell": (2, 2, 2), "mesh": (6, 6, 6)},
}
DYNAMICS = {
    "drift": {"property": "energy_drift", "structure": COPPER, "supercell": (2, 2, 2), "duration_ps": 0.3, **MOVING},
    "life": {
        "property": "time_to_failure",
        "structure": COPPER,
        "supercell": (2, 2, 2),
        "duration_ps": 0.2,
        **MOVING,
    },
    "melt": {
        "property": "liquid",
        "structure": {**COPPER, "a_angstrom": 3.8},
        "supercell": (2, 2, 2),
        "melt_kelvin": 4000.0,
        "melt_ps": 0.3,
        "temperature_kelvin": 2000.0,
        "duration_ps": 0.7,
        "blocks": 2,
        **MOVING,
    },
    "front": {
        "property": "interface",
        "structure": {**COPPER, "a_angstrom": 3.69},
        "supercell": (2, 2, 10),
        "temperature_kelvin": 1200.0,
        "melt_kelvin": 4500.0,
        "crystal_ps": 0.0,
        "melt_ps": 0.6,
        "duration_ps": 0.4,
        "order_cutoff_angstrom": 3.3,
        "blocks": 3,
        **MOVING,
    },
}


def plan_of(properties: dict, **reference: object) -> PropertyPlan:
    return PropertyPlan.model_validate({"properties": properties, "reference": reference})


def test_the_teacher_in_the_place_of_a_trained_model_has_no_errors(wrapped_teacher: Calculator):
    plan = plan_of({**CRYSTAL, **DYNAMICS}, calculator="emt")
    rows = evaluate(wrapped_teacher, plan, references_of(plan), model="teacher")
    assert [row for row in rows if row.failed or row.reason] == []
    for row in rows:
        assert row.error == pytest.approx(0.0, abs=1e-6), (row.entry, row.quantity)
    molecules = {PropertyName.VIBRATIONS, PropertyName.TORSION}
    assert {row.property for row in rows} == {str(name) for name in PROPERTIES.keys() - molecules}
    curves = {row.quantity for row in rows if row.quantity.endswith(".rmse")}
    assert {"bands.rmse", "radial_distribution.rmse", "density_profile.rmse"} <= curves


def test_a_failure_costs_its_own_property_and_is_counted():
    def broken(atoms, forces):
        if len(atoms) == 32:  # the supercell of the phonons
            raise RuntimeError("a kernel broke")
        return forces

    plan = plan_of(CRYSTAL)
    rows = evaluate(Altered(broken), plan, {}, model="broken")
    by_entry = {entry: [row for row in rows if row.entry == entry] for entry in CRYSTAL}
    assert all(row.failed and row.value is None and row.error is None for row in by_entry["phonons"])
    assert {row.reason for row in by_entry["phonons"]} == {"RuntimeError: a kernel broke"}
    assert not any(row.failed for entry in ("eos", "elastic") for row in by_entry[entry])
    whole = evaluate(EMT(), plan, {}, model="whole")
    assert [(row.entry, row.quantity, row.unit) for row in rows] == [(r.entry, r.quantity, r.unit) for r in whole]
    assert {found.entry: found.rate.failed for found in failures([*rows, *whole])} == {
        "eos": 0,
        "elastic": 0,
        "phonons": 1,
    }


def test_numbers_that_are_not_finite_are_failures():
    silent = Altered(lambda atoms, forces: np.full_like(forces, np.nan))
    outcomes = measure(silent, plan_of({**CRYSTAL, "drift": DYNAMICS["drift"]}))
    assert all(isinstance(outcome, PropertyFailure) for outcome in outcomes.values())
    assert "finite" in str(outcomes["drift"])


def test_an_element_that_the_model_does_not_know_is_a_failure_of_that_entry():
    silicon = {"kind": "crystal", "formula": "Si", "lattice": "diamond", "a_angstrom": 5.43}
    plan = plan_of({"si": {"property": "elastic", "structure": silicon}, "cu": CRYSTAL["elastic"]})
    rows = evaluate(EMT(), plan, {}, model="emt")
    assert {row.reason for row in rows if row.entry == "si"} == {"NotImplementedError: No EMT-potential for Si"}
    assert all(row.value is not None and row.reference is None for row in rows if row.entry == "cu")


def test_stated_values_come_before_the_calculator_and_have_errors_of_their_own():
    plan = plan_of({"elastic": CRYSTAL["elastic"]}, calculator="emt", values={"elastic": {"C11": 168.0}})
    rows = {row.quantity: row for row in evaluate(EMT(), plan, references_of(plan), model="emt")}
    assert rows["C11"].error == pytest.approx(172.6 - 168.0, abs=0.2)
    assert rows["C12"].reference is None
    assert rows["C12"].error is None
    assert rows["C12"].failed is False


def test_a_reference_that_fails_leaves_values_without_errors_and_says_so():
    plan = plan_of({"elastic": CRYSTAL["elastic"]})
    rows = evaluate(EMT(), plan, {"elastic": PropertyFailure("no convergence")}, model="emt")
    assert all(row.value is not None and row.error is None and not row.failed for row in rows)
    assert {row.reason for row in rows} == {"no reference: no convergence"}


def test_the_settings_hash_changes_with_any_setting_and_with_the_structure():
    changed = [{}, {"fmax_ev_per_angstrom": 1e-3}, {"structure": {**COPPER, "a_angstrom": 3.7}}]
    plans = [plan_of({"elastic": {**CRYSTAL["elastic"], **change}}) for change in changed]
    hashes = [settings_hash(plan.properties["elastic"]) for plan in plans]
    assert len(set(hashes)) == 3
    assert hashes[0] == settings_hash(plan_of(CRYSTAL).properties["elastic"])


@pytest.mark.parametrize("name", ["rows.parquet", "rows.json"])
def test_rows_come_back_from_their_file_as_they_were(tmp_path: Path, name: str):
    silicon = {"kind": "crystal", "formula": "Si", "lattice": "diamond", "a_angstrom": 5.43}
    entries = {"cu": CRYSTAL["elastic"], "si": {"property": "elastic", "structure": silicon}}
    plan = plan_of(entries, values={"cu": {"C11": 168.0}})
    rows = evaluate(EMT(), plan, references_of(plan), model="emt")
    assert {row.failed for row in rows} == {True, False}
    write_rows(tmp_path / name, rows)
    assert load_properties(tmp_path / name) == rows


@pytest.mark.parametrize(
    ("x", "marks", "expected"),
    [
        ((0.0, 1.0), (("Γ", 0.0), ("X", 1.0)), 1.0),
        ((0.0, 1.1), (("Γ", 0.0), ("X", 1.1)), 1.0),  # the path of a larger crystal
        ((0.0, 1.0), (("Γ", 0.0), ("L", 1.0)), None),
        ((0.0, 1.1), (), None),
    ],
)
def test_curves_are_compared_on_the_same_points_only(x, marks, expected):
    def curve(x, y, marks):
        return Curve(x=np.array(x), y=np.array(y), x_unit="", y_unit="THz", marks=marks)

    reference = curve((0.0, 1.0), (1.0, 2.0), (("Γ", 0.0), ("X", 1.0)) if marks else ())
    found = _difference(curve(x, (2.0, 3.0), marks), reference)
    assert (found and found.value) == expected


def test_a_file_of_forces_that_has_none_is_bad_input_and_no_failed_property(tmp_path: Path):
    bulk("Cu", cubic=True).repeat((2, 2, 2)).write(tmp_path / "bare.xyz")
    forces = {"forces": {"phonons": {"path": "bare.xyz"}}}
    plan = PropertyPlan.model_validate({"properties": {"phonons": CRYSTAL["phonons"]}, "reference": forces})
    with pytest.raises(WorkloadError, match=r"reference\.forces\.phonons\.path: found 'bare\.xyz with no forces in"):
        references_of(plan, tmp_path)
