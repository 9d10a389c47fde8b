"""A trial of the `cohort` engine as Tune sees it: a tenant of a slot, in a process without torch or NequIP.

The tenant asks the pool for a place, passes the cohort's reports to Tune and Tune's decisions to the cohort.
"""

from __future__ import annotations

import logging
import uuid
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError, RayTaskError

from tunebench.tuning.handle import Handle
from tunebench.tuning.trial_log import log_to, trial_log

log = logging.getLogger(__name__)

VISIT = "visit"
"""Key of a report that names the stay in a slot: a trial that was paused may come back before it is known to have left.
"""


class CohortLost(Exception):
    """A trial's cohort is gone, or the trial was refused; one line."""


def rent(trial: str, pool: Handle, run: Path) -> None:
    """Live through one trial; ends early by `SystemExit` where Tune pauses or stops it.

    Raises:
        CohortLost: the cohort or its node died, or the trial cannot be trained.
    """
    tenant = ray.get_runtime_context().current_actor
    with log_to(trial_log(run, trial)):
        while True:
            visit = uuid.uuid4().hex
            number, cohort = _call(pool.place.remote(trial, tenant, visit))
            try:
                _stay(trial, cohort, visit)
                return
            except RayActorError:
                fate = _call(pool.fate.remote(number, trial))
            if fate.report is not None:
                tune.report(fate.report)
                return
            if not fate.again:
                raise CohortLost(f"its cohort is gone: {fate.message}")
            log.warning("it looks for another place: %s", fate.message)


def _stay(trial: str, cohort: Handle, visit: str) -> None:
    """Pass on reports and decisions until the trial has ended; its slot is free after that, whatever happens."""
    try:
        while True:
            report: dict[str, Any] = _call(cohort.next_report.remote(trial))
            tune.report({**report["evaluation"], VISIT: visit})
            if report["evaluation"]["outcome"] is not None:
                return
            if report["decides"]:
                cohort.go_on.remote(trial)
    finally:
        cohort.leave.remote(trial, visit)


def _call(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise CohortLost(str(error.cause or error).strip().splitlines()[-1]) from error
