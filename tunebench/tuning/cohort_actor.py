"""A cohort on its device as a Ray actor: trials join, wait for their reports, and go on or leave.

The cohort itself runs in a thread (`CohortLoop`); the actor's event loop only hands orders in and reports out.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError

from tunebench.engine.task import TrialTask
from tunebench.engine.watchdog import Watchdog
from tunebench.study.storage import Storage, StorageError
from tunebench.tuning.handle import Handle
from tunebench.tuning.node_copy import run_here, task_here
from tunebench.tuning.reach import reached
from tunebench.tuning.trial_log import LOGS, cohort_stall_file, log_to
from tunebench.tuning.work_log import on_gpu
from tunebench.workloads.data import graphs_folder
from tunebench.workloads.errors import WorkloadError

if TYPE_CHECKING:
    from tunebench.tuning.cohort_loop import Breakdown, Report

log = logging.getLogger(__name__)


class Refused(Exception):
    """A trial or a workload that cannot be trained; the message is one line."""


@dataclass
class _Lodger:
    """A trial that is in, or whose last reports are still to be fetched.

    Attributes:
        reports: all of its visit, so that one whose answer was lost can be asked for again.
        entry: joins it to the cohort. reception: the process of its tenant, once it is in.
        over: its last report is among them.
    """

    visit: str
    reports: list[dict[str, Any] | Refused] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)
    entry: asyncio.Future[None] | None = None
    reception: Handle | None = None
    over: bool = False

    def add(self, report: dict[str, Any] | Refused) -> None:
        self.reports.append(report)
        self.news.set()
        self.news = asyncio.Event()


class CohortActor:
    """One device. Its methods run in one event loop, side by side.

    Args:
        number: its name in the pool.
        pool: is told when a trial has left and when the cohort has broken.
        threads: of the device's CPU work.
        run: the run directory, whose logs take what belongs to no single trial. storage: of the run, or None.
        stalled_after_s: as the study says.
    """

    def __init__(
        self,
        number: int,
        pool: Handle,
        threads: int,
        run: Path,
        storage: Storage | None,
        stalled_after_s: float | None,
    ) -> None:
        from tunebench.tuning.cohort_loop import CohortLoop  # imports torch and NequIP, in this process only

        self._number, self._pool = number, pool
        self._lodgers: dict[str, _Lodger] = {}
        self._receptions: dict[Handle, asyncio.Task[None]] = {}
        self._events: asyncio.AbstractEventLoop | None = None
        logs = run_here(run, storage) / LOGS
        self._keeps_log = log_to(logs / f"cohort-{number}.log")
        self._keeps_log.__enter__()
        self._cohort = CohortLoop(
            report=self._pass_on,
            resized=self._resized,
            broke=self._broke,
            threads=threads,
            watchdog=Watchdog(stalled_after_s, cohort_stall_file(logs, number)),
        )
        self._cohort.start()

    async def open(self, task: TrialTask, slots: int | None, most: int) -> int:
        """Train another workload from now on, with so many slots or as many as pay, but not more than `most`.

        Returns:
            The number of slots.

        Raises:
            Refused: the workload cannot be trained.
        """
        self._events = asyncio.get_running_loop()
        if task.device == "cuda":
            log.warning("%s", on_gpu(self._number, os.environ.get("CUDA_VISIBLE_DEVICES", "0")))  # which Ray has set
        opened: int = await self._ordered(self._cohort.open, await self._here(task), slots, most, graphs_folder())
        log.warning("cohort %d is open for %s with %d slots", self._number, task.workload.name, opened)
        return opened

    async def expect(self, more: bool) -> None:
        """Whether trials of the workload are still to come."""
        self._cohort.submit(self._cohort.expect, more)

    async def join(self, task: TrialTask, reception: Handle, visit: str) -> None:
        """Let a trial in, which leaves if the process of its tenant dies.

        Who asks again for a visit lets in nobody else.

        Raises:
            Refused: the trial cannot be trained.
        """
        name = task.key.trial_id
        lodger = self._lodgers.get(name)
        if lodger is None or lodger.visit != visit:
            lodger = self._lodgers[name] = _Lodger(visit)
            lodger.entry = asyncio.ensure_future(self._enter(task, reception, lodger))
        assert lodger.entry is not None
        await asyncio.shield(lodger.entry)

    async def _enter(self, task: TrialTask, reception: Handle, lodger: _Lodger) -> None:
        name = task.key.trial_id
        try:
            await self._ordered(self._cohort.join, await self._here(task))
        except Refused:
            self._dismiss(name, lodger)
            raise
        lodger.reception = reception
        if reception not in self._receptions:
            self._receptions[reception] = asyncio.create_task(self._watch(reception))

    async def next_report(self, name: str, visit: str, heard: int) -> dict[str, Any]:
        """The next report of a trial's visit after so many that were heard, as soon as there is one.

        Raises:
            KeyError: the trial is not in.
            Refused: it cannot be trained.
        """
        lodger = self._lodgers[name]
        if lodger.visit != visit:
            raise KeyError(f"{name}: another visit has begun")
        while len(lodger.reports) <= heard:
            await lodger.news.wait()
        lodger.reports[:heard] = [{}] * heard  # nobody asks for them again
        report = lodger.reports[heard]
        if isinstance(report, Refused):
            raise report
        return report

    async def go_on(self, name: str, heard: int) -> None:
        """A trial that waits for a decision after so many reports goes on; said again it means nothing."""
        lodger = self._lodgers.get(name)
        if lodger is None or len(lodger.reports) != heard:
            return
        try:
            await self._ordered(self._cohort.go_on, name)
        except Refused as error:
            if name in self._lodgers:
                self._lodgers[name].add(error)

    async def leave(self, name: str, visit: str) -> None:
        """A trial leaves its slot, if it is in; one that has come back since then stays."""
        lodger = self._lodgers.get(name)
        if lodger is not None and lodger.visit != visit:
            return
        was_in = True  # also a trial that could not be written
        try:
            was_in = await self._ordered(self._cohort.leave, name, None)
        finally:
            if lodger is not None:
                self._dismiss(name, lodger)
            if was_in:
                await self._pool.left.remote(self._number, name, visit)

    async def save(self) -> None:
        """Have every trial leave at the end of its stretch of steps, with all that it has done."""
        await self._ordered(self._cohort.leave_all)

    async def lives(self) -> None:
        """Never returns: who waits for it learns of the actor's death."""
        await asyncio.Event().wait()

    async def _watch(self, reception: Handle) -> None:
        """Free the slots of trials whose tenants have died with their process."""
        with suppress(RayActorError):
            await reached(reception.lives.remote)
        del self._receptions[reception]
        bereft = {name: lodger for name, lodger in self._lodgers.items() if lodger.reception == reception}
        for name in (name for name, lodger in bereft.items() if not lodger.over):
            log.warning("%s: its tenant has died, it leaves", name)
        await asyncio.gather(*(self.leave(name, lodger.visit) for name, lodger in bereft.items()))

    def _dismiss(self, name: str, lodger: _Lodger) -> None:
        if self._lodgers.get(name) is lodger:
            del self._lodgers[name]

    async def _here(self, task: TrialTask) -> TrialTask:
        try:
            return await asyncio.to_thread(task_here, task)
        except (StorageError, WorkloadError) as error:
            raise Refused(str(error)) from None

    async def _ordered(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Have something done by the cohort's thread; what breaks the cohort never comes back."""
        try:
            return await asyncio.wrap_future(self._cohort.submit(work, *arguments))
        except Exception as error:
            log.warning("refused", exc_info=True)
            raise Refused(" ".join(str(error).split()) or type(error).__name__) from None

    # --- called in the cohort's thread ---------------------------------------------------------------------------

    def _pass_on(self, name: str, report: Report) -> None:
        plain = {"evaluation": report.evaluation.to_plain(), "decides": report.decides}
        self._in_events(self._hand_out, name, plain)

    def _resized(self, slots: int) -> None:
        self._pool.resized.remote(self._number, slots)

    def _broke(self, breakdown: Breakdown) -> None:
        reports = {name: evaluation.to_plain() for name, evaluation in breakdown.reports.items()}
        self._pool.broken.remote(self._number, breakdown.message, breakdown.out_of_memory, reports)

    def _in_events(self, call: Any, *arguments: Any) -> None:
        assert self._events is not None
        self._events.call_soon_threadsafe(call, *arguments)

    def _hand_out(self, name: str, plain: dict[str, Any]) -> None:
        lodger = self._lodgers.get(name)
        if lodger is None:
            return
        lodger.add(plain)
        if plain["evaluation"]["outcome"] is not None:  # it has left its slot
            lodger.over = True
            self._pool.left.remote(self._number, name, lodger.visit)
