"""A study under a cap on device-seconds, run to its end and then extended."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.study.test_step_times import solo_step, table
from tests.tuning.conftest import STUDY, python_path, tunebench, write_study
from tunebench.study.journal import read_afforded, read_trials
from tunebench.study.record import Reason, Stage, TrialRecord

ADAMW, LAMB = "ethanol/adamw", "ethanol/lamb"
STEP_S = {ADAMW: 1.0, LAMB: 1.5}
CAP_S, TRIALS, MORE = 80.0, 4, 4
STOPPING = {"grace_steps": 3, "reduction_factor": 2, "sentinels": 1}

MEASURED = """
import os, sys, types
from pathlib import Path
if any("default_worker" in a for a in sys.argv):
    def solo_steps(*arguments):
        from tunebench.study.step_times import DeviceTimes
        Path({folder!r}, "measured-by").write_text(str(os.getpid()))
        return DeviceTimes.model_validate_json(Path({folder!r}, "table.json").read_bytes())
    solo = types.ModuleType("tunebench.engine.solo")
    solo.SoloPlan, solo.solo_steps = dict, solo_steps
    sys.modules["tunebench.engine.solo"] = solo
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a run under a cap, the journal as it was at its first end, what was said, and the run's extension."""
    folder = tmp_path_factory.mktemp("capped")
    tune = {"trials_per_arm": TRIALS, "asha": STOPPING, "device_seconds_per_arm": CAP_S}
    workload = {**STUDY["workloads"][0], "evaluate_every_steps": 12}
    study = write_study(
        folder, workloads=[workload], optimizers=["adamw", "lamb"], tune=tune, confirm={"top_k": 1, "seeds": 1}
    )
    steps = [solo_step(arm.split("/")[1], [seconds]) for arm, seconds in STEP_S.items()]
    (folder / "table.json").write_text(table(*steps).model_dump_json())
    (folder / "sitecustomize.py").write_text(MEASURED.format(folder=str(folder)))
    for name, options in (("first", ["--no-report"]), ("second", ["--extend", str(MORE)])):
        done = tunebench("run", study, "--run", folder / "run", *options, PYTHONPATH=python_path(folder))
        (folder / name).write_text(done.stdout)
        (folder / f"{name}.log").write_bytes((folder / "run" / "journal.log").read_bytes())
    return folder


def searched(run: Path, arm: str) -> list[TrialRecord]:
    return [trial for trial in read_trials(run) if trial.key.arm == arm and trial.key.stage is Stage.TUNE]


def first(folder: Path) -> Path:
    """The run as it was before its extension, as far as its journal goes."""
    run = folder / "before"
    run.mkdir(exist_ok=True)
    (run / "journal.log").write_bytes((folder / "first.log").read_bytes())
    return run


def test_steps_are_measured_in_a_process_that_is_gone_afterwards(folder: Path) -> None:
    measured_by = (folder / "measured-by").read_text()
    assert not Path("/proc", measured_by).exists()
    assert "on a device of this machine" in (folder / "first").read_text()
    assert "measuring steps" not in (folder / "second").read_text(), "the run has its table"


def test_the_cap_holds_in_every_arm_and_bites_in_the_one_with_dearer_steps(folder: Path) -> None:
    for run, cap, wanted in ((first(folder), CAP_S, 4), (folder / "run", 2 * CAP_S, 8)):
        counts = {arm: len(searched(run, arm)) for arm in STEP_S}
        assert counts[LAMB] < counts[ADAMW] == wanted
        assert {arm: paid[wanted] for arm, paid in read_afforded(run).items()} == counts
        for arm, step_s in STEP_S.items():
            assert 0.5 * cap < sum(trial.ledger["steps"] for trial in searched(run, arm)) * step_s <= cap
    paid = read_afforded(folder / "run")[LAMB]
    assert f"{LAMB}: 80 device-seconds pay for {paid[4]} of 4 configurations, 1 of" in (folder / "first").read_text()
    assert f"{LAMB}: 160 device-seconds pay for {paid[8]} of 8 configurations, 2 of" in (folder / "second").read_text()


def test_every_arm_has_as_many_sentinels_before_and_after_the_extension(folder: Path) -> None:
    for run, count in ((first(folder), 1), (folder / "run", 2)):
        sentinels = [trial for arm in STEP_S for trial in searched(run, arm) if trial.sentinel]
        assert Counter(trial.key.arm for trial in sentinels) == {ADAMW: count, LAMB: count}
        assert {trial.reason for trial in sentinels} == {Reason.FINISHED}


def test_the_ledger_adds_up(folder: Path) -> None:
    """A trial pays for a complete schedule up to every rung that it came to, and for the horizon."""
    for trial in read_trials(folder / "run"):
        horizon = 12 if trial.reason is Reason.FINISHED else 0
        assert trial.ledger["steps"] == sum(trial.rungs) + horizon
        assert trial.ledger["lost_steps"] == 0


def test_what_had_ended_stays_as_it_was(folder: Path) -> None:
    before, after = read_trials(first(folder)), {trial.key: trial for trial in read_trials(folder / "run")}
    assert all(trial.reason is not None for trial in before)
    assert [after[trial.key] for trial in before] == before


def test_the_report_names_the_arm_that_the_cap_cut_short(folder: Path) -> None:
    report = folder / "run" / "report"
    ranking: dict[str, Any] = json.loads((report / "ranking.json").read_text())
    paid = read_afforded(folder / "run")[LAMB][8]
    said = [finding for check in ranking["checks"] for finding in check["findings"] if "device-seconds paid" in finding]
    assert said == [f"160 device-seconds paid for {paid} of 8 configurations of lamb"]
    assert "each competing arm had 2 of them" in (report / "index.html").read_text()
