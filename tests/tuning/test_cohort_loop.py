"""The thread that owns a cohort, without Ray: what it reports, what waits for a decision, and what breaks."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine.conftest import MakeTask, make_task
from tunebench.engine.cohort import Cohort
from tunebench.engine.task import TrialTask
from tunebench.optim.realised import BrokenPromise
from tunebench.study.record import Reason
from tunebench.tuning.cohort_loop import Breakdown, CohortLoop, Report
from tunebench.tuning.trial_log import trial_log

__all__ = ["make_task"]


class Loop:
    """A loop with a cohort of four slots, and what it said in the order it said it."""

    def __init__(self) -> None:
        self.said: queue.Queue[tuple[str, Any]] = queue.Queue()
        self.loop = CohortLoop(
            report=lambda name, report: self.said.put((name, report)),
            resized=lambda slots: self.said.put(("resized", slots)),
            broke=lambda breakdown: self.said.put(("broke", breakdown)),
            threads=1,
        )
        self.loop.start()

    def do(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return self.loop.submit(work, *arguments).result(timeout=120)

    def open(self, task: TrialTask) -> None:
        assert self.do(self.loop.open, task, 4, 0, None) == 4

    def next(self) -> tuple[str, Any]:
        return self.said.get(timeout=120)

    def next_report(self) -> tuple[str, Report]:
        name, report = self.next()
        assert isinstance(report, Report), report
        return name, report


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.loop.end()


@pytest.fixture
def make_trial(make_task: MakeTask) -> Callable[..., TrialTask]:
    """Trials of one workload: 8 steps, evaluated at 2, 4 and 8, decided at 4."""

    def make(index: int = 0, **changes: Any) -> TrialTask:
        task = make_task(family="allegro", evaluation_steps=(2, 4, 8), **changes)
        return replace(task, key=replace(task.key, config_index=index), rungs=(4,))

    return make


MakeTrial = Callable[..., TrialTask]


def test_a_trial_waits_for_a_decision_at_its_rung_only(loop: Loop, make_trial: MakeTrial) -> None:
    task = make_trial()
    loop.open(task)
    loop.do(loop.loop.join, task)
    seen = [loop.next_report()[1] for _ in range(2)]
    assert [(report.evaluation.step, report.decides) for report in seen] == [(2, False), (4, True)]
    with pytest.raises(queue.Empty):
        loop.said.get(timeout=1.0)
    loop.do(loop.loop.go_on, task.key.trial_id)
    _, last = loop.next_report()
    assert (last.evaluation.step, last.evaluation.outcome, last.decides) == (8, Reason.FINISHED, False)


def test_a_stopped_trial_leaves_and_the_others_go_on(loop: Loop, make_trial: MakeTrial) -> None:
    one, other = make_trial(0), make_trial(1)
    loop.open(one)
    joins = [loop.loop.submit(loop.loop.join, task) for task in (one, other)]
    for join in joins:
        join.result(timeout=120)
    steps = [(name, report.evaluation.step) for name, report in (loop.next_report() for _ in range(4))]
    assert steps == [(task.key.trial_id, step) for step in (2, 4) for task in (one, other)]
    assert loop.do(loop.loop.leave, one.key.trial_id, Reason.STOPPED_ASHA) is True
    assert loop.do(loop.loop.leave, one.key.trial_id, None) is False
    loop.do(loop.loop.go_on, other.key.trial_id)
    name, report = loop.next_report()
    assert (name, report.evaluation.outcome) == (other.key.trial_id, Reason.FINISHED)


def test_a_trial_that_comes_back_at_its_rung_reports_it_again_and_does_not_step_before_the_decision(
    loop: Loop, make_trial: MakeTrial
) -> None:
    task = make_trial()
    loop.open(task)
    loop.do(loop.loop.join, task)
    before = [loop.next_report()[1] for _ in range(2)][-1].evaluation
    loop.do(loop.loop.leave, task.key.trial_id, None)
    loop.do(loop.loop.join, task)
    _, again = loop.next_report()
    assert (again.evaluation.step, again.evaluation.objective, again.decides) == (4, before.objective, True)
    with pytest.raises(queue.Empty):
        loop.said.get(timeout=1.0)
    loop.do(loop.loop.go_on, task.key.trial_id)
    _, last = loop.next_report()
    assert (last.evaluation.step, last.evaluation.attempts) == (8, 2)


def test_a_trial_that_ended_before_its_driver_knew_reports_its_end_again(loop: Loop, make_trial: MakeTrial) -> None:
    task = replace(make_trial(), rungs=())
    loop.open(task)
    loop.do(loop.loop.join, task)
    ends = [loop.next_report()[1].evaluation for _ in range(3)]
    loop.do(loop.loop.join, task)
    _, again = loop.next_report()
    assert (again.evaluation.outcome, again.evaluation.objective) == (Reason.FINISHED, ends[-1].objective)


def test_a_trial_that_no_further_attempt_can_help_ends_alone_and_its_log_says_why(
    loop: Loop, make_trial: MakeTrial
) -> None:
    good, bad = make_trial(0), replace(make_trial(1), hyperparameters={})
    loop.open(good)
    loop.do(loop.loop.join, bad)
    name, report = loop.next_report()
    assert (name, report.evaluation.outcome) == (bad.key.trial_id, Reason.CRASHED)
    assert report.evaluation.message.startswith("KeyError: 'learning_rate'")
    assert "Traceback" in trial_log(bad.run, bad.key.trial_id).read_text()
    loop.do(loop.loop.join, good)
    assert loop.next_report()[0] == good.key.trial_id


def test_a_trial_that_breaks_its_promise_ends_as_mismatched(
    loop: Loop, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_promise(*arguments: Any) -> None:
        raise BrokenPromise("treats half of the weights")

    task = make_trial()
    loop.open(task)
    monkeypatch.setattr("tunebench.engine.tenant.check_groups", break_promise)
    loop.do(loop.loop.join, task)
    _, report = loop.next_report()
    assert (report.evaluation.outcome, report.evaluation.message) == (Reason.MISMATCHED, "treats half of the weights")


@pytest.mark.parametrize(
    ("error", "out_of_memory"), [(RuntimeError("no\nstep"), False), (torch.OutOfMemoryError("no memory"), True)]
)
def test_what_breaks_the_step_ends_the_cohort_with_one_line(
    loop: Loop, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch, error: Exception, out_of_memory: bool
) -> None:
    def fail(cohort: Cohort) -> None:
        raise error

    task = make_trial()
    loop.open(task)
    monkeypatch.setattr(Cohort, "advance", fail)
    loop.do(loop.loop.join, task)
    name, breakdown = loop.next()
    assert name == "broke"
    assert isinstance(breakdown, Breakdown)
    assert breakdown.message == " ".join(str(error).split())
    assert breakdown.out_of_memory is out_of_memory
    alone = breakdown.reports.get(task.key.trial_id)
    assert (alone is not None and alone.outcome is Reason.OOM) is out_of_memory


def test_fewer_slots_than_there_were_are_made_known(
    loop: Loop, make_trial: MakeTrial, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Cohort.advance

    def shrink(cohort: Cohort) -> Any:
        cohort._halve()
        return advance(cohort)

    task = make_trial()
    loop.open(task)
    monkeypatch.setattr(Cohort, "advance", shrink)
    loop.do(loop.loop.join, task)
    assert loop.next() == ("resized", 2)
