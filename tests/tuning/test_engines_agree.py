"""One study by either engine: equal rungs, promotions, survivors and ranking."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.tuning.conftest import STUDY, ranking_of, tunebench, write_study
from tunebench.study.journal import read_trials
from tunebench.study.record import Stage, TrialRecord

ROUNDING = 1e-9  # of float64, grown over the steps of a trial


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small study in float64, run to its end by each engine."""
    folder = tmp_path_factory.mktemp("engines")
    workload = {**STUDY["workloads"][0], "evaluate_every_steps": 12}
    workload["model"] = {**workload["model"], "dtype": "float64"}
    for engine in ("cohort", "lightning"):
        study = write_study(folder, engine=engine, workloads=[workload], confirm={"top_k": 1, "seeds": 1})
        tunebench("run", study, "--run", folder / engine)
    return {engine: folder / engine for engine in ("cohort", "lightning")}


def trials_of(run: Path) -> dict[str, TrialRecord]:
    return {trial.key.trial_id: trial for trial in read_trials(run)}


def test_each_engine_trained_its_own_run(runs: dict[str, Path]) -> None:
    for engine, run in runs.items():
        assert {trial.engine for trial in read_trials(run)} == {engine}


def test_rounding_could_flip_no_rung(runs: dict[str, Path]) -> None:
    """Otherwise equal decisions would say nothing, and unlike ones no more."""
    one, other = (trials_of(run) for run in runs.values())
    assert one.keys() == other.keys()
    for name, trial in one.items():
        assert other[name].rungs == pytest.approx(trial.rungs, rel=ROUNDING)
        assert other[name].value == pytest.approx(trial.value, rel=ROUNDING)
    tuned = [trial for trial in one.values() if trial.key.stage is Stage.TUNE]
    for arm in {trial.key.arm for trial in tuned}:
        for rung in (3, 6):
            values = sorted(trial.rungs[rung] for trial in tuned if trial.key.arm == arm and rung in trial.rungs)
            assert all(above > below * (1.0 + 100.0 * ROUNDING) for below, above in pairwise(values))


def test_both_engines_decide_promote_and_confirm_alike(runs: dict[str, Path]) -> None:
    def decided(run: Path) -> dict[str, Any]:
        return {
            name: (
                trial.reason,
                trial.state,
                trial.params,
                trial.seeds,
                trial.ledger["steps"],
                sorted(trial.rungs),
                [(d["rung"], d["competitors"], d["goes_on"], d["sentinel"]) for d in trial.decisions],
            )
            for name, trial in trials_of(run).items()
        }

    by_cohort, by_lightning = (decided(run) for run in runs.values())
    assert by_cohort == by_lightning
    assert any(decisions for *_, decisions in by_cohort.values())


def test_both_engines_rank_alike(runs: dict[str, Path]) -> None:
    def concluded(run: Path) -> Any:
        return [
            (workload["decision"]["verdict"], [(arm["optimizer"], arm["rank"]) for arm in workload["arms"]])
            for workload in ranking_of(run)["workloads"]
        ]

    assert concluded(runs["cohort"]) == concluded(runs["lightning"])
