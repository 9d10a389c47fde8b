"""Fine-tuned workloads against their twins from scratch, in a run whose truth is known."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from analysis.load import Run, load
from analysis.ranking import rank
from analysis.twin_tables import twin_tables
from analysis.twins import TwinError, twin_names, twins
from tests.analysis.synthetic_run import Plan, write_run
from tests.analysis.test_rank_properties import in_other_units
from tunebench.properties.rows import PropertyRow, write_rows
from tunebench.study.initial import Initial
from tunebench.study.record import PROPERTIES, Reason, Stage
from tunebench.study.spec import Study

SECTION = {
    "regime": "crystal",
    "properties": {
        "elastic": {
            "property": "elastic",
            "structure": {"kind": "crystal", "formula": "Cu", "lattice": "fcc", "a_angstrom": 3.6},
        }
    },
    "reference": {"values": {"elastic": {"C11": 168.0}}},
}
ARMS = {"adamw": (0.030, 0.032, 0.034), "soap": (0.020, math.inf, 0.024)}
WORSE = 3.0
"""Errors from scratch over those of the fine-tuned workload."""
C11 = {"tuned": (170.0, 171.0, 175.0), "scratch": (150.0, None, 158.0)}
"""Of every optimizer's models by seed; None has failed."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    plan = Plan(arms=ARMS, workloads=("tuned", "scratch"), properties=[SECTION])
    written = load(write_run(tmp_path_factory.mktemp("twins") / "run", plan))
    for trial in written.trials:
        if trial.key.stage is Stage.CONFIRM and trial.reason is Reason.FINISHED:
            value = C11[trial.key.workload][trial.key.seed_index]
            row = PropertyRow(
                model=trial.key.trial_id,
                entry="elastic",
                property="elastic",
                quantity="C11",
                value=value,
                standard_error=None,
                reference=168.0,
                reference_standard_error=None,
                error=None if value is None else value - 168.0,
                unit="GPa",
                failed=value is None,
                reason="" if value else "mechanically unstable",
                settings_hash="0",
            )
            write_rows(written.path / PROPERTIES / f"{trial.key.trial_id}.parquet", [row])
    trials = tuple(in_other_units(t, WORSE) if t.key.workload == "scratch" else t for t in written.trials)
    return dataclasses.replace(with_init(written, "tuned"), trials=trials)


def with_init(run: Run, name: str) -> Run:
    init = Initial(path="base.ckpt")
    workloads = tuple(w.model_copy(update={"init": init}) if w.name == name else w for w in run.study.workloads)
    study = run.study.model_copy(update={"workloads": workloads})
    return dataclasses.replace(run, resolved=dataclasses.replace(run.resolved, study=study))


@pytest.fixture(scope="module")
def errors(run: Run) -> dict[tuple[str, str], TwinError]:
    (pair,) = twins(run, rank(run))
    return {(error.error, error.optimizer): error for error in pair.errors}


def test_a_difference_is_that_of_welch(errors: dict[tuple[str, str], TwinError]) -> None:
    found = errors["test force MAE", "adamw"]
    tuned = 1e3 * np.array(ARMS["adamw"])
    expected = stats.ttest_ind(tuned, WORSE * tuned, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert found.unit == "meV/Å"
    assert found.difference == pytest.approx((tuned - WORSE * tuned).mean())
    assert found.interval is not None
    assert (found.interval.low, found.interval.high) == pytest.approx((interval.low, interval.high))
    rows = [error for error in errors.values() if error.p is not None]
    assert expected.pvalue < (found.p or 0.0) <= len(rows) * expected.pvalue  # adjusted for the number of rows


def test_failures_are_counted_and_leave_no_difference(errors: dict[tuple[str, str], TwinError]) -> None:
    found = errors["test force MAE", "soap"]
    assert found.tuned is not None
    assert (found.tuned.iqm, found.tuned.n_failed, found.tuned.n_seeds) == (math.inf, 1, 3)
    assert (found.difference, found.interval, found.p) == (None, None, None)


def test_values_of_properties_stand_beside_their_reference(run: Run) -> None:
    (pair,) = twins(run, rank(run))
    adamw = next(value for value in pair.values if value.optimizer == "adamw")
    assert (adamw.quantity, adamw.unit, adamw.reference) == ("elastic C11", "GPa", 168.0)
    assert adamw.tuned is not None
    assert adamw.scratch is not None
    assert (adamw.tuned.iqm, adamw.tuned.n_failed) == (172.0, 0)
    assert (adamw.scratch.iqm, adamw.scratch.n_failed, adamw.scratch.n_seeds) == (154.0, 1, 3)


def test_the_tables_say_who_is_shown_to_be_better_and_who_is_not(run: Run) -> None:
    (pair,) = twins(run, rank(run))
    errors, values = twin_tables(pair)
    better = {row[:3]: row[-1] for row in errors.rows}
    assert better["test force MAE", "meV/Å", "adamw"] == "fine-tuned"
    assert better["test force MAE", "meV/Å", "soap"] == "not shown"
    assert ("elastic C11", "GPa", "168", "adamw", "172 [165.4, 178.6]", "154 ✗ 1 of 3") in values.rows


@pytest.mark.parametrize(
    ("change", "pairs"),
    [
        ({}, [("tuned", "scratch")]),
        ({"batch_size": 4}, []),
        ({"max_steps": 12}, []),
        ({"model": {"r_max_angstrom": 4.0}}, []),
        ({"model": {"preset": "small"}}, [("tuned", "scratch")]),
    ],
)
def test_twins_share_data_horizon_batches_and_cutoff(
    run: Run, change: dict[str, Any], pairs: list[tuple[str, str]]
) -> None:
    assert twin_names(changed(run.study, change)) == pairs


def changed(study: Study, change: dict[str, Any]) -> Study:
    tuned, scratch = study.workloads
    if "model" in change:
        change = {"model": scratch.model.model_copy(update=change["model"])}
    return study.model_copy(update={"workloads": (tuned, scratch.model_copy(update=change))})


def test_a_run_without_a_fine_tuned_workload_has_no_twins(run: Run, tmp_path: Path) -> None:
    assert twins(load(write_run(tmp_path / "run", Plan(arms={"adamw": (0.1,)}))), rank(run)) == ()
