from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.properties import COLUMNS, failures, load_properties
from tunebench.properties.rows import PropertyRow, write_rows
from tunebench.study.errors import RunError

ROW = PropertyRow(
    model="cu.adamw.confirm.c000.s0",
    entry="cu-elastic",
    property="elastic",
    quantity="C11",
    value=170.0,
    standard_error=None,
    reference=168.0,
    reference_standard_error=None,
    error=2.0,
    unit="GPa",
    failed=False,
    reason="",
    settings_hash="0" * 64,
)
FAILED = replace(ROW, model="cu.muon.confirm.c000.s0", value=None, error=None, failed=True, reason="unstable")


def test_a_model_counts_once_an_entry_however_many_scalars_it_has():
    rows = [ROW, replace(ROW, quantity="C12"), FAILED, replace(FAILED, quantity="C12")]
    (found,) = failures(rows)
    assert (found.entry, found.rate.failed, found.rate.ended) == ("cu-elastic", 1, 2)
    assert found.reasons == {"cu.muon.confirm.c000.s0": "unstable"}


def test_whole_numbers_of_json_are_numbers(tmp_path: Path):
    file = tmp_path / "rows.json"
    write_rows(file, [ROW])
    file.write_text(file.read_text(encoding="utf-8").replace("170.0", "170"), encoding="utf-8")
    assert load_properties(file) == (ROW,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "high"}, "row 0: value: found 'high', allowed: float or nothing"),
        ({"model": None}, "row 0: model: found None, allowed: str"),
        ({"failed": 1}, "row 0: failed: found 1, allowed: bool"),
        ({"value": None}, "row 0: value: found None, allowed: a number, or none where failed"),
        ({"extra": 1}, "row 0: found ['entry', 'error', 'extra'"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path: Path, change: dict, message: str):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{**ROW.to_plain(), **change}]), encoding="utf-8")
    with pytest.raises(RunError, match=r"rows\.json") as caught:
        load_properties(file)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", b"{"), ("a.json", b"{}"), ("a.parquet", b"PAR1"), ("b", None)]
)
def test_a_file_that_holds_no_rows_is_one_line(tmp_path: Path, name: str, content: bytes | None):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RunError, match=f"{name}: found .*, allowed: ") as caught:
        load_properties(file)
    assert "\n" not in str(caught.value)


def test_reading_rows_needs_neither_ray_nor_torch():
    code = "import sys, analysis.properties; print({'ray', 'torch', 'ase'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert set(COLUMNS) == set(ROW.to_plain())
