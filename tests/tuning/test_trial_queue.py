"""What Tune is handed while the room for trials changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ray.tune.experiment import Experiment

from tunebench.tuning.pool_client import TrialQueue


class Room:
    """Room that the test changes."""

    actor = None

    def __init__(self, tenants: int, others: int | None = None) -> None:
        self.tenants, self.alone = tenants, others

    def capacity(self) -> int:
        return self.tenants

    def others(self) -> int | None:
        return self.alone

    def vacate(self, trial: str, visit: str) -> None:
        raise AssertionError("a queue frees no slot")


def never_run(config: Mapping[str, Any]) -> None:
    raise AssertionError("trials are not run")


@pytest.fixture
def handed(tmp_path: Path) -> Any:
    """Makes a queue of two tenants and two other trials; what it hands over is in `called`."""

    def make(room: Room) -> tuple[TrialQueue, list[str]]:
        called: list[str] = []
        queue = TrialQueue(["t0", "t1", "a0", "a1"], ["t0", "t1"], room, called=called.append)
        number = queue.num_samples
        experiment = Experiment(
            "queue", never_run, config=queue.param_space, num_samples=number, storage_path=str(tmp_path)
        )
        queue.add_configurations([experiment])  # type: ignore[no-untyped-call]
        return queue, called

    return make


def test_nothing_begins_without_a_place(handed: Any) -> None:
    queue, called = handed(room := Room(0, 0))
    assert queue.next_trial() is None
    room.tenants = 1
    first = queue.next_trial()
    assert queue.next_trial() is None
    room.tenants = 2
    second = queue.next_trial()
    queue.on_trial_complete(first.trial_id)
    queue.on_trial_complete(second.trial_id)
    assert queue.next_trial() is None, "the others have no room"
    room.alone = 1
    assert queue.next_trial().config["trial"] == "a0"
    assert called == ["t0", "t1", "a0"]


def test_a_queue_that_has_handed_over_all_is_finished_though_no_place_is_left(handed: Any) -> None:
    queue, called = handed(room := Room(2))
    while queue.next_trial() is not None:
        pass
    assert called == ["t0", "t1", "a0", "a1"]
    room.tenants, room.alone = 0, 0
    assert queue.next_trial() is None
    assert queue.is_finished()


def test_the_first_promoted_trial_for_whose_kind_there_is_a_place_takes_it(handed: Any) -> None:
    queue, called = handed(Room(1, None))
    assert queue.first_with_room(["t1"], ["t0", "a0"]) is None
    assert queue.first_with_room(["t1", "a1"], ["t0", "a0"]) == "a1"
    assert queue.first_with_room(["t1", "a1"], ["a0", "a1"]) == "t1"
    assert called == ["a1", "t1"]
    queue, called = handed(Room(0, 0))
    assert queue.first_with_room(["t1", "a1"], []) is None
    assert called == []
