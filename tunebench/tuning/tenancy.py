"""A trial of the `cohort` engine as Tune sees it: a tenant of a slot, without a process of its own.

The tenant asks the pool for a place, passes the cohort's reports to Tune and Tune's decisions to the cohort. All
tenants of a driver live in one process (`tunebench.tuning.reception`), which imports neither torch nor NequIP.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from tunebench.tuning.handle import Handle
from tunebench.tuning.reach import reached
from tunebench.tuning.trial_log import log_to, trial_log

log = logging.getLogger(__name__)

VISIT = "visit"
"""Key of a report that names the stay in a slot: a trial that was paused may come back before it is known to have left.
"""


DEVICE = "device"
"""Key of a report that names the kind of device it comes from, such as ``H200``; empty where nobody knows."""

_READ_BY_SCHEDULER = ("step", "objective", "outcome", "at_rung")
EVALUATION = "evaluation"
"""Key of a report that holds the whole evaluation as JSON."""


def for_tune(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """A plain evaluation as Tune is to report it, which `evaluation_of` turns back.

    Tune (2.60) flattens every report and follows each number in it through its averages, which took a third of the
    driver's time on the processor.
    """
    return {name: evaluation[name] for name in _READ_BY_SCHEDULER} | {EVALUATION: json.dumps(evaluation)}


def evaluation_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """The plain evaluation in a report of Tune."""
    found: dict[str, Any] = json.loads(report[EVALUATION])
    return found


class CohortLost(Exception):
    """A trial's cohort is gone, or the trial was refused; one line."""


class Tenant:
    """One attempt of a trial: its place in a cohort, or several places one after the other.

    Args:
        trial: its name.
        pool: where it finds its places.
        reception: the process that it lives in; cohorts let it go when that has died.
        run: the run directory on this node.

    Attributes:
        over: its last report was handed out, or it was refused.
    """

    def __init__(self, trial: str, pool: Handle, reception: Handle, run: Path) -> None:
        self.over = False
        self._trial, self._pool, self._reception, self._run = trial, pool, reception, run
        self._cohort: Handle | None = None
        self._number, self._kind, self._visit = -1, "", ""
        self._heard, self._is_asked = 0, False

    async def next_report(self) -> dict[str, Any]:
        """The next report for Tune; to ask for it says that the trial goes on, where the one before needs a decision.

        Raises:
            CohortLost: the cohort or its node died, or the trial cannot be trained.
        """
        try:
            report = await self._heard_from_a_cohort()
        except CohortLost:
            with log_to(trial_log(self._run, self._trial)):
                log.exception("the trial crashed")
            self.over = True
            self.leave()
            raise
        if report["outcome"] is not None:
            self.over = True
            self.leave()
        return report

    def leave(self) -> None:
        """Free its slot, or take back its wish for one."""
        if self._cohort is not None:
            self._cohort.leave.remote(self._trial, self._visit)
        elif self._visit:  # it may have been given a place just now
            self._pool.vacate.remote(self._trial, self._visit)

    async def _heard_from_a_cohort(self) -> dict[str, Any]:
        while True:
            if self._cohort is None:
                await self._enter()
            try:
                return await self._heard_from(self._cohort)
            except RayActorError:
                fate = await _answer(partial(self._pool.fate.remote, self._number, self._trial))
            self._cohort = None
            if fate.report is not None:
                return for_tune(fate.report)
            if not fate.again:
                raise CohortLost(f"its cohort is gone: {fate.message}")
            with log_to(trial_log(self._run, self._trial)):
                log.warning("it looks for another place: %s", fate.message)

    async def _enter(self) -> None:
        self._visit, self._heard, self._is_asked = uuid.uuid4().hex, 0, False
        place = partial(self._pool.place.remote, self._trial, self._reception, self._visit)
        self._number, self._cohort, self._kind = await _answer(place)

    async def _heard_from(self, cohort: Handle) -> dict[str, Any]:
        if self._is_asked:
            await _answer(partial(cohort.go_on.remote, self._trial, self._heard))
            self._is_asked = False
        report = await _answer(partial(cohort.next_report.remote, self._trial, self._visit, self._heard))
        self._heard += 1
        self._is_asked = report["decides"]
        return {**for_tune(report["evaluation"]), VISIT: self._visit, DEVICE: self._kind}


async def _answer(call: Callable[[], Any]) -> Any:
    try:
        return await reached(call)
    except RayTaskError as error:
        raise CohortLost(str(error.cause or error).strip().splitlines()[-1]) from error
