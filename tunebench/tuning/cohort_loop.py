"""The thread that owns a cohort: it steps, hands out reports, and obeys between two stretches of steps; without Ray.

A stretch is what a cohort does until some trial has to report. Trials of one workload are evaluated at the same steps,
so trials that join between two stretches stay in time with the others and are evaluated together with them. That is
worth a short wait for those who are about to come, and for decisions that are about to be made.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from tunebench.engine.book import REPEATABLE, TrialBook, crashed, last_evaluation
from tunebench.engine.cohort import Cohort
from tunebench.engine.slots import automatic_slots
from tunebench.engine.task import Evaluation, TrialTask
from tunebench.engine.trial_files import TrialFiles
from tunebench.engine.watchdog import Watchdog
from tunebench.optim.realised import BrokenPromise
from tunebench.study.record import Reason
from tunebench.tuning.trial_log import log_to, trial_log
from tunebench.tuning.work_log import WorkLog

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_FIRST_PATIENCE_S = 1.0  # tenants of one stage come within a second
_LONGEST_PATIENCE_S = 2.0
_PATIENCE = 0.5  # of the last stretch
_MOST_SLOTS = 128
_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
_FATAL = (*_OUT_OF_MEMORY, torch.AcceleratorError)  # the device, not the trial


@dataclass(frozen=True, kw_only=True)
class Report:
    """An evaluation, and whether its trial waits for a decision."""

    evaluation: Evaluation
    decides: bool


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """Why a cohort ended, in one line.

    Attributes:
        out_of_memory: fewer slots may work.
        reports: last reports of trials that do not fit even alone.
    """

    message: str
    out_of_memory: bool
    reports: dict[str, Evaluation]


class _Ended(BaseException):
    """The thread was told to end."""


def _end() -> None:
    raise _Ended


class CohortLoop:
    """A cohort in a thread of its own, in which all methods but `submit`, `start` and `end` are called, by `submit`.

    Args:
        report: takes each report, in the thread.
        resized: takes the number of slots that are left where memory was too small for all, in the thread.
        broke: takes the end of the thread, in the thread.
        threads: of the device's CPU work.
        watchdog: looks after the thread's steps.
    """

    def __init__(
        self,
        *,
        report: Callable[[str, Report], None],
        resized: Callable[[int], None],
        broke: Callable[[Breakdown], None],
        threads: int,
        watchdog: Watchdog | None = None,
    ) -> None:
        self._report, self._resized, self._broke, self._threads = report, resized, broke, threads
        self._watchdog = watchdog or Watchdog()
        self._work_log = WorkLog()
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._cohort: Cohort | None = None
        self._tasks: dict[str, TrialTask] = {}
        self._last: dict[str, Evaluation] = {}
        self._held: set[str] = set()
        self._just_held: set[str] = set()
        self._outside: set[str] = set()
        self._reported: list[str] = []
        self._coming = False
        self._stretch_s: float | None = None
        self._joined_at = -math.inf
        self._thread = threading.Thread(target=self._run, name="cohort", daemon=True)

    def start(self) -> None:
        """Start the thread; it ends with `end`, with its process or by a breakdown."""
        self._thread.start()

    def end(self) -> None:
        """End the thread between two stretches, and wait for that; trials that are in keep their checkpoints."""
        self._work.put(_end)
        self._thread.join()

    def submit(self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Have something done in the thread between two stretches; where that breaks the cohort nothing comes back."""
        future: Future[Result] = Future()

        def do() -> None:
            try:
                result = work(*arguments)
            except _FATAL:
                raise
            except Exception as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        self._work.put(do)
        return future

    # --- orders ------------------------------------------------------------------------------------------------------

    def open(self, task: TrialTask, slots: int | None, most: int, cache: Path | None) -> int:
        """Make a cohort for a task's workload in place of the one before, which is empty.

        Args:
            task: any trial of the workload.
            slots: of the cohort; None measures how many pay.
            most: more than these are not measured.
            cache: folder for traces and compiled graphs.

        Returns:
            The number of slots.
        """
        torch.set_num_threads(self._threads)
        self._cohort = None
        self._stretch_s = None
        self._watchdog.prepare()
        slots = slots or automatic_slots(task, max(min(most, _MOST_SLOTS), 1), self._watchdog)
        self._cohort = Cohort(task, slots, cache=cache, watchdog=self._watchdog)
        return slots

    def expect(self, more: bool) -> None:
        """Whether trials of the workload are still to come, here or to another cohort."""
        self._coming = more

    def join(self, task: TrialTask) -> None:
        """Let a trial in, or report again what its driver may have missed.

        Raises:
            WorkloadError: the trial cannot be trained.
            StorageError: its checkpoint cannot be read.
        """
        name = task.key.trial_id
        TrialFiles(task.storage, task.run, name).fetch()
        self._tasks[name] = task
        self._joined_at = time.monotonic()
        with log_to(trial_log(task.run, name)):
            last = last_evaluation(task.run, name)
            if last is not None and last.outcome is None and last.at_rung:
                self._outside.add(name)  # it may have to leave, and must not step until that is known
                self._deliver(name, last)
                return
            try:
                missed = self._entered(task)
            except Exception:
                self._forget(name)
                raise
        if missed is not None:
            self._deliver(name, missed)

    def go_on(self, name: str) -> None:
        """A trial that waits for a decision steps again."""
        if name not in self._held:
            return
        self._held.discard(name)
        self._just_held.discard(name)
        if name not in self._outside:
            self._reported.append(name)
            return
        self._outside.discard(name)
        with log_to(trial_log(self._tasks[name].run, name)):
            ended = self._entered(self._tasks[name])
        if ended is not None and ended.outcome is not None:
            self._deliver(name, ended)

    def leave(self, name: str, reason: Reason | None) -> bool:
        """Take a trial out; returns whether it was in."""
        task = self._tasks.get(name)
        if task is None:
            return False
        with log_to(trial_log(task.run, name)):
            try:
                if name not in self._outside:
                    self._open_cohort.leave(name, reason)
                elif reason is not None:
                    TrialBook(task).close(reason)
            finally:
                self._forget(name)
        return True

    def leave_all(self) -> None:
        """Take every trial out; each goes on elsewhere."""
        for name in list(self._tasks):
            self.leave(name, None)

    # --- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                self._obey()
                self._stretch()
        except _Ended:
            return
        except BaseException as error:  # whatever broke the step breaks it for every trial
            self._watchdog.rest()
            log.error("the cohort broke\n%s", traceback.format_exc())
            self._broke(self._breakdown(error))

    def _obey(self) -> None:
        """Do what was submitted, until some trial can step and nobody is worth waiting for."""
        since = time.monotonic()
        while True:
            left = self._time_left(since)
            self._watchdog.rest()
            if left is None:
                self._work_log.rest()
            try:
                work = self._work.get(block=left != 0.0, timeout=left or None)
            except queue.Empty:
                return
            finally:
                self._watchdog.beat()
            began = time.monotonic()
            work()
            self._work_log.obeyed(time.monotonic() - began)

    def _time_left(self, since: float) -> float | None:
        """Seconds to wait for further orders; None: until there is one."""
        stepping = self._tasks.keys() - self._held
        if not stepping:
            return None
        awaited = self._just_held or (self._coming and self._open_cohort.free > len(self._outside))
        if not awaited:
            return 0.0
        if self._stretch_s is None:
            return max(self._joined_at + _FIRST_PATIENCE_S - time.monotonic(), 0.0)
        patience = min(_PATIENCE * self._stretch_s, _LONGEST_PATIENCE_S)
        return max(since + patience - time.monotonic(), 0.0)

    def _stretch(self) -> None:
        cohort = self._open_cohort
        for name in self._reported:
            with suppress(KeyError):  # it has left, or waits for a slot that memory took
                cohort.go_on(name)
        self._reported = []
        self._just_held = set()
        began, slots = time.monotonic(), cohort.slots
        steps, evaluating_s, writing_s = cohort.trial_steps, cohort.evaluating_s, cohort.writing_s
        reports = cohort.advance()
        self._stretch_s = time.monotonic() - began
        self._work_log.worked(
            self._stretch_s,
            cohort.trial_steps - steps,
            evaluating_s=cohort.evaluating_s - evaluating_s,
            writing_s=cohort.writing_s - writing_s,
        )
        if cohort.slots != slots:
            self._resized(cohort.slots)
        for name, evaluation in reports:
            self._deliver(name, evaluation)
            if evaluation.outcome is None and name not in self._held:
                self._reported.append(name)
        if not self._tasks:
            self._stretch_s = None

    def _entered(self, task: TrialTask) -> Evaluation | None:
        """Join the cohort; returns what is to be reported of it."""
        try:
            return self._open_cohort.join(task)
        except BrokenPromise as error:
            return Evaluation.without_steps(attempts=1, outcome=Reason.MISMATCHED, message=str(error))
        except REPEATABLE as error:
            log.error("the trial crashed\n%s", traceback.format_exc())
            return crashed(task, error)

    def _deliver(self, name: str, evaluation: Evaluation) -> None:
        decides = evaluation.outcome is None and evaluation.at_rung
        self._last[name] = evaluation
        if decides:
            self._held.add(name)
            self._just_held.add(name)
        if evaluation.outcome is not None:
            self._forget(name)
        self._report(name, Report(evaluation=evaluation, decides=decides))

    def _forget(self, name: str) -> None:
        task = self._tasks.pop(name, None)
        if task is not None:
            TrialFiles(task.storage, task.run, name).forget()
        self._last.pop(name, None)
        for names in (self._held, self._just_held, self._outside):
            names.discard(name)

    def _breakdown(self, error: BaseException) -> Breakdown:
        message = " ".join(str(error).split()) or type(error).__name__
        memory = isinstance(error, _OUT_OF_MEMORY)
        alone = memory and (len(self._tasks) == 1 or (self._cohort is not None and self._cohort.slots == 1))
        reports = {name: self._ended(name, Reason.OOM, message) for name in self._tasks} if alone else {}
        return Breakdown(message=message[:500], out_of_memory=memory, reports=reports)

    def _ended(self, name: str, reason: Reason, message: str) -> Evaluation:
        last = self._last.get(name)
        if last is None:
            return Evaluation.without_steps(attempts=1, outcome=reason, message=message)
        return replace(last, objective=math.inf, errors={}, outcome=reason, message=message)

    @property
    def _open_cohort(self) -> Cohort:
        if self._cohort is None:
            raise RuntimeError("the cohort is not open")
        return self._cohort
