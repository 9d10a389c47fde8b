"""A trial of the `cohort` engine as Tune sees it: a tenant of a slot, in a process without torch or NequIP.

The tenant asks the pool for a place, passes the cohort's reports to Tune and Tune's decisions to the cohort.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.exceptions import RayActorError, RayTaskError

from tunebench.tuning.handle import Handle
from tunebench.tuning.reach import get_reached
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


def rent(trial: str, pool: Handle, run: Path) -> None:
    """Live through one trial; ends early by `SystemExit` where Tune pauses or stops it.

    Raises:
        CohortLost: the cohort or its node died, or the trial cannot be trained.
    """
    tenant = ray.get_runtime_context().current_actor
    with log_to(trial_log(run, trial)):
        while True:
            visit = uuid.uuid4().hex
            number, cohort, kind = _call(partial(pool.place.remote, trial, tenant, visit))
            try:
                _stay(trial, cohort, visit, kind)
                return
            except RayActorError:
                fate = _call(partial(pool.fate.remote, number, trial))
            if fate.report is not None:
                tune.report(for_tune(fate.report))
                return
            if not fate.again:
                raise CohortLost(f"its cohort is gone: {fate.message}")
            log.warning("it looks for another place: %s", fate.message)


def _stay(trial: str, cohort: Handle, visit: str, kind: str) -> None:
    """Pass on reports and decisions until the trial has ended; its slot is free after that, whatever happens."""
    heard = 0
    try:
        while True:
            report: dict[str, Any] = _call(partial(cohort.next_report.remote, trial, visit, heard))
            heard += 1
            tune.report({**for_tune(report["evaluation"]), VISIT: visit, DEVICE: kind})
            if report["evaluation"]["outcome"] is not None:
                return
            if report["decides"]:
                _call(partial(cohort.go_on.remote, trial, heard))
    finally:
        cohort.leave.remote(trial, visit)


def _call(call: Callable[[], Any]) -> Any:
    try:
        return get_reached(call)
    except RayTaskError as error:
        raise CohortLost(str(error.cause or error).strip().splitlines()[-1]) from error
