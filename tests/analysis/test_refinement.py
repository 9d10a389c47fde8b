"""The refinement in the report: errors before and after over the same trials, its cost, and why it gained nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest

from analysis.charts.run_charts import run_charts
from analysis.json_form import to_json
from analysis.load import Run, load
from analysis.page import render
from analysis.ranking import rank
from analysis.refinement import refinement_table, refused
from tests.analysis.synthetic_run import Plan, write_run
from tunebench.study.record import Stage, TrialRecord

ARMS = {"adamw": (0.030, 0.031, 0.032), "soap": (0.020, 0.021, 0.022)}
DONE = {
    "end": "steps",
    "message": "40 iterations made",
    "readout": "ema",
    "kept_iteration": 40,
    "loss_before": 0.02,
    "loss_after": 0.01,
    "refine_steps": 600.0,
    "refine_device_s": 12.0,
}
KEPT = {"end": "validation", "message": "validation loss 2 at iteration 5, 1 before", "kept_iteration": 0}


def refined(trial: TrialRecord, **changes: Any) -> TrialRecord:
    """The trial with a refinement that halves every error."""
    result = {
        split: {**by_readout, "refined": {metric: 0.5 * value for metric, value in by_readout["ema"].items()}}
        for split, by_readout in trial.result.items()
    }
    return replace(trial, result=result, detail={"message": "", "refinement": {**DONE, **changes}})


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load(write_run(tmp_path_factory.mktemp("refinement") / "run", Plan(arms=ARMS)))


@pytest.fixture(scope="module")
def run(plain: Run) -> Run:
    changed = []
    for trial in plain.trials:
        if trial.key.stage is not Stage.CONFIRM or trial.key.optimizer != "soap":
            changed.append(trial)
        elif trial.key.seed_index == 1:
            changed.append(refined(trial, loss_after=0.02, **KEPT))
        elif trial.key.seed_index == 2:
            failed = {"end": "out_of_memory", "message": "CUDA out of memory", "readout": "ema"}
            changed.append(replace(trial, detail={"message": "", "refinement": failed}))
        else:
            changed.append(refined(trial))
    rows = plain.curves[
        plain.curves["trial"].isin([t.key.trial_id for t in changed if "refined" in t.result.get("val", {})])
    ]
    ends = rows[(rows["readout"] == "ema") & (rows["step"] == rows["step"].max())]
    halved = ends.assign(readout="refined", value=0.5 * ends["value"])
    return replace(plain, trials=tuple(changed), curves=pd.concat([plain.curves, halved], ignore_index=True))


def test_errors_before_and_after_are_over_the_same_trials(run: Run) -> None:
    table = refinement_table(run, "ethanol-nequip")
    (row,) = table.rows
    assert row[:4] == ("soap", "3", "20.5", "10.2")
    assert row[-3:] == ("out_of_memory 1, steps 1, validation 1", "1.2e+03", "24")


def test_a_trial_that_gained_nothing_is_named_with_the_reason(run: Run) -> None:
    assert refused(run, "ethanol-nequip") == [
        f"ethanol-nequip.soap.confirm.c001.s1: {KEPT['message']}",
        "ethanol-nequip.soap.confirm.c001.s2: CUDA out of memory",
    ]


def test_the_page_shows_it_and_no_verdict_changes(plain: Run, run: Run) -> None:
    ranking = rank(run)
    page = render(run, ranking, run_charts(run, ranking))
    assert "Second-order refinement" in page
    assert "Refinement without gain: ethanol-nequip.soap.confirm.c001.s1" in page
    (workload,), (expected,) = ranking.workloads, rank(plain).workloads
    assert workload.decision == expected.decision
    assert to_json(workload.comparisons) == to_json(expected.comparisons)
    assert [(arm.optimizer, arm.rank) for arm in workload.arms] == [(arm.optimizer, arm.rank) for arm in expected.arms]
    assert {error.readout for error in workload.arms[0].errors} >= {"raw", "ema", "refined"}
    assert "Second-order refinement" not in render(plain, rank(plain), run_charts(plain, rank(plain)))
