"""Step times measured where trials will train: in a process of its own on a device of the cluster, gone afterwards.

The driver's own machine may have no such device, and what measuring leaves in memory would stay with it for the whole
study.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from rich.console import Console

from tunebench.study.errors import RunError
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import Resources, StudyError
from tunebench.study.step_times import CALIBRATION, Calibration
from tunebench.study.storage import Storage
from tunebench.tuning.device_budget import Searched
from tunebench.tuning.node_copy import run_here
from tunebench.tuning.ray_environment import terminate_like_interrupt
from tunebench.tuning.stage import check_fit, join_ray
from tunebench.tuning.trial_log import LOGS, log_to
from tunebench.workloads.data import PreparedData, graphs_folder
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.stored_data import fetch_prepared

log = logging.getLogger(__name__)

_LOG = "step-times.log"


def measured_steps(
    resolved: ResolvedStudy,
    data: Mapping[str, PreparedData],
    searched: Searched,
    run: Path,
    address: str | None,
    console: Console,
    storage: Storage | None = None,
) -> Calibration:
    """The solo step times of a study's arms, measured by Ray on one device of the kind that its trials get.

    Args:
        resolved: the study.
        data: prepared data by workload.
        searched: hyperparameters of trials by arm name.
        run: the run directory.
        address: Ray cluster to join, None for one of this machine alone.
        console: takes lines for the user.
        storage: of the run, or None.

    Raises:
        RunError: in one line, this machine has no such device, or the process that measures has died or failed.
        StudyError: the study asks for a GPU and its process was given none.
        WorkloadError: data or a model's arguments are refused.
    """
    join_ray(address, resolved.study.resources, run, storage, console)
    terminate_like_interrupt()  # Ray has set its own handler, which aborts
    check_fit(resolved.study.resources, waits=address is not None, console=console)
    where = "of this machine" if address is None else "of the cluster"
    _say(console, f"measuring steps for the cap on device-seconds on a device {where}; {run / LOGS / _LOG} follows")
    remote: Any = ray.remote
    task = remote(max_calls=1, max_retries=0, **_share(resolved.study.resources))(_measure)
    try:
        table, lines = ray.get(task.remote(resolved, dict(data), dict(searched), run.resolve(), storage))
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, StudyError | WorkloadError) else None
        raise cause or _failed(run, error) from error
    except RayError as error:
        raise _failed(run, error) from error
    for line in lines:
        _say(console, line)
    assert isinstance(table, Calibration)
    return table


def _share(resources: Resources) -> dict[str, float]:
    """A whole device, like that of a cohort: nothing else of the run may train beside what is timed."""
    gpus = 1 if resources.device == "cuda" else 0
    return {"num_gpus": gpus, "num_cpus": 0 if gpus else resources.threads}


def _measure(
    resolved: ResolvedStudy, data: Mapping[str, PreparedData], searched: Searched, run: Path, storage: Storage | None
) -> tuple[Calibration, list[str]]:
    """Runs in a process of its own; returns the table and what was said, which the log has at once."""
    from tunebench.engine.solo import SoloPlan, solo_steps  # imports torch and NequIP, in this process only

    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        log.warning(line)

    with log_to(run_here(run, storage) / LOGS / _LOG):
        if storage is not None:
            data = {name: fetch_prepared(storage, prepared) for name, prepared in data.items()}
        return solo_steps(resolved, data, searched, SoloPlan(cache=graphs_folder()), say), lines


def _failed(run: Path, error: RayError) -> RunError:
    cause = getattr(error, "cause", None) or error
    why = " ".join((str(cause).strip().splitlines() or [type(cause).__name__])[-1].split())
    return RunError(
        f"{run}: found no step times for the cap on device-seconds ({type(cause).__name__}: {why[:300]}), allowed: a "
        f"device on which the study trains, or a {CALIBRATION} by `tunebench calibrate`"
    )


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)
