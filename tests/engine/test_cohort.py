"""Slots of a cohort against each other: neighbours, divergence, lack of memory, batches that do not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.fx import GraphModule

from tests.engine.conftest import Reports
from tests.engine.test_lightning import assert_same_state
from tunebench.engine import fused, rewrites, workload_functions
from tunebench.engine.batches import task_frames
from tunebench.engine.checkpoints import checkpoint_folder, load_checkpoint
from tunebench.engine.cohort import Cohort
from tunebench.engine.fused import unfuse
from tunebench.engine.lightning import run_trial
from tunebench.engine.padding import BatchShape, fits
from tunebench.engine.resident import resident_frames
from tunebench.engine.rewrites import long_sums_in_parts, padded_sums_as_concatenations
from tunebench.engine.slot_evaluation import SlotEvaluation
from tunebench.engine.slot_group import SlotGroup
from tunebench.engine.task import Evaluation, Seeds, TrialTask
from tunebench.engine.tenant import SlotState
from tunebench.engine.watchdog import Watchdog
from tunebench.study.record import Readout, Reason, Stage, TrialKey
from tunebench.study.search_space import SearchSpace
from tunebench.study.spec import (
    Arm,
    ExtxyzData,
    ExtxyzKeys,
    Family,
    Labels,
    Loss,
    Model,
    Objective,
    Schedule,
    SplitFrames,
    Workload,
)
from tunebench.workloads.data import PreparedData, cache_folder, prepare
from tunebench.workloads.order import batch_order

EXPLODES: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 1e12}


@dataclass(frozen=True)
class CrystalTrials:
    """Makes trials on silicon carbide cells of 2 and 4 atoms with stress, half of whose forces have labels.

    The model computes in float64, gradients are clipped, and every trial has a run of its own.
    """

    spec: ExtxyzData = field(repr=False)
    data: PreparedData = field(repr=False)
    runs: Path
    traces: Path
    written_every_s: float = 0.0
    _made: Any = field(default_factory=count)

    def task(
        self,
        optimizer: str = "adamw",
        *,
        index: int = 0,
        family: Family = Family.NEQUIP,
        stage: Stage = Stage.TUNE,
        steps: int = 8,
        evaluation_steps: Iterable[int] = (4, 8),
        clip_global_norm: float | None = 0.1,
        **hyperparameters: Any,
    ) -> TrialTask:
        space = SearchSpace.load(optimizer)
        workload = Workload(
            name="crystals",
            data=self.spec,
            model=Model(family=family, r_max_angstrom=3.3, dtype="float64"),
            loss=Loss(energy_per_atom=1.0, forces=1.0, stress=1.0),
            labels=Labels(force_fraction=0.5),
            batch_size=2,
            max_steps=steps,
            evaluation_batch_size=3,
            clip_global_norm=clip_global_norm,
        )
        return TrialTask(
            key=TrialKey(workload="crystals", optimizer=optimizer, stage=stage, config_index=index, seed_index=0),
            workload=workload,
            data=self.data,
            hyperparameters={**space.defaults(), **hyperparameters},
            averaged=Readout(space.readout),
            schedule=space.schedule_of(Arm(name=optimizer), Schedule()),
            objective=Objective(),
            seeds=Seeds(init=1 + index % 2, order=2 + index, labels=3 + index % 2),
            evaluation_steps=tuple(evaluation_steps),
            run=self.runs / f"run-{next(self._made)}",
            treats=space.treats,
            written_every_s=self.written_every_s,
        )

    def cohort(self, slots: int, like: TrialTask | None = None) -> Cohort:
        return Cohort(like or self.task(), slots, cache=self.traces, compiled=False)


def crystal_trials(folder: Path) -> CrystalTrials:
    """Crystals in a folder of their own, where trials then run; traces are shared by all tests of a session."""
    ase.io.write(folder / "crystals.xyz", _crystals(20, seed=1), format="extxyz")
    ase.io.write(folder / "strained.xyz", _crystals(3, seed=2), format="extxyz")
    spec = ExtxyzData(
        source="extxyz",
        train=str(folder / "crystals.xyz"),
        ood={"strained": str(folder / "strained.xyz")},
        frames=SplitFrames(train=13, val=4, test=3, ood=3),
        keys=ExtxyzKeys(config_type="size"),
    )
    return CrystalTrials(spec, prepare(spec), folder / "runs", cache_folder() / "traces")


def _crystals(number: int, seed: int) -> list[Atoms]:
    rng = np.random.default_rng(seed)
    frames = []
    for index in range(number):
        frame = bulk("SiC", "zincblende", a=4.36).repeat((2 if index % 3 == 0 else 1, 1, 1))
        if index % 3 != 1:
            frame.info["size"] = f"{len(frame)} atoms"
        frame.set_cell(frame.cell @ (np.eye(3) + rng.normal(scale=0.02, size=(3, 3))), scale_atoms=True)
        frame.positions += rng.normal(scale=0.1, size=frame.positions.shape)
        frame.calc = SinglePointCalculator(
            frame,
            energy=float(rng.normal(-5.0) * len(frame)),
            forces=rng.normal(size=(len(frame), 3)),
            stress=rng.normal(scale=0.1, size=6),
        )
        frames.append(frame)
    return frames


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> CrystalTrials:
    return crystal_trials(tmp_path_factory.mktemp("crystals"))


Decide = Callable[[str, Evaluation], None]


def run_cohort(cohort: Cohort, tasks: Iterable[TrialTask] = (), on_report: Decide | None = None) -> dict[str, Any]:
    """Join these trials, those that find no slot later, and step until nobody is left; returns reports by name.

    Every report lets its trial go on, after `on_report` has seen it.
    """
    waiting = list(tasks)
    found: dict[str, list[Evaluation]] = {task.key.trial_id: [] for task in waiting}
    while waiting or cohort.trials:
        while waiting and cohort.free > 0:
            cohort.join(waiting.pop(0))
        for name, report in cohort.advance():
            found.setdefault(name, []).append(report)
            if on_report is not None:
                on_report(name, report)
            if report.outcome is None and name in cohort.trials:
                cohort.go_on(name)
    return found


def measured(report: Evaluation) -> dict[str, Any]:
    """What a report says of the trial, without the clock's part of it."""
    plain = report.to_plain()
    return {key: plain[key] for key in ("step", "objective", "errors", "train_loss", "learning_rate", "outcome")}


def checkpoint(task: TrialTask) -> dict[str, Any]:
    """What the next step of a trial depends on, in its last checkpoint."""
    found = load_checkpoint(checkpoint_folder(task.run, task.key.trial_id))
    assert found is not None
    return {section: found[section] for section in ("module", "optimizer", "scheduler")}


def assert_same_trial(found: list[Evaluation], task: TrialTask, expected: list[Evaluation], other: TrialTask) -> None:
    """Reports and last checkpoints of two trials agree in every bit."""
    assert [measured(report) for report in found] == [measured(report) for report in expected]
    assert_same_state(checkpoint(task), checkpoint(other))


def assert_same_to_rounding(found: Iterable[Evaluation], expected: Iterable[Evaluation], relative: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.step, one.outcome, one.errors.keys()) == (other.step, other.outcome, other.errors.keys())
        assert one.learning_rate == pytest.approx(other.learning_rate, rel=1e-14)
        assert one.train_loss == pytest.approx(other.train_loss, rel=relative)
        assert one.objective == pytest.approx(other.objective, rel=relative)
        for split, readouts in other.errors.items():
            assert one.errors[split].keys() == readouts.keys()
            for readout, metrics in readouts.items():
                assert one.errors[split][readout] == pytest.approx(metrics, rel=relative)


def assert_same_slot(found: SlotState, expected: SlotState) -> None:
    assert_same_state(vars(found), vars(expected))


# --- neighbours ------------------------------------------------------------------------------------------------------

SLOTS, STEPS = 3, 10
SUBJECTS = ("adamw", "schedule_free", "muon", "lamb", "soap", "soap_muon")
SETTINGS = settings(
    max_examples=7,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking would take minutes
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@dataclass(frozen=True)
class Neighbour:
    """Another trial: when it joins and leaves, counted in calls of `advance`, and which of its reports it waits after.

    Its evaluations end the stretches of steps, so that things happen in the middle of what the subject does.
    """

    settings: dict[str, Any]
    joins: int
    stays: int
    evaluates_every: int
    pauses_after: int
    pause: int


def neighbours(subject: str) -> st.SearchStrategy[Neighbour]:
    kinds: list[dict[str, Any]] = [{"optimizer": subject}, {"optimizer": subject, "learning_rate": 3e-3}]
    kinds += [{"optimizer": "adamw"}, {"optimizer": "soap", "precondition_frequency": 2}, EXPLODES]
    return st.builds(
        Neighbour,
        settings=st.sampled_from(kinds),
        joins=st.integers(0, 8),
        stays=st.integers(1, 12),
        evaluates_every=st.integers(1, 5),
        pauses_after=st.integers(0, 3),
        pause=st.integers(0, 4),
    )


class Company:
    """Lets neighbours join, pause and leave a cohort as drawn, between two calls of `advance`."""

    def __init__(self, trials: CrystalTrials, cohort: Cohort, drawn: list[Neighbour]) -> None:
        self._trials, self._cohort, self._waiting = trials, cohort, list(drawn)
        self._index = count(1)
        self._inside: dict[str, tuple[Neighbour, int]] = {}
        self._reports: dict[str, int] = {}
        self._wakes: dict[str, int] = {}

    def act(self, now: int, keep_free: int = 0) -> None:
        for name in [name for name, wake in self._wakes.items() if wake <= now]:
            del self._wakes[name]
            self._cohort.go_on(name)
        for name in [name for name, (who, since) in self._inside.items() if now >= since + who.stays]:
            self._forget(name)
            self._cohort.leave(name, Reason.STOPPED_ASHA)
        for who in [who for who in self._waiting if who.joins <= now]:
            if self._cohort.free > keep_free:
                self._waiting.remove(who)
                self._join(who, now)

    def hear(self, name: str, report: Evaluation, now: int) -> None:
        self._reports[name] += 1
        if report.outcome is not None:
            self._forget(name)
            return
        who, _ = self._inside[name]
        self._wakes[name] = now + (who.pause if self._reports[name] == who.pauses_after else 0)

    def _join(self, who: Neighbour, now: int) -> None:
        at = sorted({*range(who.evaluates_every, STEPS, who.evaluates_every), STEPS})
        task = self._trials.task(index=next(self._index), steps=STEPS, evaluation_steps=at, **who.settings)
        self._cohort.join(task)
        self._inside[task.key.trial_id] = who, now
        self._reports[task.key.trial_id] = 0

    def _forget(self, name: str) -> None:
        del self._inside[name]
        self._wakes.pop(name, None)


@dataclass
class Trajectory:
    """All that can be seen of a trial: its reports, its state at each of them, and its last checkpoint."""

    task: TrialTask
    reports: list[Evaluation] = field(default_factory=list)
    states: list[SlotState] = field(default_factory=list)


def trajectory(trials: CrystalTrials, subject: str, drawn: list[Neighbour]) -> Trajectory:
    """A trial with these neighbours; those that join at 0 are in before it, and it gets what slot they leave."""
    more: dict[str, Any] = {"precondition_frequency": 3} if "soap" in subject else {}
    task = trials.task(subject, steps=STEPS, evaluation_steps=(2, 5, STEPS), **more)
    name, cohort = task.key.trial_id, trials.cohort(SLOTS, task)
    company, found = Company(trials, cohort, drawn), Trajectory(task)
    company.act(0, keep_free=1)
    cohort.join(task)
    now = 0
    while name in cohort.trials:
        for reporter, report in cohort.advance():
            if reporter != name:
                company.hear(reporter, report, now)
                continue
            found.reports.append(report)
            if report.outcome is None:
                found.states.append(cohort.state(name))
                cohort.go_on(name)
        now += 1
        company.act(now)
    return found


@pytest.fixture(scope="module")
def alone(trials: CrystalTrials) -> Callable[[str], Trajectory]:
    """A trial without neighbours, in a cohort of as many slots."""
    return lru_cache(lambda subject: trajectory(trials, subject, []))


def assert_undisturbed(found: Trajectory, expected: Trajectory) -> None:
    assert expected.reports[-1].outcome is Reason.FINISHED
    assert_same_trial(found.reports, found.task, expected.reports, expected.task)
    for state, other in zip(found.states, expected.states, strict=True):
        assert_same_slot(state, other)


CROWD = ("adamw", "muon", "adamw", "sgd")


def crowd(trials: CrystalTrials) -> list[TrialTask]:
    return [trials.task(optimizer, index=index) for index, optimizer in enumerate(CROWD)]


@pytest.fixture(scope="module")
def uncrowded(trials: CrystalTrials) -> list[list[Evaluation]]:
    """Reports of the crowd where memory suffices."""
    tasks = crowd(trials)
    found = run_cohort(trials.cohort(4), tasks)
    return [found[task.key.trial_id] for task in tasks]


@SETTINGS
@given(data=st.data(), subject=st.sampled_from(SUBJECTS))
def test_a_trial_is_the_same_in_every_bit_whoever_its_neighbours_are(
    trials: CrystalTrials, alone: Callable[[str], Trajectory], data: st.DataObject, subject: str
) -> None:
    drawn = data.draw(st.lists(neighbours(subject), min_size=1, max_size=4))
    assert_undisturbed(trajectory(trials, subject, drawn), alone(subject))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_trial_is_the_same_in_every_bit_beside_one_that_explodes_and_one_of_its_own_rule_that_joins_later(
    trials: CrystalTrials, alone: Callable[[str], Trajectory], subject: str
) -> None:
    usual: dict[str, Any] = {"stays": 99, "pauses_after": 0, "pause": 0}
    exploding = Neighbour(EXPLODES, joins=0, evaluates_every=1, **usual)
    late = Neighbour({"optimizer": subject}, joins=1, evaluates_every=1, **usual)
    assert_undisturbed(trajectory(trials, subject, [exploding, late]), alone(subject))


@pytest.mark.parametrize(("most", "batches", "frames"), [(3, 2, 2), (2, 2, 2), (1, 4, 1), (4, 1, 4), (32, 1, 4)])
def test_the_validation_split_is_evaluated_in_equal_batches_as_few_as_allowed(
    trials: CrystalTrials, most: int, batches: int, frames: int
) -> None:
    task = trials.task()
    task = replace(task, workload=task.workload.model_copy(update={"evaluation_batch_size": most}))
    found = trials.cohort(1, task)._functions.batches("val")
    assert (len(found), found.shape.frames - 1) == (batches, frames)


@pytest.mark.parametrize(("traced_from", "left"), [(0, 1), (3 * 4, 1), (3 * 4 + 1, 4)])
def test_the_last_of_four_trials_goes_on_in_as_few_rows_as_pay_for_their_trace_and_agrees_to_rounding(
    trials: CrystalTrials,
    uncrowded: list[list[Evaluation]],
    monkeypatch: pytest.MonkeyPatch,
    traced_from: int,
    left: int,
) -> None:
    rows = []
    gradients = Cohort._gradients

    def recorded(self: Cohort, function: Any, keys: Any, shape: BatchShape, bucket: int) -> None:
        rows.append(bucket)
        gradients(self, function, keys, shape, bucket)

    monkeypatch.setattr(Cohort, "_gradients", recorded)
    monkeypatch.setattr("tunebench.engine.cohort._TRACED_FROM", {"cpu": traced_from})
    tasks = crowd(trials)
    cohort, last = trials.cohort(4), tasks[-1].key.trial_id

    def stop_the_others(name: str, report: Evaluation) -> None:
        if name != last:
            cohort.leave(name, Reason.STOPPED_ASHA)

    found = run_cohort(cohort, tasks, stop_the_others)
    assert rows == [4] * 4 + [left] * 4
    assert_same_to_rounding(found[last], uncrowded[-1], 1e-9)


def test_whatever_is_traced_in_the_middle_of_training_has_as_much_time_as_the_first_trace(
    trials: CrystalTrials, monkeypatch: pytest.MonkeyPatch
) -> None:
    watchdog, tracing = Watchdog(900.0), list[tuple[str, float | None]]()

    def traced(function: Any, *arguments: Any) -> Any:
        tracing.append((type(function).__name__, watchdog.limit_s))
        return unfuse(function, *arguments)

    monkeypatch.setattr("tunebench.engine.workload_functions.unfuse", traced)
    monkeypatch.setattr("tunebench.engine.cohort._TRACED_FROM", {"cpu": 0})
    tasks = [trials.task(index=index) for index in range(4)]
    cohort = Cohort(tasks[0], 4, cache=trials.traces, compiled=False, watchdog=watchdog)
    limits: list[float | None] = []

    def leave_one_alone(name: str, report: Evaluation) -> None:
        limits.append(watchdog.limit_s)
        if name != tasks[-1].key.trial_id:
            cohort.leave(name, Reason.STOPPED_ASHA)

    run_cohort(cohort, tasks, leave_one_alone)
    assert tracing == [(name, 3600.0) for name in ("LossGradient", "Evaluate", "LossGradient")], "of four rows, of one"
    assert set(limits) == {900.0}


@pytest.mark.parametrize("family", Family)
def test_edges_in_multiples_and_sums_over_them_in_parts_as_on_a_gpu_agree_to_rounding(
    trials: CrystalTrials, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[int, list[Evaluation]]:
        task = trials.task(family=family)
        cohort = Cohort(task, 2, compiled=False)
        (reports,) = run_cohort(cohort, [task]).values()
        return cohort.padding.usual.edges, reports

    def in_parts(module: GraphModule) -> int:
        rewritten.append(long_sums_in_parts(module))
        return padded_sums_as_concatenations(module)

    rewritten: list[int] = []
    edges, expected = run()
    monkeypatch.setitem(workload_functions._EDGES_IN, "cpu", 32)
    monkeypatch.setattr(rewrites, "_LONG_SUM", 32)
    monkeypatch.setattr(rewrites, "_PART", 8)
    monkeypatch.setattr(fused, "padded_sums_as_concatenations", in_parts)
    rounded, found = run()
    assert edges % 32 != 0 == rounded % 32
    assert max(rewritten) > 0
    assert_same_to_rounding(found, expected, 1e-9)


def test_a_slot_that_diverges_says_so_once_and_its_place_is_taken(trials: CrystalTrials) -> None:
    exploding, last_to_join = trials.task(**EXPLODES), trials.task(index=3)
    cohort = trials.cohort(SLOTS)
    found = run_cohort(cohort, [exploding, trials.task(index=1), trials.task(index=2), last_to_join])
    (last,) = found[exploding.key.trial_id]
    expected = Reports()
    run_trial(trials.task(**EXPLODES), expected)
    assert (last.step, last.outcome) == (expected[-1].step, Reason.DIVERGED)
    assert last.message.startswith("training loss")
    assert [report.step for report in found[last_to_join.key.trial_id]] == [4, 8]
    assert cohort.free == SLOTS
    assert load_checkpoint(checkpoint_folder(exploding.run, exploding.key.trial_id)) is None

    undisturbed = trials.task(index=3)
    expected_last = run_cohort(trials.cohort(SLOTS), [undisturbed])[undisturbed.key.trial_id]
    assert_same_trial(found[last_to_join.key.trial_id], last_to_join, expected_last, undisturbed)


# --- ends ------------------------------------------------------------------------------------------------------------


def test_a_trial_over_its_time_limit_ends_as_under_lightning(trials: CrystalTrials) -> None:
    expected = Reports()
    run_trial(replace(trials.task(), time_limit_s=1e-6), expected)
    task = replace(trials.task(), time_limit_s=1e-6)
    (found,) = run_cohort(trials.cohort(SLOTS), [task])[task.key.trial_id]
    assert (found.step, found.outcome) == (4, Reason.TIMED_OUT) == (expected[-1].step, expected[-1].outcome)
    assert found.message.endswith("allowed: 1e-06 s")


def test_a_finished_trial_that_joins_again_reports_its_end_and_takes_no_slot(trials: CrystalTrials) -> None:
    task = trials.task()
    last = run_cohort(trials.cohort(SLOTS), [task])[task.key.trial_id][-1]
    cohort = trials.cohort(SLOTS)
    again, expected = cohort.join(task), Reports()
    run_trial(task, expected)
    assert again is not None
    assert (again.outcome, cohort.free, cohort.advance()) == (Reason.FINISHED, SLOTS, [])
    assert measured(again) == measured(last) == measured(expected[0])


def test_what_cannot_join_is_refused_in_one_line(trials: CrystalTrials) -> None:
    cohort, task = trials.cohort(2), trials.task()
    cohort.join(task)
    for wrong in (task, trials.task(index=1, steps=16, evaluation_steps=(16,))):
        with pytest.raises(ValueError, match=r"^join: found .* of crystals, allowed: a free slot and a new trial"):
            cohort.join(wrong)
    cohort.join(trials.task(index=1))
    with pytest.raises(ValueError, match=r"^join: found no free slot, allowed: [^\n]*$"):
        cohort.join(trials.task(index=2))
    assert len(cohort.trials) == 2


# --- memory ----------------------------------------------------------------------------------------------------------


def shortage(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("tried to allocate 1 GiB\nof 0")


def assert_crowd_finishes(
    trials: CrystalTrials, expected: list[list[Evaluation]], cohort: Cohort, tasks: list[TrialTask]
) -> None:
    found = run_cohort(cohort, tasks)
    for task, reports in zip(tasks, expected, strict=True):
        assert_same_to_rounding(found[task.key.trial_id], reports, 1e-9)


def when_crowded(cohort: Cohort, call: Callable[..., Any], after: int = 0) -> Callable[..., Any]:
    """The call, as a device would run it that has room for two slots; it runs out at the calls behind `after`."""
    calls = count()

    def run(*arguments: Any, **more: Any) -> Any:
        if cohort.slots > 2 and next(calls) >= after:
            shortage()
        return call(*arguments, **more)

    return run


@pytest.mark.parametrize("steps", [0, 6])
def test_lack_of_memory_for_gradients_halves_the_slots_and_loses_no_trial(
    trials: CrystalTrials,
    uncrowded: list[list[Evaluation]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    steps: int,
) -> None:
    cohort = trials.cohort(4)
    monkeypatch.setattr(Cohort, "_gradients", when_crowded(cohort, Cohort._gradients, after=steps))
    with caplog.at_level(logging.WARNING, logger="tunebench"):
        assert_crowd_finishes(trials, uncrowded, cohort, crowd(trials))
    assert cohort.slots == 2
    assert "crystals: out of memory with 4 slots, going on with 2" in caplog.text


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_lack_of_memory_for_one_rules_update_repeats_no_step_of_the_others(
    trials: CrystalTrials, uncrowded: list[list[Evaluation]], monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    cohort, update = trials.cohort(4), SlotGroup.update
    crowded, failures = when_crowded(cohort, update, after=steps), count()

    def fails_for_muon(group: SlotGroup, *arguments: Any) -> None:
        try:
            (crowded if type(group.rule).__name__ == "Muon" else update)(group, *arguments)
        except torch.OutOfMemoryError:
            next(failures)
            raise

    monkeypatch.setattr(SlotGroup, "update", fails_for_muon)
    assert_crowd_finishes(trials, uncrowded, cohort, crowd(trials))
    assert (cohort.slots, next(failures)) == (2, 1)  # nobody steps on while others cannot


def test_lack_of_memory_in_an_evaluation_measures_fewer_slots_at_once(
    trials: CrystalTrials, uncrowded: list[list[Evaluation]], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured_at_once: list[int] = []
    original = SlotEvaluation._sums

    def sums(evaluation: SlotEvaluation, places: list[Any], *arguments: Any) -> torch.Tensor:
        measured_at_once.append(len(places))
        if len(places) > 1:
            shortage()
        return original(evaluation, places, *arguments)

    monkeypatch.setattr(SlotEvaluation, "_sums", sums)
    cohort = trials.cohort(4)
    assert_crowd_finishes(trials, uncrowded, cohort, crowd(trials))
    assert cohort.slots == 4
    assert measured_at_once[:2] == [2, 1]


def test_a_trial_that_awaits_a_decision_waits_on_where_memory_takes_its_slot(
    trials: CrystalTrials, uncrowded: list[list[Evaluation]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = crowd(trials)
    names = [task.key.trial_id for task in tasks]
    cohort = trials.cohort(4)
    monkeypatch.setattr(Cohort, "_gradients", when_crowded(cohort, Cohort._gradients, after=4))
    found: dict[str, list[Evaluation]] = {name: [] for name in names}
    for task in tasks:
        cohort.join(task)
    for name, report in cohort.advance():
        found[name].append(report)
    for name in names[2:]:
        cohort.go_on(name)
    reports = cohort.advance()
    assert (cohort.slots, {name for name, _ in reports}) == (2, set(names[2:]))
    for name, report in reports:
        found[name].append(report)
    assert cohort.advance() == []  # both that are left await a decision
    assert [cohort.state(name).step for name in names[:2]] == [4, 4]
    for name in names[:2]:
        cohort.go_on(name)
    for name, report in cohort.advance():
        found[name].append(report)
    for name, expected in zip(names, uncrowded, strict=True):
        assert_same_to_rounding(found[name], expected, 1e-9)


def test_a_trial_that_does_not_fit_alone_ends_as_out_of_memory(
    trials: CrystalTrials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cohort, "_gradients", shortage)
    tasks = [trials.task(), trials.task(index=1)]
    cohort = trials.cohort(2)
    found = run_cohort(cohort, tasks)
    for task in tasks:
        (report,) = found[task.key.trial_id]
        assert (report.step, report.outcome, report.message) == (0, Reason.OOM, "tried to allocate 1 GiB")
    assert (cohort.slots, cohort.free) == (1, 1)


# --- mixed sizes -----------------------------------------------------------------------------------------------------


def test_a_batch_that_the_usual_shape_does_not_hold_takes_the_guaranteed_one(
    trials: CrystalTrials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunebench.engine.padding.MISFIT_SHARE", 0.3)
    tasks = [trials.task(index=index, steps=12, evaluation_steps=(6, 12)) for index in (0, 1)]
    cohort = trials.cohort(SLOTS, tasks[0])
    usual, guaranteed = cohort.padding.usual, cohort.padding.guaranteed
    assert usual.atoms < guaranteed.atoms
    sizes = resident_frames(task_frames(tasks[0], "train"), 3.3, "cpu").sizes
    fitting = [fits(sizes, batch_order(13, 2, 12, task.seeds.order), usual) for task in tasks]
    assert {(bool(one), bool(other)) for one, other in zip(*fitting, strict=True)} >= {(True, False), (False, True)}

    shapes = []
    gradients = Cohort._gradients

    def recorded(self: Cohort, function: Any, keys: Any, shape: BatchShape, bucket: int) -> None:
        shapes.append(shape)
        gradients(self, function, keys, shape, bucket)

    monkeypatch.setattr(Cohort, "_gradients", recorded)
    found = run_cohort(cohort, tasks)
    assert shapes.count(guaranteed) == sum(1 for both in zip(*fitting, strict=True) if not all(both))
    assert shapes.count(usual) == sum(1 for both in zip(*fitting, strict=True) if any(both))
    for index, task in enumerate(tasks):
        expected = Reports()
        run_trial(trials.task(index=index, steps=12, evaluation_steps=(6, 12)), expected)
        assert_same_to_rounding(found[task.key.trial_id], expected, 1e-10)


def test_lack_of_memory_for_the_guaranteed_shape_leaves_out_no_evaluation_of_trials_that_fit(
    trials: CrystalTrials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunebench.engine.padding.MISFIT_SHARE", 0.3)
    every = range(1, 13)
    tasks = [trials.task(index=index, steps=12, evaluation_steps=every) for index in (0, 1)]
    cohort, gradients = trials.cohort(SLOTS, tasks[0]), Cohort._gradients
    guaranteed = cohort.padding.guaranteed

    def no_room(self: Cohort, function: Any, keys: Any, shape: Any, bucket: int) -> None:
        if shape == guaranteed and self.slots == SLOTS:
            shortage()
        gradients(self, function, keys, shape, bucket)

    monkeypatch.setattr(Cohort, "_gradients", no_room)
    found = run_cohort(cohort, tasks)
    assert cohort.slots == 1
    assert [[report.step for report in reports] for reports in found.values()] == [list(every)] * 2
