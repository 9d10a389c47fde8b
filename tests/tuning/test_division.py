"""Arms are divided whole, and places so that none is taken twice and none stays empty."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunebench.study.record import Reason, Stage, TrialKey
from tunebench.tuning.division import Places, divided_arms
from tunebench.tuning.entries import Called, Decided, Ended, Entry, Started, Waiting

ARMS = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(0, 50), max_size=12)


def key(index: int, workload: str = "w") -> TrialKey:
    return TrialKey(workload=workload, optimizer="adamw", stage=Stage.TUNE, config_index=index, seed_index=0)


def ended(trial: TrialKey) -> Ended:
    return Ended(key=trial, reason=Reason.FINISHED, value=1.0, detail={}, ledger={}, result={})


def decided(trial: TrialKey, *, goes_on: bool) -> Decided:
    return Decided(key=trial, decision={"goes_on": goes_on, "sentinel": False})


@given(reports=ARMS, drivers=st.integers(1, 6))
def test_every_open_arm_has_one_driver_and_every_driver_an_arm(reports: dict[str, int], drivers: int) -> None:
    shares = divided_arms(reports, drivers)
    assert sorted(arm for share in shares for arm in share) == sorted(arm for arm in reports if reports[arm])
    assert len(shares) <= drivers
    assert all(shares)


@given(reports=ARMS, drivers=st.integers(1, 6))
def test_no_driver_could_be_relieved_by_giving_an_arm_away(reports: dict[str, int], drivers: int) -> None:
    shares = divided_arms(reports, drivers)
    loads = [sum(reports[arm] for arm in share) for share in shares]
    for share, load in zip(shares, loads, strict=True):
        assert all(load - reports[arm] <= min(loads) for arm in share)


def test_equal_arms_of_each_workload_go_to_all_drivers() -> None:
    arms = {f"{workload}/{optimizer}": 40 for workload in "ab" for optimizer in ("adamw", "lamb", "muon", "soap")}
    for share in divided_arms(arms, 2):
        assert sorted(arm[0] for arm in share) == ["a", "a", "b", "b"]


def test_places_go_by_need_and_come_back_when_a_driver_has_ended() -> None:
    places = Places([{f"a{n}": "w" for n in range(30)}, {f"b{n}": "w" for n in range(10)}])
    assert [places.give(driver, 8) for driver in range(2)] == [6, 2]
    places.end(0)
    assert [places.give(driver, 8) for driver in range(2)] == [0, 8]


def test_a_driver_without_a_place_gets_one_before_long() -> None:
    """One place and two drivers: who waits at a rung or has ended makes way."""
    first, second = key(0), key(1)
    places = Places([{first.trial_id: "w"}, {second.trial_id: "w"}])
    assert [places.give(driver, 1) for driver in range(2)] == [1, 0]
    places.take(0, [Called(key=first), Started(key=first, engine="cohort"), Waiting(key=first, for_rung=True)])
    assert [places.give(driver, 1) for driver in range(2)] == [0, 0]  # the first has not heard of it yet
    places.take(0, [])
    assert [places.give(driver, 1) for driver in range(2)] == [0, 1]
    places.take(1, [Called(key=second), ended(second)])
    places.take(0, [decided(first, goes_on=True)])
    assert places.give(1, 1) == 0
    places.take(1, [])
    assert places.give(0, 1) == 1


def test_places_fill_one_workload_after_the_other() -> None:
    """A device trains one workload at a time; half of its slots would be empty if a driver began the next one."""
    shares = [{**{f"{d}a{n}": "a" for n in range(4)}, **{f"{d}b{n}": "b" for n in range(20)}} for d in range(2)]
    del shares[1]["1a0"], shares[1]["1a1"]
    assert [Places(shares).give(0, 6), Places(shares).give(1, 6)] == [4, 2]


def test_a_trial_that_a_pause_of_the_run_stopped_needs_its_place_again() -> None:
    paused, at_rung = key(0), key(1)
    places = Places([{paused.trial_id: "w", at_rung.trial_id: "w"}])
    places.take(0, [Called(key=paused), Called(key=at_rung)])
    places.take(0, [Waiting(key=paused, for_rung=False), Waiting(key=at_rung, for_rung=True)])
    assert places.give(0, 8) == 1
    places.take(0, [decided(at_rung, goes_on=False)])
    assert places.give(0, 8) == 1
    places.take(0, [decided(at_rung, goes_on=True)])
    assert places.give(0, 8) == 2


class _Driver:
    """Takes trials to places as its lease allows, and tells what it does a moment later."""

    def __init__(self, number: int, trials: int) -> None:
        self.unbegun = [key(1000 * number + index, f"w{index % 2}") for index in range(trials)]
        self.placed: list[TrialKey] = []
        self.waiting: list[TrialKey] = []
        self.lease = 0
        self.outbox: list[Entry] = []

    def act(self, draw: np.random.Generator) -> None:
        while self.unbegun and len(self.placed) < self.lease:
            self._tell(Called(key=self.unbegun[0]))
            self.placed.append(self.unbegun.pop(0))
        for trial in list(self.placed):
            match draw.integers(4):
                case 0:
                    self._leave(trial, ended(trial))
                case 1:
                    self._leave(trial, Waiting(key=trial, for_rung=True))
                    self.waiting.append(trial)
        for trial in list(self.waiting):
            if draw.random() < 0.5:
                self.waiting.remove(trial)
                self._tell(decided(trial, goes_on=True))
                self.unbegun.append(trial)

    def _tell(self, entry: Entry) -> None:
        self.outbox.append(entry)

    def _leave(self, trial: TrialKey, entry: Entry) -> None:
        self.placed.remove(trial)
        self._tell(entry)

    def is_over(self) -> bool:
        return not (self.unbegun or self.placed or self.waiting)


def _rounds(drivers: list[_Driver], places: Places, capacity: int, draw: np.random.Generator) -> Iterator[None]:
    while not all(driver.is_over() for driver in drivers):
        number = int(draw.integers(len(drivers)))
        driver = drivers[number]
        driver.act(draw)
        if draw.random() < 0.5:
            entries, driver.outbox = driver.outbox, []
            places.take(number, entries)
            driver.lease = places.give(number, capacity)
        yield


@pytest.mark.parametrize("seed", range(20))
def test_drivers_together_never_have_more_trials_in_places_than_there_are_and_come_to_an_end(seed: int) -> None:
    draw = np.random.default_rng(seed)
    drivers = [_Driver(number, int(draw.integers(1, 25))) for number in range(int(draw.integers(1, 5)))]
    shares = [{trial.trial_id: trial.workload for trial in driver.unbegun} for driver in drivers]
    places, capacity = Places(shares), int(draw.integers(1, 9))
    for count, _ in enumerate(_rounds(drivers, places, capacity, draw)):
        assert sum(len(driver.placed) for driver in drivers) <= capacity
        assert count < 5000, "somebody waits for a place for ever"
