"""The cohort engine against the lightning engine, and its slots against each other."""

from __future__ import annotations

import pytest
import torch

from tests.engine.conftest import MakeTask, Reports
from tunebench.engine.cohort import Cohort
from tunebench.engine.lightning import run_trial
from tunebench.engine.task import Evaluation, TrialTask


def run_cohort(tasks: list[TrialTask], slots: int) -> dict[str, list[Evaluation]]:
    """All reports of trials that share one cohort, by optimizer."""
    cohort = Cohort(tasks[0], slots, compiled=False)
    waiting, found = list(tasks), {task.key.trial_id: [] for task in tasks}
    while waiting or cohort.trials:
        while waiting and cohort.free:
            cohort.join(waiting.pop(0))
        for name, report in cohort.advance():
            found[name].append(report)
            if report.outcome is None:
                cohort.go_on(name)
    return found


@pytest.mark.parametrize("family", ["nequip", "allegro"])
def test_a_cohort_trains_as_the_lightning_engine_does(make_task: MakeTask, family: str) -> None:
    optimizers = ("adamw", "schedule_free", "muon", "soap")
    tasks = [make_task(name, family=family, name=f"cohort-{name}") for name in optimizers]
    found = run_cohort(tasks, 4)
    for name, task in zip(optimizers, tasks, strict=True):
        expected = Reports()
        run_trial(make_task(name, family=family, name=f"lightning-{name}"), expected)
        for one, other in zip(found[task.key.trial_id], expected, strict=True):
            assert one.step == other.step
            assert one.train_loss == pytest.approx(other.train_loss, rel=1e-4), name
            assert one.objective == pytest.approx(other.objective, rel=1e-3), name
