"""Tenants without Ray: what they ask of pool and cohorts, and what Tune takes for their actors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from ray.air.execution import ResourceRequest
from ray.exceptions import RayActorError, RayTaskError

from tunebench.tuning import reception as reception_module
from tunebench.tuning import trial_actors
from tunebench.tuning.pool import Fate
from tunebench.tuning.reception import Reception
from tunebench.tuning.tenancy import DEVICE, VISIT, CohortLost, evaluation_of
from tunebench.tuning.trial_actors import AFTER_LAST, SEAT, Seat, Seats
from tunebench.tuning.trial_log import trial_log

LAST = "FINISHED"


def evaluation(step: int, outcome: str | None = None) -> dict[str, Any]:
    return {"step": step, "objective": 1.0 / step, "outcome": outcome, "at_rung": step == 2}


class Cohort:
    """Gives the reports that it has, notes what it is told, and dies after the last of them unless that has an outcome.

    Args:
        reports: pairs of an evaluation and whether its trial waits for a decision.
    """

    def __init__(self, *reports: tuple[dict[str, Any], bool]) -> None:
        self.reports, self.told = reports, []
        for name in ("next_report", "go_on", "leave"):
            setattr(self, name, SimpleNamespace(remote=getattr(self, f"_{name}")))

    async def _next_report(self, trial: str, visit: str, heard: int) -> dict[str, Any]:
        if heard == len(self.reports):
            raise RayActorError(error_msg="dead")
        found, decides = self.reports[heard]
        return {"evaluation": found, "decides": decides}

    async def _go_on(self, trial: str, heard: int) -> None:
        self.told.append(("go_on", heard))

    def _leave(self, trial: str, visit: str) -> None:
        self.told.append(("leave", visit))


class Pool:
    """Gives these cohorts one after the other, then none; `fates` are those of the trials whose cohorts have died."""

    def __init__(self, *cohorts: Cohort, fates: tuple[Fate, ...] = ()) -> None:
        self.left, self.fates, self.visits, self.vacated = list(cohorts), list(fates), [], []
        self.place = SimpleNamespace(remote=self._place)
        self.fate = SimpleNamespace(remote=self._fate)
        self.vacate = SimpleNamespace(remote=lambda trial, visit: self.vacated.append(visit))

    async def _place(self, trial: str, reception: Any, visit: str) -> tuple[int, Cohort, str]:
        self.visits.append(visit)
        if not self.left:
            await asyncio.Event().wait()
        return 0, self.left.pop(0), "H200"

    async def _fate(self, cohort: int, trial: str) -> Fate:
        return self.fates.pop(0)


@pytest.fixture
def at_reception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Lets a coroutine function deal with the reception of a pool."""
    here = SimpleNamespace(get_runtime_context=lambda: SimpleNamespace(current_actor="reception"))
    monkeypatch.setattr(reception_module, "ray", here)

    def deal(pool: Pool, what: Callable[[Reception], Awaitable[Any]]) -> Any:
        async def inside() -> Any:
            return await asyncio.wait_for(what(Reception(pool, tmp_path, None, AFTER_LAST)), 10.0)

        return asyncio.run(inside())

    return deal


def test_a_trial_reports_until_its_last_and_goes_on_only_where_that_was_decided(at_reception: Any) -> None:
    cohort = Cohort((evaluation(1), False), (evaluation(2), True), (evaluation(3, LAST), False))
    pool = Pool(cohort)

    async def train(reception: Reception) -> list[dict[str, Any]]:
        return [await reception.train("stay", "trial") for _ in range(5)]

    *reports, fourth, fifth = at_reception(pool, train)
    assert [evaluation_of(report)["step"] for report in reports] == [1, 2, 3]
    assert {(report[VISIT], report[DEVICE]) for report in reports} == {(pool.visits[0], "H200")}
    assert fourth == fifth == AFTER_LAST
    assert cohort.told == [("go_on", 2), ("leave", pool.visits[0])]


def test_a_stay_that_ends_frees_its_slot_once(at_reception: Any) -> None:
    cohort = Cohort((evaluation(2), True))
    pool = Pool(cohort)

    async def come_and_go(reception: Reception) -> None:
        await reception.train("stay", "trial")
        await reception.leave("stay")
        await reception.leave("stay")

    at_reception(pool, come_and_go)
    assert (cohort.told, pool.vacated) == ([("leave", pool.visits[0])], [])


def test_who_is_sent_away_while_it_waits_for_a_place_takes_its_wish_back(at_reception: Any) -> None:
    pool = Pool()

    async def wait_in_vain(reception: Reception) -> dict[str, Any]:
        asked = asyncio.create_task(reception.train("stay", "trial"))
        while not pool.visits:
            await asyncio.sleep(0.01)
        await reception.leave("stay")
        return await asked

    assert at_reception(pool, wait_in_vain) == AFTER_LAST
    assert pool.vacated == pool.visits


def test_a_trial_whose_cohort_is_gone_through_no_fault_of_its_own_takes_another_place(
    at_reception: Any, tmp_path: Path
) -> None:
    pool = Pool(
        Cohort(), Cohort((evaluation(1), False)), fates=(Fate(message="its node is being drained", again=True),)
    )
    report = at_reception(pool, lambda reception: reception.train("stay", "trial"))
    assert report[VISIT] == pool.visits[1] != pool.visits[0]
    assert "it looks for another place: its node is being drained" in trial_log(tmp_path, "trial").read_text()


def test_a_trial_whose_cohort_has_crashed_fails_in_one_line(at_reception: Any, tmp_path: Path) -> None:
    pool = Pool(Cohort(), fates=(Fate(message="CUDA error"),))
    with pytest.raises(CohortLost, match="its cohort is gone: CUDA error"):
        at_reception(pool, lambda reception: reception.train("stay", "trial"))
    assert "its cohort is gone: CUDA error" in trial_log(tmp_path, "trial").read_text()


def test_a_trial_that_ended_with_its_cohort_gives_the_report_that_the_pool_has(at_reception: Any) -> None:
    pool = Pool(Cohort(), fates=(Fate(message="out of memory", report=evaluation(1, "OOM")),))
    report = at_reception(pool, lambda reception: reception.train("stay", "trial"))
    assert (report["outcome"], report["step"]) == ("OOM", 1)


def test_a_trial_that_is_refused_fails_with_what_the_pool_says(at_reception: Any) -> None:
    async def refuse(*arguments: Any) -> None:
        raise RayTaskError("place", "Traceback\n", RuntimeError("no device is left on which a cohort starts"))

    pool = Pool()
    pool.place = SimpleNamespace(remote=refuse)
    with pytest.raises(CohortLost, match="no device is left"):
        at_reception(pool, lambda reception: reception.train("stay", "trial"))


def test_ray_is_asked_for_the_resources_of_all_but_tenants() -> None:
    others, opened = MagicMock(), []
    seats = Seats(others, lambda: opened.append(MagicMock()) or opened[-1])
    tenant, alone = ResourceRequest([dict(SEAT)]), ResourceRequest([{"CPU": 1.0}])
    for request in (tenant, alone):
        seats.request_resources(request)
        seats.cancel_resource_request(request)
    assert [call.args[-1] for call in others.method_calls] == [alone, alone]
    taken = [seats.acquire_resources(tenant) for _ in range(2)]
    (first,) = taken[0].annotate_remote_entities([None])
    seat = first.remote(config={"trial": "trial"}, logger_creator=None)
    assert len(opened) == 1
    seat.train.remote()
    (stay, trial), _ = opened[0].train.remote.call_args
    seat.stop.remote()
    assert opened[0].leave.remote.call_args.args == (stay,)
    assert trial == "trial"


def test_another_trial_in_the_same_seat_has_a_stay_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_actors, "ray", SimpleNamespace(put=lambda value: value))
    reception = MagicMock()
    seat = Seat(reception, {"trial": "first"})
    seat.train.remote()
    assert seat.reset.remote({"trial": "second"}, storage=None) is True
    seat.train.remote()
    (first, _), (second, name) = [call.args for call in reception.train.remote.call_args_list]
    assert reception.leave.remote.call_args.args == (first,)
    assert second != first
    assert name == "second"


def test_the_death_of_the_tenants_process_is_no_trials_fault_until_it_has_died_four_times() -> None:
    opened: list[MagicMock] = []
    seats = Seats(MagicMock(), lambda: opened.append(MagicMock()) or opened[-1])
    counted = []
    for _ in range(4):
        seats.acquire_resources(ResourceRequest([dict(SEAT)]))
        told = [seats.lost(opened[-1], RayActorError()) for _ in range(32)]  # each of its tenants
        counted += [not error.preempted for error in told]
    assert len(opened) == 4
    assert counted == [False] * 96 + [True] * 32
