"""A property that takes too long has failed, and its process is ended even where it holds the interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from analysis.properties import load_properties
from tunebench.properties.measured import PropertyFailure
from tunebench.properties.model_record import make_reference, measure_model, read_reference, rows_file
from tunebench.properties.of_study import Measurement
from tunebench.properties.plan import PropertyPlan
from tunebench.properties.time_limit import EntryClock, ended_by_clock, running_entries

COPPER = {"kind": "crystal", "formula": "Cu", "lattice": "fcc", "a_angstrom": 3.6}
PLAN = PropertyPlan.model_validate(
    {
        "properties": {
            "slow": {"property": "equation_of_state", "structure": COPPER, "points": 5},
            "quick": {"property": "elastic", "structure": COPPER, "relax_ions": False},
        },
        "reference": {"calculator": "emt"},
    }
)
SHORT_S, LONG_S = 0.5, 3600.0  # the clock ends the process of the tests as well
HANGS = """
import ctypes, sys
from pathlib import Path
from tests.properties.test_time_limit import SHORT_S, measured
from tunebench.properties.model_record import measure_model
from tunebench.properties.time_limit import EntryClock

def hanging():
    ctypes.PyDLL(None).sleep(60)  # holds the interpreter

run = Path(sys.argv[1])
measure_model(run, "model", [measured(SHORT_S)], hanging, clock=EntryClock(run=run, model="model"))
"""


def measured(limit_s: float = LONG_S) -> Measurement:
    return Measurement(section=0, plan=PLAN, time_limit_s=limit_s)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first process hung in the first entry of a model."""
    run = tmp_path_factory.mktemp("hanging")
    done = subprocess.run([sys.executable, "-c", HANGS, str(run)], capture_output=True, text=True, timeout=60.0)
    assert done.returncode == 1, done.stderr
    assert ended_by_clock(run, "model")
    return run


def test_the_next_process_records_the_failure_and_goes_on(ended: Path, caplog: pytest.LogCaptureFixture) -> None:
    from ase.calculators.emt import EMT

    measure_model(ended, "model", [measured()], EMT, clock=EntryClock(run=ended, model="model"))
    rows = load_properties(rows_file(ended, "model"))
    assert {row.entry: (row.failed, row.reason) for row in rows} == {
        "slow": (True, "took longer than 3600 s, the time_limit_s of its section"),
        "quick": (False, ""),
    }
    assert "in hanging" in caplog.text  # where it stood
    assert running_entries(ended) == []


def test_a_reference_that_takes_too_long_has_failed_too(tmp_path: Path) -> None:
    folder = tmp_path / "properties" / "running" / "reference-0"
    folder.mkdir(parents=True)
    (folder / "slow").write_text("Timeout!")
    make_reference(tmp_path, measured(), clock=EntryClock(run=tmp_path, model="reference-0"))
    found = read_reference(tmp_path, 0)
    assert isinstance(found["slow"], PropertyFailure)
    assert not isinstance(found["quick"], PropertyFailure)
    assert not ended_by_clock(tmp_path, "reference-0")


def test_what_is_being_computed_is_told_until_it_is_done(tmp_path: Path) -> None:
    clock = EntryClock(run=tmp_path, model="model")
    with clock.over("slow", LONG_S):
        (now,) = running_entries(tmp_path)
        assert (now.model, now.entry, now.ended) == ("model", "slow", False)
        assert clock.overrun("slow", LONG_S) is None
    assert running_entries(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), clock.over("slow", None):
        raise KeyboardInterrupt
    assert running_entries(tmp_path) == []
