"""Full-batch L-BFGS: what it lowers, why it ends, and which weights it keeps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from nequip.utils.global_state import set_global_state

from tests.engine.conftest import MakeTask
from tests.engine.test_cohort import CrystalTrials, crystal_trials, run_cohort
from tunebench.engine import refinement
from tunebench.engine.checkpoints import REFINED, checkpoint_folder
from tunebench.engine.cohort import Cohort
from tunebench.engine.full_batch import full_batch, model_in
from tunebench.engine.lightning import run_trial
from tunebench.engine.refinement import Minimised, RefinementEnd, minimise, refine
from tunebench.engine.task import Evaluation, TrialTask
from tunebench.engine.tenant import ModuleShelf, Tenant
from tunebench.optim.packing import Tensors
from tunebench.study.record import Metric, Reason, Split, Stage
from tunebench.study.spec import Refinement

HOW = Refinement(steps=200, evaluate_every=1)
SHORT = Refinement(steps=7, evaluate_every=5)
QUICK = Refinement(steps=4, evaluate_every=2)


@pytest.fixture(autouse=True)
def nequips_global_state() -> None:
    """As both engines set it before anything else: torch's default dtype is float64."""
    set_global_state()


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> CrystalTrials:
    return crystal_trials(tmp_path_factory.mktemp("crystals"))


class Problem:
    """A loss of one vector, which counts its evaluations and the places that they were at."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], start: list[float], sign: float = 1.0) -> None:
        self.parameters = {"x": torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))}
        self._function, self._sign = function, sign
        self.places: list[tuple[float, ...]] = []

    @property
    def x(self) -> list[float]:
        return self.parameters["x"].tolist()

    def loss_and_gradient(self) -> tuple[torch.Tensor, Tensors]:
        x = self.parameters["x"]
        self.places.append(tuple(x.tolist()))
        loss = self._function(x)
        (gradient,) = torch.autograd.grad(loss, x)
        return loss.detach(), {"x": self._sign * gradient}

    @torch.no_grad()
    def set_weights(self, weights: Tensors) -> None:
        self.parameters["x"].copy_(weights["x"])


def rosenbrock(x: torch.Tensor) -> torch.Tensor:
    return ((1.0 - x[:-1]) ** 2 + 100.0 * (x[1:] - x[:-1] ** 2) ** 2).sum()


def lowered(problem: Problem, how: Refinement = HOW, validation: Callable[[], float] | None = None) -> Minimised:
    return minimise(problem, how, validation or (lambda: 0.0))


def test_a_narrow_valley_is_followed_to_its_minimum() -> None:
    problem = Problem(rosenbrock, [-1.2, 1.0])
    found = lowered(problem)
    assert found.end is RefinementEnd.CONVERGED
    np.testing.assert_allclose(problem.x, 1.0, atol=1e-4)
    assert found.loss_after < 1e-9 * found.loss_before
    losses = [loss for _, loss in found.curve]
    assert losses == sorted(losses, reverse=True)


def test_no_point_is_computed_twice_and_every_one_is_counted() -> None:
    problem = Problem(rosenbrock, [-1.2, 1.0])
    found = lowered(problem)
    assert found.evaluations == len(problem.places) == len(set(problem.places))
    assert found.evaluations < 2 * found.iterations


def test_the_unit_of_the_loss_changes_nothing() -> None:
    found = [lowered(Problem(lambda x, u=unit: u * rosenbrock(x), [-1.2, 1.0])) for unit in (1.0, 2.0**-60)]
    assert found[0].iterations == found[1].iterations
    assert torch.equal(found[0].weights["x"], found[1].weights["x"])


def test_trial_points_that_are_not_finite_are_stepped_back_from() -> None:
    problem = Problem(lambda x: (x - torch.log(x)).sum(), [20.0, 30.0])  # NaN below zero, where steps go
    found = lowered(problem)
    assert any(min(place) < 0.0 for place in problem.places)
    assert found.end is RefinementEnd.CONVERGED
    np.testing.assert_allclose(problem.x, 1.0, atol=1e-4)


def test_a_loss_that_is_finite_nowhere_else_ends_with_the_weights_it_began_with() -> None:
    problem = Problem(lambda x: torch.where(x == 2.0, x, x * torch.nan).sum(), [2.0])
    found = lowered(problem)
    assert found.end is RefinementEnd.NOT_FINITE
    assert "points were not finite; the weights it began with are kept" in found.message
    assert problem.x == found.weights["x"].tolist() == [2.0]
    assert (found.kept_iteration, found.loss_after) == (0, found.loss_before)


def test_a_gradient_that_points_uphill_ends_as_a_failed_line_search() -> None:
    problem = Problem(lambda x: (x**2).sum(), [3.0, -1.0], sign=-1.0)
    found = lowered(problem)
    assert found.end is RefinementEnd.LINE_SEARCH
    assert "line search found nothing below 10 at iteration 1" in found.message
    assert problem.x == [3.0, -1.0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_to_begin_with_is_left_alone(value: float) -> None:
    found = lowered(Problem(lambda x: x.sum() * value, [1.0]))
    assert (found.end, found.iterations, found.evaluations) == (RefinementEnd.NOT_FINITE, 0, 1)


def test_a_minimum_is_recognised_before_any_step() -> None:
    found = lowered(Problem(lambda x: (x**2).sum(), [0.0]))
    assert (found.end, found.iterations) == (RefinementEnd.CONVERGED, 0)


def test_a_worse_validation_error_ends_it_with_the_best_weights_kept() -> None:
    problem = Problem(rosenbrock, [-1.2, 1.0])
    found = lowered(problem, validation=lambda: abs(problem.x[0] - 0.2))
    assert found.end is RefinementEnd.VALIDATION
    assert 0 < found.kept_iteration < found.iterations
    assert found.validation_after < found.validation_before
    assert problem.x == found.weights["x"].tolist()
    assert found.loss_after == dict(found.curve)[found.kept_iteration]


def test_weights_of_the_last_iterations_are_validated_too() -> None:
    problem = Problem(rosenbrock, [-1.2, 1.0])
    found = lowered(
        problem,
        SHORT,
        validation=lambda: float(rosenbrock(problem.parameters["x"]).detach()),
    )
    assert (found.end, found.kept_iteration) == (RefinementEnd.STEPS, 7)
    bad = Problem(rosenbrock, [-1.2, 1.0])
    found = lowered(
        bad,
        SHORT,
        validation=lambda: -float(rosenbrock(bad.parameters["x"]).detach()),
    )
    assert (found.end, found.kept_iteration) == (RefinementEnd.VALIDATION, 0)
    assert bad.x == [-1.2, 1.0]


def test_a_validation_error_that_is_not_a_number_is_worse() -> None:
    problem = Problem(rosenbrock, [-1.2, 1.0])
    found = lowered(problem, validation=lambda: math.nan if problem.x[0] > 0.0 else 1.0)
    assert found.end is RefinementEnd.VALIDATION
    assert problem.x[0] <= 0.0


@pytest.mark.parametrize("family", ["nequip", "allegro"])
def test_it_lowers_the_training_loss_of_a_model_and_reports_both_sides(make_task: MakeTask, family: str) -> None:
    task = make_task(family=family, stage=Stage.CONFIRM, force_fraction=0.5)
    tenant = Tenant(task, ModuleShelf())
    beats: list[None] = []
    how = Refinement(steps=8, evaluate_every=4)
    found = refine(task, tenant.model, tenant.state.weights, how, lambda: beats.append(None))
    done = found.minimised
    assert len(beats) > done.evaluations, "its watchdog sees each of them"
    assert done.end is RefinementEnd.STEPS
    assert done.loss_after < 0.7 * done.loss_before
    assert found.before.keys() == found.after.keys() == {"train", "val", "test", "ood:hot"}
    assert found.after["train"][Metric.FORCES_RMSE] < found.before["train"][Metric.FORCES_RMSE]
    assert done.validation_after < done.validation_before
    assert found.steps_equivalent == done.evaluations * found.frames / task.workload.batch_size
    assert found.device_s > 0.0
    loss = full_batch(task, model_in(task, torch.float64, tenant.model), Split.TRAIN, chunk_frames=3)
    loss.set_weights(done.weights)
    assert float(loss.loss_and_gradient()[0]) == pytest.approx(done.loss_after, rel=1e-9)


def test_it_runs_in_single_precision_too(make_task: MakeTask) -> None:
    task = make_task()
    tenant = Tenant(task, ModuleShelf())
    before = {name: weight.clone() for name, weight in tenant.state.weights.items()}
    found = refine(task, tenant.model, tenant.state.weights, Refinement(steps=3, evaluate_every=3, dtype="float32"))
    losses = [loss for _, loss in found.minimised.curve]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]
    assert {weight.dtype for weight in found.minimised.weights.values()} == {torch.float32}
    assert all(torch.equal(tenant.state.weights[name], before[name]) for name in before)


def trained_by_cohort(cohort: Cohort, task: TrialTask) -> Evaluation:
    """The last report of a trial."""
    cohort.join(task)
    while reports := cohort.advance():
        ((name, last),) = reports
        if last.outcome is None:
            cohort.go_on(name)
    return last


def assert_refined(task: TrialTask, found: Evaluation) -> None:
    """A trial's last report has the refined readout beside the plain ones, and says what was done."""
    done = found.refinement
    assert done is not None
    assert found.done.steps == 8
    assert found.objective == min(found.errors["val"][readout]["objective"] for readout in ("raw", task.averaged))
    assert found.objective == found.errors["val"][done["readout"]]["objective"]
    assert done["loss_after"] <= done["loss_before"]
    assert done["refine_steps"] == done["evaluations"] * task.data.splits["train"].frames / 2
    for split, errors in found.errors.items():
        plain = errors[done["readout"]][Metric.FORCES_MAE]
        assert done["before"][split][Metric.FORCES_MAE] == pytest.approx(plain, rel=1e-3)
        assert done["after"][split][Metric.FORCES_MAE] == errors["refined"][Metric.FORCES_MAE]
    curve = pd.read_parquet(task.run / "curves" / f"{task.key.trial_id}.parquet")
    assert set(curve.loc[curve["readout"] == "refined", "step"]) == {8}
    kept = torch.load(checkpoint_folder(task.run, task.key.trial_id) / REFINED, weights_only=True)
    assert {weight.dtype for weight in kept["weights"].values()} == {torch.float64}
    assert Evaluation.from_plain(found.to_plain()) == found


def test_the_lightning_engine_refines_a_confirm_trial_at_its_horizon(make_task: MakeTask) -> None:
    task = replace(make_task("schedule_free", stage=Stage.CONFIRM), refine=QUICK)
    assert_refined(task, run_trial(task, lambda report: None))


def test_the_cohort_engine_refines_a_confirm_trial_at_its_horizon(trials: CrystalTrials) -> None:
    task = replace(trials.task("adamw", stage=Stage.CONFIRM), refine=QUICK)
    assert_refined(task, trained_by_cohort(trials.cohort(2), task))


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (torch.OutOfMemoryError("Tried to allocate 8 GiB\nmore"), "out_of_memory"),
        (RuntimeError("Tried to allocate 8 GiB\nmore"), "failed"),
    ],
)
def test_an_error_is_said_and_costs_the_trial_nothing(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, error: Exception, end: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(refinement, "refine", fail)
    task = replace(make_task(stage=Stage.CONFIRM), refine=Refinement())
    last = run_trial(task, lambda report: None)
    assert last.outcome is Reason.FINISHED
    assert last.refinement is not None
    assert last.refinement.pop("refine_device_s") >= 0.0
    assert last.refinement == {
        "end": end,
        "message": "Tried to allocate 8 GiB",
        "readout": last.refinement["readout"],
    }
    assert not any("refined" in errors for errors in last.errors.values())


def test_a_neighbours_refinement_is_no_time_of_a_trial_that_stands_still_meanwhile(
    trials: CrystalTrials, monkeypatch: pytest.MonkeyPatch
) -> None:
    took_s = 1e5  # longer than all the rest, by the books' own clock
    now = time.perf_counter

    class Clock:
        ahead_s = 0.0

        def perf_counter(self) -> float:
            return now() + self.ahead_s

    clock = Clock()

    def refined(task: TrialTask, step: int, *_: Any) -> dict[str, Any] | None:
        if task.refine is None or step != task.workload.max_steps:
            return None
        clock.ahead_s += took_s
        return {"end": "steps"}

    for module in ("cohort", "book"):
        monkeypatch.setattr(f"tunebench.engine.{module}.time", clock)
    monkeypatch.setattr("tunebench.engine.cohort.add_refinement", refined)
    subject, late = (trials.task("adamw", stage=Stage.CONFIRM, index=index) for index in (0, 1))
    late = replace(late, time_limit_s=0.5 * took_s)
    cohort = trials.cohort(2, subject)
    cohort.join(replace(subject, refine=QUICK))
    ((_, first),) = cohort.advance()
    cohort.go_on(subject.key.trial_id)
    cohort.join(late)
    reports: dict[str, list[Evaluation]] = run_cohort(cohort)
    assert first.outcome is None
    assert reports[subject.key.trial_id][-1].wall_s > took_s
    assert reports[late.key.trial_id][-1].outcome is Reason.FINISHED
    assert reports[late.key.trial_id][-1].wall_s < 0.5 * took_s
