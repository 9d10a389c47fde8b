"""Real seats above simulated tenants, in simulated time."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from ray.air.execution import ResourceRequest
from ray.exceptions import RayTaskError

from benchmarks.simulated_cluster import Clock, Costs, Devices, FakeRay, Future, Load
from tests.benchmarks.test_scale_simulation import FREE
from tunebench.tuning import trial_actors
from tunebench.tuning.tenancy import VISIT, CohortLost
from tunebench.tuning.trial_actors import AFTER_LAST, SEAT, Seat, Seats

EVERY, HORIZON, STEP_S = 100, 400, 0.1


class Cluster:
    """One GPU below seats that are taken by hand."""

    def __init__(self, slots: int = 1, crashes: float = 0.0, **costs: float) -> None:
        load = Load(
            gpus=1, slots=slots, every_steps=EVERY, horizon=HORIZON, rungs=(200,), step_s=STEP_S, crashes=crashes
        )
        self.clock = Clock()
        charged = Costs(**{**FREE, **costs})
        self.devices = Devices(load, self.clock, charged, self._report)
        self.devices.plan(["trial"])
        self.ray = FakeRay(self.devices, self.clock, charged, 0)
        self._seats = Seats(Any, lambda: self.ray.reception)

    def _report(self, trial: str, step: int) -> dict[str, Any]:
        return {
            "trial": trial,
            "step": step,
            "at_rung": step == 200,
            "outcome": "FINISHED" if step == HORIZON else None,
        }

    def seat(self, trial: str) -> Seat:
        """What Tune takes for the actor of a trial."""
        taken = self._seats.acquire_resources(ResourceRequest([dict(SEAT)]))
        assert taken is not None
        (remote,) = taken.annotate_remote_entities([None])
        return remote.remote(config={"trial": trial})

    def first(self, *futures: Future) -> Future:
        """The first that is ready, whose time has come then."""
        (found,), _ = self.ray.module.wait(futures, num_returns=1, timeout=0.1)
        return found

    def told(self, future: Future) -> Any:
        """What a call is answered."""
        assert self.first(future) is future
        return self.ray.module.get(future)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cluster]:
    def made(**options: float) -> Cluster:
        found = Cluster(**options)
        monkeypatch.setattr(trial_actors, "ray", found.ray.module)
        return found

    return made


def test_a_seat_tells_every_report_of_its_trial_when_its_steps_are_done(cluster: Callable[..., Cluster]) -> None:
    one = cluster()
    seat = one.seat("trial")
    begun, told = [], []
    for _ in range(4):
        told.append(one.told(seat.train.remote()))
        begun.append(one.clock.now)
    assert [report["step"] for report in told] == [100, 200, 300, 400]
    assert [late - early for early, late in pairwise(begun)] == pytest.approx([10.0] * 3, abs=0.1)
    assert one.told(seat.train.remote()) == AFTER_LAST


def test_a_trial_that_is_stopped_at_a_rung_leaves_its_slot_to_the_next(cluster: Callable[..., Cluster]) -> None:
    one = cluster()
    first, second = one.seat("first"), one.seat("second")
    waits = None
    for _ in range(2):
        report = one.told(first.train.remote())
        waits = waits or second.train.remote()
    one.devices.vacate(report[VISIT])
    assert one.told(waits)["trial"] == "second"
    first.stop.remote()
    assert one.devices.taken() == 1, "what left its slot before leaves none again"


def test_who_takes_the_seat_of_another_goes_on_from_its_own_rung(cluster: Callable[..., Cluster]) -> None:
    one = cluster()
    seat = one.seat("first")
    for _ in range(2):
        one.told(seat.train.remote())
    for trial, step in (("second", 100), ("first", 300)):
        assert one.told(seat.reset.remote({"trial": trial})) is True
        report = one.told(seat.train.remote())
        assert (report["trial"], report["step"]) == (trial, step)


def test_a_trial_that_crashes_fails_in_its_seat_and_frees_its_slot(cluster: Callable[..., Cluster]) -> None:
    one = cluster(crashes=1.0)
    seat = one.seat("trial")
    with pytest.raises(RayTaskError) as raised:
        one.told(seat.train.remote())
    assert isinstance(raised.value.cause, CohortLost)
    assert one.devices.taken() == 0


def test_a_reception_passes_on_one_report_after_the_other(cluster: Callable[..., Cluster]) -> None:
    one = cluster(slots=4, report=1.0)
    asked = [one.seat(str(number)).train.remote() for number in range(4)]
    late = []
    for _ in range(4):
        found = one.first(*asked)
        asked.remove(found)
        late.append(one.clock.now - found.born)
    assert late == pytest.approx([1.0, 1.0, 2.0, 3.0], abs=0.1), "one stepped at once, the others together after it"
    assert one.devices.reception_s == 4.0


def test_calls_that_are_answered_are_found_before_objects(cluster: Callable[..., Cluster]) -> None:
    one = cluster()
    seat = one.seat("trial")
    report = seat.train.remote()
    one.clock.wait_until(1000.0)
    ready = one.seat("other").__ray_ready__.remote()
    assert one.first(ready, report) is report
    assert one.first(ready) is ready
