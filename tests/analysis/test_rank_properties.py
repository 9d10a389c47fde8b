"""What a ranking may not depend on: the order of the trials, the unit of the errors, a copy of an optimizer."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.json_form import to_json
from analysis.load import Run, load
from analysis.ranking import rank
from tests.analysis.synthetic_run import Plan, write_run
from tunebench.study.record import TrialRecord

ADAMW, SOAP = (0.03, 0.031, 0.032, 0.033, 0.034), (0.02, 0.021, math.inf, 0.023, 0.024)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    plan = Plan(arms={"adamw": ADAMW, "soap": SOAP}, top_k=2)
    return load(write_run(tmp_path_factory.mktemp("properties") / "run", plan))


def essence(run: Run) -> Any:
    """Verdict, comparisons, and errors of every arm, to twelve digits."""
    found = []
    for workload in rank(run).workloads:
        arms = [(arm.optimizer, arm.rank, arm.config_index, to_json(arm.errors)) for arm in workload.arms]
        found.append((workload.decision.sentence, to_json(workload.comparisons), arms))
    return rounded(found)


def rounded(part: Any) -> Any:
    if isinstance(part, float):
        return float(f"{part:.12g}")
    if isinstance(part, dict):
        return {name: rounded(value) for name, value in part.items() if name != "values"}
    return [rounded(value) for value in part] if isinstance(part, list | tuple) else part


@settings(max_examples=4)
@given(st.randoms(use_true_random=False))
def test_the_order_of_the_trials_does_not_matter(run: Run, random: Any) -> None:
    trials = list(run.trials)
    random.shuffle(trials)
    assert essence(dataclasses.replace(run, trials=tuple(trials))) == essence(run)


def scaled(part: Any, factor: float) -> Any:
    if isinstance(part, dict):
        return {name: scaled(value, factor) for name, value in part.items()}
    return part * factor if isinstance(part, float) else part


def in_other_units(trial: TrialRecord, factor: float) -> TrialRecord:
    value = None if trial.value is None else trial.value * factor
    rungs = {step: rung * factor for step, rung in trial.rungs.items()}
    return dataclasses.replace(trial, value=value, rungs=rungs, result=scaled(trial.result, factor))


@settings(max_examples=4)
@given(st.floats(1e-3, 1e3))
def test_another_unit_of_the_errors_changes_no_verdict(run: Run, factor: float) -> None:
    errors = np.isin(run.curves["metric"], ["forces_mae", "forces_rmse", "objective"])
    curves = run.curves.assign(value=np.where(errors, run.curves["value"] * factor, run.curves["value"]))
    other = dataclasses.replace(run, trials=tuple(in_other_units(trial, factor) for trial in run.trials), curves=curves)
    before, after = rank(run).workloads[0], rank(other).workloads[0]
    assert after.decision.verdict is before.decision.verdict
    assert [(arm.optimizer, arm.config_index) for arm in after.arms] == [
        (arm.optimizer, arm.config_index) for arm in before.arms
    ]
    for own, theirs in zip(after.comparisons, before.comparisons, strict=True):
        assert own.difference == pytest.approx(factor * theirs.difference, rel=1e-9)
        assert own.p == pytest.approx(theirs.p, rel=1e-6)
        assert own.n_pairs == theirs.n_pairs


def test_a_copy_of_an_optimizer_ties_with_it_and_leaves_the_others_where_they_are(run: Run, tmp_path: Path) -> None:
    arms = {"adamw": ADAMW, "soap": SOAP, "twin": SOAP}
    plan = Plan(arms=arms, top_k=2, settings={"twin": {"optimizer": "soap"}})
    doubled = rank(load(write_run(tmp_path / "run", plan))).workloads[0]
    alone = rank(run).workloads[0]
    by_name = {arm.optimizer: to_json(arm.errors) for arm in doubled.arms}
    assert by_name["twin"] == by_name["soap"]
    assert by_name == {**{arm.optimizer: to_json(arm.errors) for arm in alone.arms}, "twin": by_name["twin"]}
    assert [arm.optimizer for arm in doubled.arms] == ["soap", "twin", "adamw"]
    against = {one.second: one for one in doubled.comparisons}
    assert against["twin"].difference == 0.0
    (before,) = alone.comparisons
    assert dataclasses.replace(against["adamw"], redrawn=None) == dataclasses.replace(before, redrawn=None)
