"""The number of slots is what the device at hand is measured to be worth."""

from __future__ import annotations

import pytest
import torch

from tests.engine.conftest import MakeTask
from tunebench.engine.cohort import Cohort
from tunebench.engine.slots import SlotTiming, automatic_slots, chosen, measure_slots


def timings(*step_s: float) -> list[SlotTiming]:
    return [SlotTiming(slots=1 << index, step_s=seconds, memory_bytes=0) for index, seconds in enumerate(step_s)]


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (timings(1.0, 1.0, 1.0, 1.0), 8),
        (timings(1.0, 2.0, 4.0), 1),
        (timings(1.0, 1.2, 1.6, 3.1, 6.2), 4),
        (timings(1.0, 2.1, 1.2), 4),
        (timings(1.0), 1),
    ],
)
def test_the_knee_is_where_doubling_stops_paying_for_good(measured: list[SlotTiming], expected: int) -> None:
    assert chosen(measured) == expected


def test_slots_are_measured_with_real_steps_of_the_workload(make_task: MakeTask) -> None:
    task = make_task(family="allegro", steps=40, evaluation_steps=(40,))
    measured = measure_slots(task, 4, lambda found, device: True)
    assert [timing.slots for timing in measured] == [1, 2, 4]
    assert all(timing.step_s > 0 for timing in measured)


def test_running_out_of_memory_ends_the_measurement_with_what_fits(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Cohort.run

    def full_at_two_slots(cohort: Cohort, steps: int) -> None:
        if len(cohort.trials) >= 2:
            raise torch.OutOfMemoryError("no room")
        run(cohort, steps)

    monkeypatch.setattr(Cohort, "run", full_at_two_slots)
    assert automatic_slots(make_task(family="allegro"), most=8) == 1


def test_the_measurement_leaves_nothing_in_the_run(make_task: MakeTask) -> None:
    task = make_task(family="allegro")
    assert automatic_slots(task, most=2) in (1, 2)
    assert not task.run.exists()
