from __future__ import annotations

import pytest

from tunebench.tuning.stage import in_turn

TRIALS = {"a1": "a", "a2": "a", "a3": "a", "b1": "b", "b2": "b", "c1": "c"}


@pytest.mark.parametrize(
    ("devices", "order"),
    [
        (0, ["a1", "a2", "a3", "b1", "b2", "c1"]),
        (1, ["a1", "a2", "a3", "b1", "b2", "c1"]),
        (2, ["a1", "b1", "a2", "b2", "a3", "c1"]),
        (3, ["a1", "b1", "c1", "a2", "b2", "a3"]),
        (8, ["a1", "b1", "c1", "a2", "b2", "a3"]),
    ],
)
def test_as_many_workloads_begin_at_once_as_there_are_devices(devices: int, order: list[str]) -> None:
    assert in_turn(TRIALS, devices) == order


def test_no_trials_have_no_order() -> None:
    assert in_turn({}, 2) == []
