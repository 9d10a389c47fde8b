"""Rungs that are complete short schedules: who goes on starts anew at the next horizon, in either engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import pytest

from tests.engine.conftest import Reports
from tests.engine.test_cohort import (
    CrystalTrials,
    assert_same_to_rounding,
    assert_same_trial,
    crystal_trials,
    measured,
    run_cohort,
)
from tunebench.engine.lightning import run_trial
from tunebench.engine.task import Evaluation, TrialTask, Work
from tunebench.study.record import CURVES, SHORTER_CURVES

Train = Callable[[TrialTask], list[Evaluation]]
STEPS = (2, 3, 6, 8)


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> CrystalTrials:
    return crystal_trials(tmp_path_factory.mktemp("crystals"))


@pytest.fixture(params=["lightning", "cohort"])
def train(request: pytest.FixtureRequest, trials: CrystalTrials) -> Train:
    """Trains a trial to its end by one of the engines, letting it go on at every rung."""
    return by_lightning if request.param == "lightning" else lambda task: by_cohort(trials, task)


def by_lightning(task: TrialTask) -> list[Evaluation]:
    reports = Reports()
    run_trial(task, reports)
    return reports


def by_cohort(trials: CrystalTrials, task: TrialTask) -> list[Evaluation]:
    found: list[Evaluation] = run_cohort(trials.cohort(2, task), [task])[task.key.trial_id]
    return found


def steps_of_curve(task: TrialTask, folder: str = CURVES, horizon: str = "") -> list[int]:
    curve = pd.read_parquet(task.run / folder / f"{task.key.trial_id}{horizon}.parquet")
    return sorted(curve.step.unique().tolist())


def rescaled(task: TrialTask) -> TrialTask:
    """The task with a rung at step 3 that ends a complete schedule."""
    return replace(task, rungs=(3,), horizons=(3, 8))


def test_a_promoted_trial_equals_in_every_bit_one_that_was_trained_at_the_full_horizon_alone(
    trials: CrystalTrials, train: Train
) -> None:
    task, other = rescaled(trials.task("soap", evaluation_steps=STEPS)), trials.task("soap", evaluation_steps=STEPS)
    found, expected = train(task), train(other)
    assert [(report.step, report.at_rung) for report in found] == [
        *((2, False), (3, True)),
        *((step, False) for step in STEPS),
    ]
    assert_same_trial(found[2:], task, expected, other)
    assert steps_of_curve(task) == steps_of_curve(other) == list(STEPS)
    assert steps_of_curve(task, SHORTER_CURVES, ".h3") == [2, 3]
    assert found[-1].spent.steps == 3 + 8
    assert found[-1].spent.device_s > found[-1].device_s > 0.0
    assert expected[-1].earlier == Work()


def test_a_rung_ends_a_complete_schedule_of_its_own_length(trials: CrystalTrials, train: Train) -> None:
    task = rescaled(trials.task(evaluation_steps=STEPS))
    whole = trials.task(steps=3, evaluation_steps=(2, 3))
    found, expected = train(task), train(whole)
    assert [report.learning_rate for report in found if report.at_rung] == [0.0]  # where the decay ends
    for one, other in zip(found[:2], expected, strict=True):
        assert measured(one) | {"outcome": None} == measured(other) | {"outcome": None}


def test_both_engines_measure_the_same_at_every_horizon(trials: CrystalTrials) -> None:
    one, other = (rescaled(trials.task(evaluation_steps=STEPS)) for _ in range(2))
    assert_same_to_rounding(by_cohort(trials, one), by_lightning(other), 1e-10)


@pytest.mark.parametrize(
    ("reports", "written_every_s"),
    [(2, 0.0), (3, 0.0), (4, 3600.0)],
    ids=["at its rung", "in the middle of its second horizon", "and where nothing was written for long"],
)
def test_a_trial_that_is_killed_goes_on_at_the_horizon_it_was_at(
    trials: CrystalTrials, reports: int, written_every_s: float
) -> None:
    """The first engine trains to so many reports, the other goes on from what lies on the disk."""
    made = replace(trials, written_every_s=written_every_s)
    task, other = (rescaled(made.task(evaluation_steps=STEPS)) for _ in range(2))
    before, expected = Reports(stop_after=reports), by_lightning(other)
    with pytest.raises(SystemExit):
        run_trial(task, before)
    after = by_cohort(trials, task)
    assert [report.step for report in after] == [report.step for report in expected[reports:]]
    assert_same_to_rounding([*before, *after], expected, 1e-10)
    assert after[-1].spent.steps == 3 + 8, "no step is counted twice"


def test_a_trial_without_a_slot_waits_for_its_next_horizon_as_for_any_step(trials: CrystalTrials) -> None:
    tasks = [rescaled(trials.task(index=index, evaluation_steps=STEPS)) for index in range(2)]
    cohort = trials.cohort(2, tasks[0])

    def halve(name: str, report: Evaluation) -> None:
        if report.at_rung and cohort.slots == 2:
            cohort._halve()

    found = run_cohort(cohort, tasks, halve)
    assert cohort.slots == 1
    assert [[report.step for report in of_one] for of_one in found.values()] == [[2, 3, *STEPS]] * 2


def test_a_task_whose_horizons_are_not_measured_or_do_not_end_at_the_workloads_is_refused(
    trials: CrystalTrials,
) -> None:
    task = trials.task(evaluation_steps=STEPS)
    for horizons in ((5, 8), (3,)):
        with pytest.raises(ValueError, match=r"horizons: found .* allowed: ascending"):
            replace(task, horizons=horizons)
