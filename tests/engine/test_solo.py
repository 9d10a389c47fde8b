"""Solo step times: what is measured, in which order, and what happens to what fails."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.engine.conftest import MakeTask
from tunebench.engine import solo
from tunebench.engine.calibration import LightningSteps, step_seconds
from tunebench.engine.cohort import Cohort
from tunebench.engine.functional import Untraceable
from tunebench.engine.solo import CohortSolo, LightningSolo, SoloPlan, solo_steps
from tunebench.engine.task import TrialTask
from tunebench.optim.matrix_view import trainable_parameters
from tunebench.study.resolve import ResolvedStudy, resolve
from tunebench.study.spec import Schedule, ScheduleKind, XtbData
from tunebench.workloads.data import PreparedData

NEVER, ALWAYS = 10**9, 1


def study(folder: Path, data: XtbData, *optimizers: str, workloads: int = 1, engine: str = "auto") -> ResolvedStudy:
    """A study of tiny models on ten ethanol frames."""
    file = folder / "study.yaml"
    model = {"family": "nequip", "r_max_angstrom": 4.0}
    names = [f"ethanol-{index}" for index in range(workloads)]
    content = {
        "name": "solo",
        "engine": engine,
        "workloads": [
            {"name": n, "data": data.model_dump(mode="json"), "model": model, "batch_size": 2, "max_steps": 8}
            for n in names
        ],
        "optimizers": list(optimizers),
    }
    file.write_text(yaml.safe_dump(content))
    return resolve(file)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Cohorts take all cores of a machine, which other tests need as well."""
    before = torch.get_num_threads()
    monkeypatch.setattr(solo, "device_threads", lambda device: 1)
    yield
    torch.set_num_threads(before)


def label(task: TrialTask) -> tuple[Any, ...]:
    hyper = task.hyperparameters
    return task.workload.name, task.key.optimizer, hyper.get("fctp_view"), hyper.get("precondition_frequency")


class Recorder:
    """Stands for a cohort of one slot: remembers the order of measurements, and takes times from a table."""

    engine, threads = "cohort", 1
    calls: list[tuple[Any, ...]]
    seconds_of: Any

    def __init__(self, task: TrialTask, *_: Any) -> None:
        self.workload = task.workload.name

    def seconds(self, task: TrialTask, steps: int) -> float:
        assert task.workload.name == self.workload
        Recorder.calls.append(label(task))
        return Recorder.seconds_of(task, steps)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recorder]]:
    Recorder.calls, Recorder.seconds_of = [], staticmethod(lambda task, steps: 0.01)
    monkeypatch.setattr(solo, "CohortSolo", Recorder)
    return Recorder


def test_every_step_is_measured_once_in_every_round_before_any_is_measured_again(
    tmp_path: Path, tiny_ethanol: XtbData, prepared_ethanol: PreparedData, recorder: type[Recorder]
) -> None:
    resolved = study(tmp_path, tiny_ethanol, "adamw", "soap", workloads=2)
    data = {workload.name: prepared_ethanol for workload in resolved.study.workloads}
    table = solo_steps(resolved, data, {}, SoloPlan(rounds=3, seconds=0.1), lambda line: None)
    views = ("per_type", "flat", "merged")
    once = [
        cell
        for workload in ("ethanol-0", "ethanol-1")
        for cell in (
            (workload, "adamw", None, None),
            *((workload, "soap", view, period) for view in views for period in (NEVER, ALWAYS)),
        )
    ]
    assert recorder.calls == once * (2 + 3)  # two passes find the number of steps and warm up
    assert [(s.workload, s.optimizer, s.settings.get("fctp_view")) for s in table.steps] == list(
        dict.fromkeys(cell[:3] for cell in once)
    )
    assert {len(step.plain.rounds_s) for step in table.steps} == {3}


def test_only_settings_of_the_runs_trials_are_measured(
    tmp_path: Path, tiny_ethanol: XtbData, prepared_ethanol: PreparedData, recorder: type[Recorder]
) -> None:
    resolved = study(tmp_path, tiny_ethanol, "adamw", "soap")
    params = {"learning_rate": 0.1, "fctp_view": "flat", "precondition_frequency": 3}
    searched = {"ethanol-0/soap": [params, {**params, "learning_rate": 0.2}], "ethanol-0/adamw": [{}]}
    table = solo_steps(resolved, {"ethanol-0": prepared_ethanol}, searched, SoloPlan(rounds=1), lambda line: None)
    assert [(step.optimizer, step.settings) for step in table.steps] == [("adamw", {}), ("soap", {"fctp_view": "flat"})]


def test_plain_and_refresh_steps_keep_their_rounds_and_the_steps_fill_the_time_asked_for(
    tmp_path: Path, tiny_ethanol: XtbData, prepared_ethanol: PreparedData, recorder: type[Recorder]
) -> None:
    drift = itertools.count()

    def seconds(task: TrialTask, steps: int) -> float:
        return (0.03 if task.hyperparameters.get("precondition_frequency") == ALWAYS else 0.01) + 1e-4 * next(drift)

    recorder.seconds_of = staticmethod(seconds)
    resolved = study(tmp_path, tiny_ethanol, "soap")
    resolved = replace(resolved, spaces={"soap": resolved.spaces["soap"].fix({"fctp_view": "flat"})})
    table = solo_steps(
        resolved, {"ethanol-0": prepared_ethanol}, {}, SoloPlan(rounds=3, seconds=0.2), lambda line: None
    )
    (step,) = table.steps
    assert step.refresh is not None
    assert step.plain.rounds_s == pytest.approx((0.0104, 0.0106, 0.0108))
    assert step.refresh.rounds_s == pytest.approx((0.0305, 0.0307, 0.0309))
    assert (step.plain.low_s, step.plain.median_s, step.plain.high_s) == pytest.approx((0.0105, 0.0106, 0.0107))
    assert step.plain.steps_per_round == math.ceil(0.2 / 0.01)
    assert step.refresh.steps_per_round == math.ceil(0.2 / 0.0301)
    assert step.mean(10).median_s == pytest.approx(0.0106 + (0.0307 - 0.0106) / 10)


@pytest.mark.parametrize("fails_in_pass", [0, 1, 3])
def test_a_step_that_fails_is_named_in_one_line_and_left_out_of_the_table(
    tmp_path: Path,
    tiny_ethanol: XtbData,
    prepared_ethanol: PreparedData,
    recorder: type[Recorder],
    fails_in_pass: int,
) -> None:
    def seconds(task: TrialTask, steps: int) -> float:
        if label(task)[1:] == ("soap", "merged", ALWAYS) and recorder.calls.count(label(task)) == fails_in_pass + 1:
            raise RuntimeError("no memory\nfor that")
        return 0.01

    recorder.seconds_of = staticmethod(seconds)
    resolved = study(tmp_path, tiny_ethanol, "adamw", "soap")
    said: list[str] = []
    table = solo_steps(resolved, {"ethanol-0": prepared_ethanol}, {}, SoloPlan(rounds=2), said.append)
    (line,) = [line for line in said if "left out" in line]
    assert line == "ethanol-0/soap (fctp_view merged): left out, RuntimeError: no memory for that"
    assert [step.settings for step in table.steps] == [{}, {"fctp_view": "per_type"}, {"fctp_view": "flat"}]


def test_a_model_that_cannot_be_traced_is_timed_by_the_lightning_engine_and_the_table_says_so(
    tmp_path: Path, tiny_ethanol: XtbData, prepared_ethanol: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Cohort, task: TrialTask) -> None:
        raise Untraceable("it reads a value")

    monkeypatch.setattr(Cohort, "join", refuse)
    said: list[str] = []
    resolved = study(tmp_path, tiny_ethanol, "adamw", "schedule_free")
    table = solo_steps(resolved, {"ethanol-0": prepared_ethanol}, {}, SoloPlan(rounds=2, seconds=0.01), said.append)
    assert said[0] == "ethanol-0: lightning engine, because its model cannot be traced: it reads a value"
    assert [(step.optimizer, step.engine) for step in table.steps] == [
        ("adamw", "lightning"),
        ("schedule_free", "lightning"),
    ]
    assert all(0 < step.plain.low_s <= step.plain.median_s <= step.plain.high_s for step in table.steps)


def test_the_table_says_where_and_with_what_it_was_measured(
    tmp_path: Path, tiny_ethanol: XtbData, prepared_ethanol: PreparedData, recorder: type[Recorder]
) -> None:
    resolved = study(tmp_path, tiny_ethanol, "adamw")
    table = solo_steps(resolved, {"ethanol-0": prepared_ethanol}, {}, SoloPlan(rounds=2), lambda line: None)
    assert (table.kind, table.accelerator, table.rounds) == ("cpu", None, 2)
    assert table.device == (table.environment["processor"] or "cpu")
    assert table.environment["packages"]["torch"]
    assert table.environment["data"] == {"ethanol-0": prepared_ethanol.hash}


def long(task: TrialTask, horizon: int = 64) -> TrialTask:
    workload = task.workload.model_copy(update={"max_steps": horizon})
    return replace(task, workload=workload, evaluation_steps=(horizon,))


def test_one_cohort_times_trials_of_several_rules_one_after_the_other_and_writes_no_result(make_task: MakeTask) -> None:
    ticks = itertools.count(0.0, 0.5)
    tasks = [long(make_task("adamw")), long(make_task("soap", precondition_frequency=ALWAYS))]
    timed = CohortSolo(tasks[0], None, lambda: next(ticks), compiled=False)
    assert [timed.seconds(task, 5) for task in (*tasks, *tasks)] == [0.5 / 5] * 4
    assert not (tasks[0].run / "curves").exists()
    assert not (tasks[0].run / "checkpoints").exists()


def test_a_cohort_runs_through_its_evaluation_steps_and_stops_before_its_horizon(make_task: MakeTask) -> None:
    task = make_task("adamw", steps=8, evaluation_steps=(2, 4, 8))
    cohort = Cohort(task, 1, compiled=False)
    cohort.join(task)
    cohort.run(6)
    assert cohort.state(task.key.trial_id).step == 6
    with pytest.raises(ValueError, match="run: found 3 steps, allowed: 2"):
        cohort.run(3)
    cohort.run(2)
    assert cohort.state(task.key.trial_id).step == 8
    assert cohort.trials == (task.key.trial_id,)


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free"])
def test_timed_steps_of_both_engines_are_the_same_training(make_task: MakeTask, optimizer: str) -> None:
    constant = Schedule(kind=ScheduleKind.CONSTANT, warmup_fraction=0.0)  # a timing of the lightning engine has none
    task = replace(long(make_task(optimizer)), schedule=constant)
    task = replace(task, workload=task.workload.model_copy(update={"clip_global_norm": 0.1}))
    alone = LightningSteps(task)
    alone.run(4)
    cohort = Cohort(task, 1, compiled=False)
    cohort.join(task)
    start = cohort.state(task.key.trial_id).weights
    cohort.run(4)
    state = cohort.state(task.key.trial_id)
    own = trainable_parameters(alone._module.model)
    moved = max(float((state.weights[name] - start[name]).abs().max()) for name in start)
    apart = max(float((own[name].detach() - weight).abs().max()) for name, weight in state.weights.items())
    assert apart < 1e-2 * moved


def test_lightning_steps_end_at_the_horizon(make_task: MakeTask) -> None:
    steps = LightningSteps(make_task("adamw", steps=4, evaluation_steps=(4,)))
    with pytest.raises(ValueError, match="run: found 5 steps, allowed: 4"):
        steps.run(5)


def test_lightning_times_each_trial_from_its_beginning(make_task: MakeTask) -> None:
    ticks = itertools.count(0.0, 0.5)
    timed = LightningSolo(make_task("adamw"), lambda: next(ticks))
    assert [timed.seconds(long(make_task(name)), 4) for name in ("adamw", "schedule_free")] == [0.5 / 4] * 2


def test_a_plan_has_step_times_of_every_arm(
    tmp_path: Path, tiny_ethanol: XtbData, prepared_ethanol: PreparedData
) -> None:
    resolved = study(tmp_path, tiny_ethanol, "adamw", "soap")
    seconds = step_seconds(resolved, {"ethanol-0": prepared_ethanol})
    assert seconds.keys() == {"ethanol-0/adamw", "ethanol-0/soap"}
    assert all(value > 0 for value in seconds.values())
