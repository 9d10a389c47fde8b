"""GPUs, cohorts and tenants of a large cluster in simulated time, below a driver that is real.

What the driver does takes the time that it really takes on this machine: a clock adds its seconds on the processor and
its waits for the disk to the simulated time. Everything else costs nothing real: cohorts step for the time that steps
were measured to take, tenants report when their cohort has come to an evaluation, trials crash and devices are lost as
named seeds say. Places in cohorts are given by the pool's own `Placement`.

Tune's manager of actors and the seats that it takes for tenants' actors are the real ones, too. Only Ray below them is
replaced (`FakeRay`), with the reception that their calls go to. What those calls cost the driver, and the reception, is
measured apart (`scale_simulation.py`) and charged for each.
"""

from __future__ import annotations

import heapq
import os
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayTaskError

from tunebench.study.seeds import named_seed
from tunebench.tuning.handle import Handle
from tunebench.tuning.placement import Admit, Placement
from tunebench.tuning.tenancy import DEVICE, VISIT, CohortLost
from tunebench.tuning.trial_actors import AFTER_LAST

_COHORT_START_S = 30.0  # with traces and compiled graphs in the cache
_DEVICE_RETURNS_S = 300.0
_REPLY_S = 0.001  # between two processes
_PATIENCE_S, _PATIENCE = 2.0, 0.5  # of a cohort, for decisions and for trials to come, as in `cohort_loop`


@dataclass(frozen=True, kw_only=True)
class Load:
    """What the cluster has to do.

    Attributes:
        gpus: each with one cohort.
        slots: of a cohort.
        every_steps: between two evaluations. horizon: steps of a trial. rungs: steps.
        step_s: seconds of one step of a full cohort.
        crashes: share of the trials' evaluations before which the trial crashes.
        losses_per_day: of each device.
        seed: root of all draws.
    """

    gpus: int
    slots: int
    every_steps: int
    horizon: int
    rungs: tuple[int, ...]
    step_s: float
    crashes: float = 0.0
    losses_per_day: float = 0.0
    seed: int = 0

    @property
    def stretch_s(self) -> float:
        """Seconds between two evaluations."""
        return self.every_steps * self.step_s


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Seconds of the processor that a real Ray and a real reception take.

    Attributes:
        call: of the driver, for one method of an actor called, its answer fetched.
        put: of the driver, for one object put and fetched.
        wait: of the driver, for `ray.wait` on one future.
        wait_each: the same for every further future.
        stay: of the reception, for a tenant that comes, finds a place and leaves.
        report: of the reception, for a report asked for and passed on.
    """

    call: float
    put: float
    wait: float
    wait_each: float
    stay: float
    report: float


class Clock:
    """Simulated seconds, moved by what the driver really does and by what it waits for."""

    def __init__(self) -> None:
        self._now = self._idle = self._busy = 0.0
        self._since: float | None = None
        self._disk = 0.0

    @property
    def now(self) -> float:
        """Seconds since the start."""
        self._take()
        return self._now

    @property
    def busy_s(self) -> float:
        """Seconds in which the driver worked."""
        self._take()
        return self._busy

    def start(self) -> None:
        """From here on the driver works."""
        self._since = time.thread_time()

    def charge(self, seconds: float) -> None:
        """The driver works for so long without doing so here."""
        self._now += seconds
        self._busy += seconds

    def wait_until(self, when: float) -> None:
        """The driver waits."""
        self._now = max(self.now, when)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What is done inside is not the driver's work."""
        self._take()
        self._since = None
        try:
            yield
        finally:
            self._since = time.thread_time()

    @contextmanager
    def counting_the_disk(self) -> Iterator[None]:
        """Time in which the driver waits for the disk counts as well."""
        sync = os.fsync

        def counted(file: Any) -> None:
            began = time.perf_counter()
            used = time.thread_time()
            sync(file)
            self.charge(max(time.perf_counter() - began - (time.thread_time() - used), 0.0))

        os.fsync = counted
        try:
            yield
        finally:
            os.fsync = sync

    def _take(self) -> None:
        if self._since is not None:
            now = time.thread_time()
            self.charge(now - self._since)
            self._since = now


@dataclass(eq=False)
class Future:
    """A call's answer, or an object that was put.

    Attributes:
        born: when it was ready; where it is a report, when its cohort made it.
        report: it is one of a tenant. decides: and the trial waits for what the driver makes of it.
    """

    value: Any = None
    error: Exception | None = None
    born: float = 0.0
    report: bool = False
    decides: bool = False


@dataclass(eq=False)
class _Tenant:
    stay: str
    trial: str
    cohort: int | None = None
    held: bool = False  # at a rung
    over: bool = False
    reports: deque[tuple[float, dict[str, Any] | Exception]] = field(default_factory=deque)
    listener: Future | None = None


@dataclass(eq=False)
class _Cohort:
    members: dict[str, _Tenant] = field(default_factory=dict)
    joining: list[_Tenant] = field(default_factory=list)
    steps: bool = False
    since: float = 0.0  # when the stretch under way began
    stepping: int = 0  # trials in it
    waits_until: float = 0.0
    there: bool = False
    busy_s: float = 0.0
    slot_s: float = 0.0


class Devices:
    """Cohorts that step, and the tenants in their slots.

    The tenants are those of one reception, a process that does one thing after the other.

    Args:
        load: what there is to do.
        clock: of the simulation.
        costs: of which those of the reception are charged here.
        report: a plain report of a trial at a step, as a cohort's comes to Tune.

    Attributes:
        ready: answers of calls that the driver has not found yet.
        pool_s: seconds of the processor that the pool's decisions took.
        reception_s: the same of the reception.
        lost_devices: how many.
    """

    def __init__(self, load: Load, clock: Clock, costs: Costs, report: Callable[[str, int], dict[str, Any]]) -> None:
        self._load, self._clock, self._costs, self._report = load, clock, costs, report
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()
        self._at = 0.0
        self._steps: dict[str, int] = {}  # of each trial
        self._tenants: dict[str, _Tenant] = {}  # by stay
        self._in_queue: dict[str, _Tenant] = {}  # for a slot, by trial
        self._reception_free_at = 0.0
        self._cohorts = [_Cohort() for _ in range(load.gpus)]
        self._placement = Placement()
        self._crashes = np.random.default_rng(named_seed(load.seed, "crashes"))
        starts = np.random.default_rng(named_seed(load.seed, "starts"))
        losses = np.random.default_rng(named_seed(load.seed, "losses"))
        self.ready: list[Future] = []
        self.pool_s = self.reception_s = 0.0
        self.lost_devices = self.decisions = 0
        for number in range(load.gpus):
            self._later(_COHORT_START_S * starts.uniform(0.5, 2.0), lambda number=number: self._appear(number))
            if load.losses_per_day:
                self._later(losses.exponential(86400.0 / load.losses_per_day), lambda number=number: self._lose(number))

    def plan(self, trials: Sequence[str]) -> None:
        """These trials will come."""
        self._placement.plan((trial, "") for trial in trials)

    # --- for the driver --------------------------------------------------------------------------------------------

    def advance(self, until: float) -> None:
        """Let everything happen up to a time."""
        while self._events and self._events[0][0] <= until:
            self._next()

    def next_at(self) -> float | None:
        """When something happens next."""
        return self._events[0][0] if self._events else None

    def answer(self, future: Future, value: Any, born: float) -> None:
        """The answer of a call is there."""
        future.value, future.born = value, born
        self.ready.append(future)

    def train(self, future: Future, stay: str, trial: str) -> None:
        """As `Reception.train`: a tenant works on and answers with its next report."""
        self._put(self._clock.now + _REPLY_S, lambda: self._come(future, stay, trial))

    def leave(self, future: Future, stay: str) -> None:
        """As `Reception.leave`: a stay is over."""
        self._put(self._clock.now + _REPLY_S, lambda: self._go(future, stay))

    def vacate(self, stay: str) -> None:
        """The driver has stopped a trial, or lets it wait: its slot gets free though it has not left its seat."""
        tenant = self._tenants.get(stay)
        if tenant is not None:
            self._put(self._clock.now + _REPLY_S, lambda: self._leave_slot(tenant))

    def used(self) -> tuple[float, float]:
        """Seconds of all devices, and of all slots, in which a trial has stepped until now."""
        now, gpus, slots = self._clock.now, 0.0, 0.0
        for cohort in self._cohorts:
            under_way = min(max(now - cohort.since, 0.0), self._load.stretch_s) if cohort.steps else 0.0
            gpus += cohort.busy_s + under_way
            slots += cohort.slot_s + under_way * cohort.stepping
        return gpus, slots

    def taken(self) -> int:
        """Slots that have a trial."""
        return sum(len(cohort.members) + len(cohort.joining) for cohort in self._cohorts)

    # --- what happens ----------------------------------------------------------------------------------------------

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        self._put(self._at + seconds, what)

    def _put(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._number), what))

    def _next(self) -> None:
        self._at, _, what = heapq.heappop(self._events)
        what()

    def _appear(self, number: int) -> None:
        self._cohorts[number].there = True
        self._decide(lambda: self._placement.add(number))

    def _decide(self, change: Callable[[], Any]) -> None:
        """Let the pool take something in and act on what follows."""
        began = time.thread_time()
        change()
        moves = self._placement.moves()
        self.decisions += 1
        self.pool_s += time.thread_time() - began
        for move in moves:
            if isinstance(move, Admit):
                self._admit(self._in_queue.pop(move.trial), move.cohort)
            else:
                self._placement.ready(move.cohort, self._load.slots)
                self._later(0.0, lambda: self._decide(lambda: None))

    def _received(self, seconds: float, what: Callable[[], None]) -> None:
        """The reception comes to something, which takes it so long."""
        self._reception_free_at = max(self._at, self._reception_free_at) + seconds
        self.reception_s += seconds
        self._put(self._reception_free_at, what)

    def _come(self, future: Future, stay: str, trial: str) -> None:
        seconds = 0.0 if stay in self._tenants else self._costs.stay
        tenant = self._tenants.setdefault(stay, _Tenant(stay, trial))
        tenant.listener = future
        self._received(seconds, lambda: self._listen(tenant))

    def _listen(self, tenant: _Tenant) -> None:
        if tenant.listener is None:  # it was sent away
            return
        if tenant.cohort is None and tenant.trial not in self._in_queue and not tenant.reports and not tenant.over:
            self._queue(tenant)
        elif tenant.held and not tenant.reports:
            tenant.held = False
            self._step(tenant.cohort)
        self._hand_over(tenant)

    def _queue(self, tenant: _Tenant) -> None:
        self._in_queue[tenant.trial] = tenant
        self._decide(lambda: self._placement.wait(tenant.trial, ""))

    def _go(self, future: Future, stay: str) -> None:
        tenant = self._tenants.pop(stay, None)
        if tenant is not None:
            tenant.listener = None
            self._leave_slot(tenant)
        self.answer(future, None, self._at)

    def _admit(self, tenant: _Tenant, number: int) -> None:
        tenant.cohort = number
        self._cohorts[number].joining.append(tenant)
        self._step(number)

    def _step(self, number: int | None) -> None:
        """Begin a stretch, unless one is under way, somebody is worth waiting for, or nobody can step."""
        cohort = self._cohorts[number] if number is not None else None
        if cohort is None or number is None or cohort.steps or not cohort.there:
            return
        if self._at < cohort.waits_until and self._awaits(cohort):
            return
        for tenant in cohort.joining:
            cohort.members[tenant.trial] = tenant
        cohort.joining.clear()
        going = [tenant for tenant in cohort.members.values() if not tenant.held]
        if going:
            cohort.steps, cohort.since, cohort.stepping = True, self._at, len(going)
            self._later(self._load.stretch_s, lambda: self._stretched(number, cohort, going))

    def _awaits(self, cohort: _Cohort) -> bool:
        full = len(cohort.members) + len(cohort.joining) >= self._load.slots
        return any(tenant.held for tenant in cohort.members.values()) or (not full and self._placement.coming() > 0)

    def _stretched(self, number: int, cohort: _Cohort, going: list[_Tenant]) -> None:
        cohort.busy_s += self._load.stretch_s
        cohort.slot_s += self._load.stretch_s * len(going)
        if not cohort.there:
            return
        for tenant in going:
            if tenant.cohort == number and tenant.trial in cohort.members:
                self._evaluate(tenant)
        cohort.steps = False
        cohort.waits_until = self._at + min(_PATIENCE * self._load.stretch_s, _PATIENCE_S)
        self._put(cohort.waits_until, lambda: self._step(number))
        self._step(number)

    def _evaluate(self, tenant: _Tenant) -> None:
        if self._load.crashes and self._crashes.random() < self._load.crashes:
            self._fall_back(tenant)
            tenant.over = True
            tenant.reports.append((self._at, RayTaskError("train", "", CohortLost("its cohort is gone: as drawn"))))
            self._leave_slot(tenant)
        else:
            step = self._steps[tenant.trial] = self._steps.get(tenant.trial, 0) + self._load.every_steps
            tenant.held, tenant.over = step in self._load.rungs, step >= self._load.horizon
            tenant.reports.append((self._at, {**self._report(tenant.trial, step), VISIT: tenant.stay, DEVICE: ""}))
            if tenant.over:
                self._leave_slot(tenant)
        self._hand_over(tenant)

    def _fall_back(self, tenant: _Tenant) -> None:
        """What a trial has done since its last rung is lost."""
        step = self._steps.get(tenant.trial, 0)
        self._steps[tenant.trial] = max((rung for rung in self._load.rungs if rung <= step), default=0)

    def _hand_over(self, tenant: _Tenant) -> None:
        if tenant.listener is None or not (tenant.reports or tenant.over):
            return
        future, tenant.listener = tenant.listener, None
        born, found = tenant.reports.popleft() if tenant.reports else (self._at, dict(AFTER_LAST))
        if isinstance(found, Exception):
            future.error = found
        elif "outcome" in found:
            future.report, future.decides = True, found["at_rung"] or found["outcome"] is not None
        self._received(self._costs.report, lambda: self.answer(future, found, born))

    def _leave_slot(self, tenant: _Tenant) -> None:
        """A tenant leaves its slot, or takes back its wish for one; it may have done so before."""
        if self._in_queue.get(tenant.trial) is tenant:
            del self._in_queue[tenant.trial]
        elif tenant.cohort is None:
            return
        number, tenant.cohort, tenant.held = tenant.cohort, None, False
        if number is not None:
            cohort = self._cohorts[number]
            cohort.members.pop(tenant.trial, None)
            cohort.joining = [other for other in cohort.joining if other is not tenant]
        self._decide(lambda: self._placement.leave(tenant.trial))
        self._step(number)

    def _lose(self, number: int) -> None:
        """A device is gone, its trials look for other places, and it comes back later."""
        self.lost_devices += 1
        cohort = self._cohorts[number]
        there, cohort.there = [*cohort.members.values(), *cohort.joining], False
        lost = _Cohort(busy_s=cohort.busy_s, slot_s=cohort.slot_s)
        self._cohorts[number] = lost
        self._placement.remove(number)
        for tenant in there:
            tenant.cohort = None
            if tenant.held:  # its report is on its way; it comes back when the driver lets it go on
                tenant.held = False
            else:
                self._fall_back(tenant)
                self._queue(tenant)
        self._later(_DEVICE_RETURNS_S, lambda: self._appear(number))


class FakeRay:
    """What Tune's manager of actors, and the seats in it, ask of Ray.

    Args:
        devices: what the reception's tenants are on.
        clock: of the simulation.
        costs: of Ray's calls.
        seed: of the order in which futures that are ready at once are found.

    Attributes:
        latencies: seconds from each report to the end of the driver's work on it: of those that decide, and of others.
        futures: number of futures in each wait.
    """

    def __init__(self, devices: Devices, clock: Clock, costs: Costs, seed: int) -> None:
        self._devices, self._clock, self._costs = devices, clock, costs
        self._draw = random.Random(named_seed(seed, "futures"))
        self._objects: list[Future] = []
        self.latencies: dict[bool, list[float]] = {True: [], False: []}
        self.futures: list[int] = []
        self._at_work: Future | None = None

    @property
    def module(self) -> Any:
        """Takes the place of the module `ray`."""
        return SimpleNamespace(
            wait=self._wait,
            get=self._get,
            put=self._put,
            kill=lambda actor: None,
            actor=ray.actor,
            remote=ray.remote,
            ObjectRef=Future,
        )

    @property
    def reception(self) -> Handle:
        """Takes the place of the process of the tenants."""
        return SimpleNamespace(
            train=SimpleNamespace(remote=partial(self._called, self._devices.train)),
            leave=SimpleNamespace(remote=partial(self._called, self._devices.leave)),
        )

    def _called(self, method: Callable[..., None], *arguments: Any) -> Future:
        self._clock.charge(self._costs.call)
        with self._clock.stopped():
            future = Future()
            method(future, *arguments)
            return future

    def _put(self, value: Any) -> Future:
        self._clock.charge(self._costs.put)
        with self._clock.stopped():
            self._objects.append(Future(value))
            return self._objects[-1]

    def _wait(self, futures: Sequence[Future], num_returns: int, timeout: float) -> tuple[list[Future], list[Future]]:
        self._clock.charge(self._costs.wait + len(futures) * self._costs.wait_each)
        with self._clock.stopped():
            done, self._at_work = self._at_work, None
            if done is not None and done.report:
                self.latencies[done.decides].append(self._clock.now - done.born)
            self.futures.append(len(futures))
            self._at_work = self._found(futures)
            return ([] if self._at_work is None else [self._at_work]), []

    def _found(self, futures: Sequence[Future]) -> Future | None:
        """One that is ready, as if in a drawn order; the driver waits for the first where none is.

        Ray (2.60) finds objects that were put only where no call is answered, whatever their place in the list.
        """
        waited_for = set(futures)
        while True:
            self._devices.advance(self._clock.now)
            found = self._drawn(self._devices.ready, waited_for) or self._drawn(self._objects, waited_for)
            when = self._devices.next_at()
            if found is not None or when is None:
                return found
            self._clock.wait_until(when)

    def _drawn(self, ready: list[Future], waited_for: Collection[Future]) -> Future | None:
        while ready:
            chosen = self._draw.randrange(len(ready))
            ready[chosen], ready[-1] = ready[-1], ready[chosen]
            future = ready.pop()
            if future in waited_for:
                return future
        return None

    def _get(self, future: Future) -> Any:
        if future.error is not None:
            raise future.error
        return future.value
