"""The files of a model's properties: written entry by entry, never computed twice, failures in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT

from analysis.properties import failures, load_properties
from tests.properties.conftest import Altered
from tunebench.properties.measured import Measured, PropertyFailure
from tunebench.properties.model_record import (
    ModelRecord,
    curves_file,
    fail_model,
    has_reference,
    make_reference,
    measure_model,
    read_reference,
    rows_file,
)
from tunebench.properties.of_study import Measurement
from tunebench.properties.plan import PropertyPlan
from tunebench.study.errors import RunError

COPPER = {"kind": "crystal", "formula": "Cu", "lattice": "fcc", "a_angstrom": 3.6}
ENTRIES = {
    "eos": {"property": "equation_of_state", "structure": COPPER, "points": 5},
    "elastic": {"property": "elastic", "structure": COPPER, "relax_ions": False},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its reference made."""
    folder = tmp_path_factory.mktemp("run")
    make_reference(folder, measured())
    return folder


def measured(**changes: Any) -> Measurement:
    content = {"properties": {**ENTRIES, **changes}, "reference": {"calculator": "emt"}}
    return Measurement(section=0, plan=PropertyPlan.model_validate(content))


def test_a_reference_reads_back_as_it_was_made_and_counts_once_it_is_whole(run: Path, tmp_path: Path) -> None:
    found = read_reference(run, 0)
    assert isinstance(found["eos"], Measured)
    make_reference(tmp_path, measured())
    assert (tmp_path / "properties" / "reference-0.json").read_bytes() == (
        run / "properties" / "reference-0.json"
    ).read_bytes()
    assert has_reference(run, 0)
    assert not has_reference(run, 1)
    assert found["eos"].curves["energy_of_volume"].y.dtype == np.float64


def test_the_teacher_in_place_of_the_model_has_no_errors_and_its_curves_are_the_reference_s(run: Path) -> None:
    measure_model(run, "teacher", [measured()], EMT)
    rows = load_properties(rows_file(run, "teacher"))
    assert {row.entry for row in rows} == set(ENTRIES)
    assert max(abs(row.error) for row in rows if row.error is not None) < 1e-6
    import pyarrow.parquet as pq

    own, reference = (pq.read_table(curves_file(run, name)).to_pylist() for name in ("teacher", "reference-0"))
    assert [point["y"] for point in own] == pytest.approx([point["y"] for point in reference])


def test_a_kill_costs_the_entry_it_interrupts_and_no_other(run: Path) -> None:
    begun: list[str] = []

    def killed(entry: str) -> None:
        begun.append(entry)
        if entry == "elastic":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure_model(run, "killed", [measured()], EMT, killed)
    assert ModelRecord(run, "killed").entries == {"eos"}
    measure_model(run, "killed", [measured()], EMT, begun.append)
    measure_model(run, "killed", [measured()], EMT, begun.append)
    assert begun == ["eos", "elastic", "elastic"]
    whole, other = (load_properties(rows_file(run, name)) for name in ("killed", "teacher"))
    assert [(row.quantity, row.value) for row in whole] == [(row.quantity, row.value) for row in other]


def test_a_model_that_cannot_be_opened_fails_in_every_entry(run: Path) -> None:
    def broken() -> Calculator:
        raise RunError("final.ckpt: found nothing")

    measure_model(run, "broken", [measured()], broken)
    found = failures(load_properties(rows_file(run, "broken")))
    assert {each.entry: each.reasons for each in found} == {
        entry: {"broken": "final.ckpt: found nothing"} for entry in ENTRIES
    }


def test_a_process_that_dies_again_and_again_fails_what_is_left(run: Path) -> None:
    alone = Measurement(section=0, plan=PropertyPlan.model_validate({"properties": {"eos": ENTRIES["eos"]}}))
    measure_model(run, "dying", [alone], EMT)
    fail_model(run, "dying", [measured()], "its process ended")
    rows = load_properties(rows_file(run, "dying"))
    assert {row.entry: (row.failed, row.reason) for row in rows} == {
        "eos": (False, ""),
        "elastic": (True, "its process ended"),
    }


def test_a_failure_of_one_property_is_its_own(run: Path) -> None:
    """Forces that no strain changes make a tensor without stiffness in nothing but `elastic`."""
    broken = Altered(lambda atoms, forces: forces + 1.0)
    soon = measured(**{name: {**entry, "max_steps": 20} for name, entry in ENTRIES.items()})
    measure_model(run, "pushed", [soon], lambda: broken)
    failed = {row.entry: row.failed for row in load_properties(rows_file(run, "pushed"))}
    assert failed["eos"] or failed["elastic"]
    assert set(failed) == set(ENTRIES)


def test_a_damaged_file_is_computed_again(run: Path) -> None:
    rows_file(run, "damaged").write_bytes(b"PAR1")
    measure_model(run, "damaged", [measured()], EMT)
    assert len(load_properties(rows_file(run, "damaged"))) == len(load_properties(rows_file(run, "teacher")))


def test_a_damaged_reference_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "properties").mkdir()
    (tmp_path / "properties" / "reference-0.json").write_text("{")
    with pytest.raises(RunError, match=r"reference-0\.json: found .*allowed: what this run wrote"):
        read_reference(tmp_path, 0)


def test_a_reference_that_fails_leaves_values_without_errors(tmp_path: Path) -> None:
    plan = measured(eos={**ENTRIES["eos"], "max_steps": 1, "structure": {**COPPER, "a_angstrom": 3.2}})
    make_reference(tmp_path, plan)
    assert isinstance(read_reference(tmp_path, 0)["eos"], PropertyFailure)
    measure_model(tmp_path, "model", [measured()], EMT)
    rows = load_properties(rows_file(tmp_path, "model"))
    assert all(row.error is None and row.reason.startswith("no reference") for row in rows if row.entry == "eos")
