"""`tunebench curvature` on a run directory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.analysis.synthetic_run import RUNG, Plan, write_run
from tests.engine.test_cohort import CrystalTrials
from tunebench.cli import BAD_INPUT, DONE, run_command
from tunebench.curvature import measure
from tunebench.curvature.measure import measure_curvature, measure_point, planned_steps
from tunebench.curvature.record import CurvaturePoint, CurvatureSettings, read_record
from tunebench.curvature.snapshots import Snapshot
from tunebench.engine.task import TrialTask
from tunebench.study.journal import read_trials
from tunebench.study.record import Reason, Stage

TRIAL = "crystals.adamw.confirm.c001.s0"
QUICK = ["--frames", "3", "--probes", "2", "--steps", "3", "--trace-products", "3"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, trials: CrystalTrials) -> Path:
    """A run whose journal says that its trials were trained on the crystals; it has no checkpoints."""
    plan = Plan(
        arms={"adamw": (0.03,)},
        workloads=("crystals",),
        data=trials.spec.model_dump(mode="json", exclude_defaults=True),
        data_hash=trials.data.hash,
    )
    return write_run(tmp_path_factory.mktemp("runs") / "run", plan)


def test_a_trial_is_measured_at_the_steps_asked_for(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["curvature", str(run), TRIAL, "--at", "1", "--at", "2", *QUICK, "--device", "cpu"]
    assert run_command([*arguments, "--json"]) == DONE
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["operator"]) for row in rows] == [
        (1, "H"),
        (1, "preconditioned H"),
        (2, "H"),
        (2, "preconditioned H"),
    ]
    assert all(row["products"] == 2 * 3 + 3 for row in rows)
    assert (run / "curvature" / f"{TRIAL}.json").is_file()
    assert not (run / "checkpoints").exists()


def test_what_was_measured_before_a_kill_is_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(task: TrialTask, snapshot: Snapshot, settings: CurvatureSettings) -> CurvaturePoint:
        if snapshot.step == 2:
            raise KeyboardInterrupt
        return measure_point(task, snapshot, settings)

    (run / "curvature" / f"{TRIAL}.json").unlink(missing_ok=True)
    monkeypatch.setattr(measure, "measure_point", killed)
    few = CurvatureSettings(frames=3, probes=2, steps=3, trace_products=3)
    with pytest.raises(KeyboardInterrupt):
        measure_curvature(run, TRIAL, few, lambda line: None, at=(1, 2), device="cpu")
    assert [point.step for point in read_record(run / "curvature" / f"{TRIAL}.json").points] == [1]


def test_rungs_are_those_that_the_trial_came_to(run: Path) -> None:
    trials = {(t.key.stage, t.reason): t for t in read_trials(run)}
    assert planned_steps(run, trials[Stage.CONFIRM, Reason.FINISHED].key.trial_id) == (RUNG, 180, 240)
    assert planned_steps(run, trials[Stage.TUNE, Reason.STOPPED_ASHA].key.trial_id) == (RUNG,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([TRIAL], r"found no last\.pt, allowed: a trial with a checkpoint .* or steps to train it to again \(--at\)"),
        ([TRIAL, "--at", "500"], "steps: found 500, allowed: ascending, from 1 to 240"),
        (["nobody"], "trial 'nobody': found 0 whose id begins so, allowed: one, such as crystals"),
        (["crystals"], r"trial 'crystals': found [0-9]+ whose id begins so"),
        ([TRIAL, "--trace-products", "2"], "trace_products: found 2, allowed: 0, or at least 3"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_command(["curvature", str(run), *arguments]) == BAD_INPUT
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, line)
