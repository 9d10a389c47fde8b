"""The pool of cohorts: one per device over the whole cluster, growing and shrinking with it.

The pool is an actor without a share of any device. Tenants (`tunebench.tuning.tenancy`) ask it for a place, and then
deal with their cohort directly.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tunebench.engine.task import TrialTask
from tunebench.engine.watchdog import why_ended
from tunebench.study.record import Reason
from tunebench.study.spec import Resources
from tunebench.study.storage import Storage
from tunebench.tuning.cohort_actor import CohortActor
from tunebench.tuning.devices import Device, devices_of, most_frequent_first, waits_for_kind
from tunebench.tuning.failures import node_is_gone, one_line, reason_of
from tunebench.tuning.handle import Handle
from tunebench.tuning.node_checks import Node, Standard, alive_nodes, on_node
from tunebench.tuning.node_copy import run_here
from tunebench.tuning.node_watch import NodeWatch
from tunebench.tuning.placement import Admit, Placement
from tunebench.tuning.reach import reached
from tunebench.tuning.trial_log import LOGS, cohort_stall_file, log_to

log = logging.getLogger(__name__)

_LOOK_AT_CLUSTER_S = 2.0
_ASLEEP_S = 5.0  # after this time a device without work goes back, where others wait for devices
_FAILED_STARTS = 3
_FATE_S = 60.0
_CALLS_AT_ONCE = 4096  # every trial of a cohort waits in one
_USUAL_SLOTS = {"cpu": 8, "cuda": 32}  # of a cohort that has not said how many it has
# glibc gives every large tensor's memory back to the system, whose fresh pages take up to a fifth of a step on a CPU.
_KEEPS_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}
_MEASURED_FROM = {"cpu": 20_000, "cuda": 200_000}  # trial-steps to come; measuring slots takes as long as thousands


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What became of a trial whose cohort is gone.

    Attributes:
        message: why it is gone.
        again: the trial may ask for another place, at no cost.
        report: its last evaluation, where it ended so.
    """

    message: str
    again: bool = False
    report: dict[str, Any] | None = None


@dataclass
class _Cohort:
    """A cohort's actor on its device.

    Attributes:
        expects: whether it was told last that trials are to come.
    """

    device: Device
    actor: Handle
    expects: bool = False
    opened: bool = False
    leaving: bool = False
    asleep_since: float = math.inf


@dataclass(frozen=True)
class _End:
    """How a cohort ended."""

    message: str
    again: bool = False
    reports: Mapping[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class _Applicant:
    """A tenant that waits for a place; `reception` is the process that it lives in."""

    reception: Handle
    visit: str
    place: asyncio.Future[tuple[int, Handle, str]]


class Pool:
    """Gives places in cohorts to trials, and devices to cohorts.

    Args:
        resources: what the study says of devices, slots and failures.
        run: the run directory. storage: of the run, or None.
        standard: what a node must be to get trials; None takes every node as it is.
    """

    def __init__(
        self, resources: Resources, run: Path, storage: Storage | None = None, standard: Standard | None = None
    ) -> None:
        self._resources, self._run, self._storage = resources, run, storage
        self._slots = resources.slots if isinstance(resources.slots, int) else None
        self._losses: Counter[str] = Counter()
        self._placement = Placement()
        self._tasks: dict[str, TrialTask] = {}
        self._applicants: dict[str, _Applicant] = {}
        self._visits: dict[str, str] = {}
        self._cohorts: dict[int, _Cohort] = {}
        self._ends: dict[int, asyncio.Future[_End]] = {}
        self._sizes: dict[str, int] = {}
        self._limits: dict[str, int] = {}
        self._failed_starts: dict[Device, int] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._looks = False
        self._others_wait = False
        self._events: list[str] = []
        self._alike = False
        self._kinds: dict[str, str] = {}
        self._bound: dict[str, str] = {}
        self._watch = NodeWatch(standard, self._tell)
        self._keeps_log = log_to(run / LOGS / "pool.log")
        self._keeps_log.__enter__()

    # --- for the driver --------------------------------------------------------------------------------------------

    async def plan(
        self,
        tasks: Mapping[str, TrialTask],
        others_wait: bool,
        kinds: Mapping[str, str] | None = None,
        bound: Mapping[str, str] | None = None,
    ) -> None:
        """A stage begins: these trials will ask for places, and others may wait for the devices.

        Args:
            tasks: trials by name.
            others_wait: whether trials without a cohort wait for devices.
            kinds: where all trials of a workload are to train on one kind of device, the kind by workload as far as it
                is known; the others get the kind of which there are most. None takes devices of every kind.
            bound: kinds of device by workload of trials without a cohort, which Ray keeps to them.
        """
        self._tasks, self._others_wait = dict(tasks), others_wait
        self._alike, self._kinds, self._bound = kinds is not None, dict(kinds or {}), dict(bound or {})
        self._placement.bind(self._kinds)
        self._placement.plan((name, task.workload.name) for name, task in tasks.items())
        if not self._looks:
            self._looks = True
            self._later(self._look_at_cluster())
        self._grow()

    async def look(self, heard: int) -> tuple[int, list[str]]:
        """Trials that may ask for a place at once, and events, but the first ones.

        They are as many as can be in on all devices of the cluster, at least 1, and as many again as one device takes
        where there are several workloads: trials of one may have to wait while another's have slots to spare.

        Args:
            heard: events that the driver has told already.
        """
        sizes = [self._size(name) for name in {task.workload.name for task in self._tasks.values()}]
        devices = max(len(self._usable_devices()), 1) + (len(sizes) > 1)
        return devices * max(sizes, default=1), self._events[heard:]

    async def vacate(self, trial: str, visit: str) -> None:
        """A trial waits at a rung or was stopped: its slot is free, unless it has come back already."""
        if self._visits.get(trial) == visit:
            await self._clear_out(trial)

    # --- for tenants -----------------------------------------------------------------------------------------------

    async def place(self, trial: str, reception: Handle, visit: str) -> tuple[int, Handle, str]:
        """A place for a trial's visit, as soon as there is one: the cohort's number, actor and kind of device.

        Raises:
            RuntimeError: the trial is refused, or no device is left; one line.
        """
        await self._clear_out(trial)
        self._visits[trial] = visit
        applicant = _Applicant(reception, visit, asyncio.get_running_loop().create_future())
        self._applicants[trial] = applicant
        self._wait(trial)
        self._grow()
        self._move()
        return await applicant.place

    async def fate(self, cohort: int, trial: str) -> Fate:
        """Why a trial's cohort is gone, and what the trial is to do."""
        try:
            end = await asyncio.wait_for(asyncio.shield(self._ends[cohort]), _FATE_S)
        except TimeoutError:
            end = _End("its cohort cannot be reached")
        report = end.reports.get(trial)
        return Fate(message=end.message, again=end.again and report is None, report=report)

    # --- for cohorts -----------------------------------------------------------------------------------------------

    async def left(self, cohort: int, trial: str, visit: str) -> None:
        """A trial's visit to its slot is over."""
        if self._placement.place_of(trial) == cohort and self._visits.get(trial) == visit:
            self._placement.leave(trial)
        self._move()

    async def resized(self, cohort: int, slots: int) -> None:
        """A cohort goes on with fewer slots, because memory was too small for all."""
        workload = self._placement.workload_of(cohort)
        if workload is not None:
            self._sizes[workload] = self._limits[workload] = slots
            self._placement.ready(cohort, slots)

    async def broken(self, cohort: int, message: str, out_of_memory: bool, reports: dict[str, dict[str, Any]]) -> None:
        """A cohort has broken; where its memory was too small, the next ones of its workload have half the slots."""
        if out_of_memory:
            self._halve(cohort)
        self._lose(cohort, _End(message, again=out_of_memory, reports=reports))

    # --- devices -----------------------------------------------------------------------------------------------------

    async def _look_at_cluster(self) -> None:
        while True:
            for node in self._watch.newcomers():
                self._later(self._check(node))
            await asyncio.sleep(_LOOK_AT_CLUSTER_S)
            for number in self._on_leaving_nodes():
                self._later(self._clear_node(number))
            self._grow()
            self._tell_of_missing_kinds()
            self._give_back()
            self._move()

    def _on_leaving_nodes(self) -> list[int]:
        """Cohorts that have not been told yet that their node is to go; what is returned counts as told."""
        leaving = self._watch.leaving()
        found = [n for n, cohort in self._cohorts.items() if cohort.device.node in leaving and not cohort.leaving]
        for number in found:
            self._cohorts[number].leaving = True
            self._placement.retire(number)
        return found

    async def _clear_node(self, number: int) -> None:
        """Have a cohort's trials saved, to go on elsewhere; its node may be gone before that."""
        actor = self._cohorts[number].actor
        try:
            await reached(actor.save.remote)
        except (RayActorError, RayTaskError) as error:
            log.warning("cohort %d could not save its trials: %s", number, one_line(error))
        self._lose(number, _End("its node is being drained", again=True))

    async def _check(self, node: Node) -> None:
        await self._watch.check(node)
        self._grow()

    def _tell(self, event: str) -> None:
        log.warning("%s", event)
        self._events.append(event)

    def _bind(self) -> None:
        """Give workloads whose trials are to train alike the kind of device of which there are most."""
        unbound = {task.workload.name for task in self._tasks.values()} - self._kinds.keys()
        found = most_frequent_first(device.kind for device in self._found_devices())
        if self._alike and unbound and found and self._watch.is_settled:
            self._kinds |= dict.fromkeys(unbound, found[0])
            self._placement.bind(self._kinds)

    def _tell_of_missing_kinds(self) -> None:
        if not self._watch.is_settled:
            return
        there = {device.kind for device in self._found_devices()}
        waiting = {self._tasks[trial].workload.name for trial in self._placement.waiting()}
        awaited = {workload: self._kinds[workload] for workload in waiting & self._kinds.keys()} | self._bound
        for workload, kind in sorted(awaited.items()):
            event = waits_for_kind(workload, kind)
            if kind not in there and event not in self._events:
                self._tell(event)

    def _usable_devices(self) -> list[Device]:
        """Those that trials of this stage may have."""
        self._bind()
        found = self._found_devices()
        return [device for device in found if device.kind in self._kinds.values()] if self._alike else found

    def _found_devices(self) -> list[Device]:
        found = [device for node in self._watch.usable() for device in self._devices_of(node)]
        return [device for device in found if self._failed_starts.get(device, 0) < _FAILED_STARTS]

    def _devices_of(self, node: Mapping[str, Any]) -> list[Device]:
        return devices_of(node["NodeID"], node["Resources"], self._resources.device, self._resources.threads)

    def _grow(self) -> None:
        """Start cohorts on devices without one, as long as there are trials for them."""
        usable, taken = self._usable_devices(), {cohort.device for cohort in self._cohorts.values()}
        for device in usable:
            if device not in taken and self._placement.coming() > self._idle():
                self._start(device)
        if not self._found_devices() and any(count >= _FAILED_STARTS for count in self._failed_starts.values()):
            for trial in self._placement.waiting():
                self._refuse(trial, "no device is left on which a cohort starts; logs/pool.log says why")

    def _idle(self) -> int:
        """Cohorts that start, are made ready or have no trials, and may have some."""
        fit = [n for n, c in self._cohorts.items() if not self._alike or c.device.kind in self._kinds.values()]
        return sum(not self._placement.trials_of(number) for number in fit)

    def _start(self, device: Device) -> None:
        number = len(self._ends)
        self._ends[number] = asyncio.get_running_loop().create_future()
        options = {
            "num_cpus": device.cpus,
            "num_gpus": device.gpus,
            "max_concurrency": _CALLS_AT_ONCE,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=device.node, soft=False),
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(device.threads), **self._memory_habits()}},
        }
        this = ray.get_runtime_context().current_actor
        cohort_stall_file(self._run / LOGS, number).unlink(missing_ok=True)  # of an earlier start of the study
        actor_class: Any = ray.remote(CohortActor)
        limit_s = self._resources.stalled_after_s
        actor = actor_class.options(**options).remote(number, this, device.threads, self._run, self._storage, limit_s)
        self._cohorts[number] = _Cohort(device, actor)
        self._later(self._tend(number, actor))

    def _memory_habits(self) -> dict[str, str]:
        return _KEEPS_FREED_MEMORY if self._resources.device == "cpu" else {}

    async def _tend(self, number: int, actor: Handle) -> None:
        """Take a cohort in when it has started, and out when it has died."""
        try:
            await reached(actor.__ray_ready__.remote)
            self._placement.add(number, self._cohorts[number].device.kind)
            self._move()
            await reached(actor.lives.remote)
        except Exception as error:  # dead, or its start failed, or it can never be scheduled
            stalled = await self._stalled(number)
            too_large = reason_of(error) is Reason.OOM and self._halve(number)
            again = not stalled and (too_large or node_is_gone(error))  # no trial's fault
            self._lose(number, _End(stalled or one_line(error), again=again))

    def _halve(self, number: int) -> bool:
        """Let the next cohorts of what a cohort trains have half its slots; whether it had more than one."""
        workload = self._placement.workload_of(number)
        slots = 1 if workload is None else self._size(workload)
        if workload is None or slots == 1:
            return False
        self._limits[workload] = slots // 2
        log.warning("%s: out of memory, %d slots from now on", workload, slots // 2)
        return True

    async def _stalled(self, number: int) -> str:
        """Whether a cohort's watchdog has ended it, in words."""
        if self._storage is None:
            return why_ended(cohort_stall_file(self._run / LOGS, number))
        cohort = self._cohorts.get(number)
        node = next((n for n in alive_nodes() if cohort and n["NodeID"] == cohort.device.node), None)
        if node is None:
            return ""
        try:
            return str(await asyncio.wait_for(on_node(node, _stalled_here, self._run, self._storage, number), _FATE_S))
        except (RayError, TimeoutError):  # the node is going, too
            return ""

    def _give_back(self) -> None:
        """End cohorts that have nothing to do, where others wait for devices."""
        now, asleep = time.monotonic(), self._placement.asleep()
        for number, cohort in list(self._cohorts.items()):
            cohort.asleep_since = min(cohort.asleep_since, now) if number in asleep else math.inf
            if self._others_wait and not self._placement.coming() and now - cohort.asleep_since > _ASLEEP_S:
                self._lose(number, _End("it had nothing to do"))

    def _lose(self, number: int, end: _End) -> None:
        cohort = self._cohorts.pop(number, None)
        if cohort is None:
            return
        log.warning("cohort %d on node %s ended: %s", number, cohort.device.node, end.message)
        if not cohort.opened and not cohort.leaving and not end.again:
            self._failed_starts[cohort.device] = self._failed_starts.get(cohort.device, 0) + 1
        for trial in self._placement.remove(number):
            self._losses[trial] += not end.again
            if trial in self._applicants:  # it had not got in yet
                self._wait(trial)
        self._ends[number].set_result(end)
        ray.kill(cohort.actor)
        self._grow()
        self._move()

    # --- places ------------------------------------------------------------------------------------------------------

    def _move(self) -> None:
        """Carry out what the placement decides."""
        for move in self._placement.moves():
            if isinstance(move, Admit):
                self._later(self._admit(move.trial, move.cohort))
            else:
                self._later(self._open(move.cohort, move.workload))

    def _wait(self, trial: str) -> None:
        """Let a trial wait; its last attempt is made alone, so that whoever breaks cohorts does so without company."""
        alone = 0 < self._resources.max_failures <= self._losses[trial]
        self._placement.wait(trial, self._tasks[trial].workload.name, alone=alone)

    async def _open(self, number: int, workload: str) -> None:
        actor = self._cohorts[number].actor
        task = next(task for task in self._tasks.values() if task.workload.name == workload)
        company = max(self._placement.company(workload), 1)
        most = min(company, self._resources.concurrent_trials or company)
        known = self._known_size(workload)
        if known is None and most * task.workload.max_steps < _MEASURED_FROM[self._resources.device]:
            known = self._usual_size(most)
        try:
            slots = await reached(lambda: actor.open.remote(task, known, most))
        except RayActorError:  # `_tend` has seen it too
            return
        except RayTaskError as error:
            self._placement.remove(number)
            self._placement.add(number, self._cohorts[number].device.kind)
            for trial in self._placement.waiting():
                if self._tasks[trial].workload.name == workload:
                    self._refuse(trial, one_line(error))
            return
        cohort = self._cohorts.get(number)
        if cohort is not None:
            cohort.opened = True
            self._failed_starts.pop(cohort.device, None)
            self._sizes[workload] = slots
            self._placement.ready(number, slots)
            self._expect(workload)
            self._move()

    async def _admit(self, trial: str, number: int) -> None:
        applicant, cohort = self._applicants.get(trial), self._cohorts.get(number)
        if applicant is None or cohort is None:
            return
        try:
            join = cohort.actor.join.remote
            await reached(lambda: join(self._tasks[trial], applicant.reception, applicant.visit))
        except RayActorError:  # `_lose` lets it wait again
            return
        except RayTaskError as error:
            self._refuse(trial, one_line(error))
            self._move()
            return
        if self._applicants.get(trial) is applicant:
            del self._applicants[trial]
            applicant.place.set_result((number, cohort.actor, cohort.device.kind))
        self._expect(self._tasks[trial].workload.name)

    def _expect(self, workload: str) -> None:
        """Tell the cohorts of a workload whether trials are to come, where that has changed: it does twice or so."""
        more = self._placement.company(workload) > 0
        for number in self._placement.of(workload):
            cohort = self._cohorts[number]
            if cohort.expects != more:
                cohort.expects = more
                cohort.actor.expect.remote(more)

    def _refuse(self, trial: str, message: str) -> None:
        self._placement.leave(trial)
        applicant = self._applicants.pop(trial, None)
        if applicant is not None and not applicant.place.done():
            applicant.place.set_exception(RuntimeError(message))

    async def _clear_out(self, trial: str) -> None:
        """Forget an earlier attempt of a trial whose tenant has vanished."""
        number = self._placement.place_of(trial)
        self._refuse(trial, "another attempt of this trial has begun")
        if number is None or number not in self._cohorts:
            return
        try:
            leave, visit = self._cohorts[number].actor.leave.remote, self._visits[trial]
            await reached(lambda: leave(trial, visit))
        except RayActorError:
            return

    def _size(self, workload: str) -> int:
        return self._known_size(workload) or _USUAL_SLOTS[self._resources.device]

    def _usual_size(self, trials: int) -> int:
        """Slots of a cohort that are not worth measuring: no more than so many trials need on all devices."""
        share = math.ceil(trials / max(len(self._usable_devices()), 1))
        return min(1 << (share - 1).bit_length(), _USUAL_SLOTS[self._resources.device])

    def _known_size(self, workload: str) -> int | None:
        fixed = None if self._slots is None else min(self._slots, self._resources.concurrent_trials or self._slots)
        limits = (self._sizes.get(workload), fixed, self._limits.get(workload))
        return min((limit for limit in limits if limit is not None), default=None)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("the pool failed", exc_info=task.exception())


def _stalled_here(run: Path, storage: Storage | None, number: int) -> str:
    return why_ended(cohort_stall_file(run_here(run, storage) / LOGS, number))
