from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock

import pytest
from ray.air.execution._internal import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.tune.execution import tune_controller

from tests.engine.conftest import MakeTask, make_task
from tunebench.engine.watchdog import STALLED
from tunebench.study.record import Reason
from tunebench.tuning import trainable
from tunebench.tuning.failures import node_is_gone, reason_of
from tunebench.tuning.reach import reached
from tunebench.tuning.tenancy import DEVICE, evaluation_of
from tunebench.tuning.trial_actors import use_trial_actors
from tunebench.tuning.trial_log import trial_log

__all__ = ["make_task"]

LOW_MEMORY = OutOfMemoryError("5 worker(s) were killed due to the node running low on memory.")
NODE_GONE = RayActorError(
    error_msg="The actor died unexpectedly.\n\tclass_name: A\nThe actor died because its node has died."
)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RayTaskError("train", "Traceback", RuntimeError("cuBLAS failed")), Reason.CRASHED),
        (RayActorError(error_msg="The actor is dead because its worker process has died."), Reason.CRASHED),
        (None, Reason.CRASHED),
        (OutOfMemoryError("Task was killed due to the node running low on memory."), Reason.OOM),
        ("Task was killed due to the node running low on memory.", Reason.OOM),
        (RayTaskError("train", "Traceback", MemoryError()), Reason.OOM),
        (NODE_GONE, Reason.PREEMPTED),
        (str(NODE_GONE), Reason.PREEMPTED),
        (RayActorError(preempted=True), Reason.PREEMPTED),
    ],
)
def test_a_crash_a_lack_of_memory_and_a_lost_node_are_told_apart(error: object, reason: Reason) -> None:
    assert reason_of(error) is reason
    assert node_is_gone(error) is (reason is Reason.PREEMPTED)


def test_an_error_that_would_come_again_ends_the_trial_at_its_first_attempt(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr(trainable.tune, "report", reports.append)
    task = make_task()
    trainable._train_alone(replace(task, hyperparameters={}), "H200")
    report = evaluation_of(reports[0])
    assert [each[DEVICE] for each in reports] == ["H200"]
    assert (report["outcome"], report["message"]) == ("CRASHED", "KeyError: 'learning_rate'")
    assert "Traceback" in trial_log(task.run, task.key.trial_id).read_text()


def test_an_error_that_may_pass_is_left_to_tune_which_starts_the_trial_again(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr("tunebench.engine.lightning.run_trial", fail)
    with pytest.raises(RuntimeError, match="CUDA error"):
        trainable._train_alone(make_task(), "")


def test_a_process_that_its_watchdog_has_ended_timed_out() -> None:
    stalled = f"its cohort is gone: {STALLED} 0:15:00, see cohort-0.stalled"
    assert reason_of(RayTaskError("train", "Traceback", RuntimeError(stalled))) is Reason.TIMED_OUT
    assert reason_of(stalled) is Reason.TIMED_OUT


def test_tune_takes_a_process_that_was_ended_for_lack_of_memory_as_one_that_died(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune_controller, "RayActorManager", RayActorManager)
    monkeypatch.setattr(RayActorManager, "_cleanup_actor", MagicMock())
    with pytest.raises(RuntimeError, match="unexpected exception"):
        tune_controller.RayActorManager(MagicMock())._actor_task_failed(MagicMock(), LOW_MEMORY)
    use_trial_actors(MagicMock())
    task = MagicMock()
    tune_controller.RayActorManager(MagicMock())._actor_task_failed(task, LOW_MEMORY)
    ((_, told),) = [call.args for call in task._on_error.call_args_list]
    assert isinstance(told, RayActorError)
    assert reason_of(told) is Reason.OOM


def test_who_calls_a_process_that_was_ended_for_lack_of_memory_finds_it_dead() -> None:
    async def failing() -> None:
        raise LOW_MEMORY

    with pytest.raises(RayActorError, match="low on memory"):
        asyncio.run(reached(failing))
