from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.study.test_budget import capped
from tests.study.test_step_times import solo_step, table
from tunebench.study.journal import JournalWriter
from tunebench.study.plan import plan_arms
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import StudyError
from tunebench.study.step_times import DeviceTimes, add_tables, read_calibration
from tunebench.tuning.device_budget import budgets

ADAMW, FREE = "ethanol/adamw", "ethanol/schedule_free"


class Run:
    """A run directory whose arms search nine configurations, and what is said of their budgets."""

    def __init__(self, folder: Path, cap: float | None) -> None:
        self.study: ResolvedStudy = capped(folder, cap)
        self.folder, self.said = folder / "run", list[str]()
        self.arms = plan_arms(self.study)
        self.journal = JournalWriter(self.folder)
        for arm in self.arms:
            self.journal.add_arm(arm.name, {})

    def times(self, **seconds: float) -> DeviceTimes:
        return table(*(solo_step(name, [each]) for name, each in seconds.items()))

    def calibrate(self, device: str = "NVIDIA H200", **seconds: float) -> None:
        add_tables(self.folder, self.study.hash, [self.times(**seconds).model_copy(update={"device": device})])

    def afforded(self, **measured: float) -> dict[str, int]:
        searched: dict[str, Any] = {arm.name: [arm.space.defaults()] * arm.trials for arm in self.arms}
        measure = partial(self.times, **measured)
        given = budgets(self.study, searched, self.arms, self.folder, self.journal, self.said.append, measure)
        return {name: budget.count for name, budget in given.items()}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Run]:
    (tmp_path / "run").mkdir()
    return lambda cap=100.0: Run(tmp_path, cap)


def test_the_cap_pays_for_as_many_configurations_as_their_calibrated_steps_allow(make: Callable[..., Run]) -> None:
    run = make()
    run.calibrate(adamw=1.0, schedule_free=4.0)
    assert run.afforded() == {ADAMW: 9, FREE: 8}
    assert run.said == [f"{FREE}: 100 device-seconds pay for 8 of 9 configurations, 0 of them sentinels"]


def test_what_was_decided_stays_whatever_is_measured_later(make: Callable[..., Run]) -> None:
    run = make()
    run.calibrate(adamw=1.0, schedule_free=4.0)
    before = run.afforded()
    run.calibrate(adamw=9.0, schedule_free=1.0)
    assert make().afforded() == before


def test_steps_that_nobody_has_timed_are_timed_before_the_first_trial(make: Callable[..., Run]) -> None:
    run = make()
    run.calibrate(adamw=1.0)
    assert run.afforded(adamw=1.0, schedule_free=4.0) == {ADAMW: 9, FREE: 8}
    measured = read_calibration(run.folder, run.study.hash)
    assert measured is not None
    (times,) = measured.tables
    assert len(times.steps) == 2


def test_the_cap_is_counted_in_seconds_of_the_first_kind_of_device_that_has_all_steps(
    make: Callable[..., Run],
) -> None:
    run = make()
    run.calibrate("NVIDIA L4", adamw=100.0)
    run.calibrate("NVIDIA H200", adamw=1.0, schedule_free=4.0)
    run.calibrate("NVIDIA B200", adamw=0.1, schedule_free=0.1)
    assert run.afforded() == {ADAMW: 9, FREE: 8}


def test_an_arm_that_cannot_be_timed_has_no_cap_to_be_held_against(make: Callable[..., Run]) -> None:
    with pytest.raises(StudyError, match=rf"found no step time for 9 configurations of {FREE}"):
        make().afforded(adamw=1.0)


def test_a_cap_below_what_is_to_be_confirmed_names_the_least_and_decides_nothing(make: Callable[..., Run]) -> None:
    run = make(17.0)
    run.calibrate(adamw=0.1, schedule_free=1.0)
    with pytest.raises(StudyError, match=r"found 17 for .*schedule_free, allowed: 18 or more, .* 2 configurations"):
        run.afforded()
    assert run.journal.afforded(ADAMW, 9) is None


def test_without_a_cap_nothing_is_timed(make: Callable[..., Run]) -> None:
    assert make(None).afforded() == {ADAMW: 9, FREE: 9}
