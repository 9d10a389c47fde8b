"""Step times measured where trials will train: in a process of its own on a device of the cluster, gone afterwards.

The driver's own machine may have no such device, and what measuring leaves in memory would stay with it for the whole
study.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from rich.console import Console

from tunebench.study.control import Wish
from tunebench.study.errors import RunError
from tunebench.study.notice import posting
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import Resources, StudyError
from tunebench.study.step_times import CALIBRATION, Calibration
from tunebench.study.storage import Storage
from tunebench.tuning.console_lines import say
from tunebench.tuning.device_budget import Searched
from tunebench.tuning.failures import one_line
from tunebench.tuning.node_copy import run_here, workload_here
from tunebench.tuning.orders import Orders
from tunebench.tuning.ray_environment import terminate_like_interrupt
from tunebench.tuning.stage import check_fit, join_ray
from tunebench.tuning.trial_log import LOGS, log_to
from tunebench.workloads.data import PreparedData, graphs_folder
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.stored_data import fetch_prepared

log = logging.getLogger(__name__)

_LOG = "step-times.log"
_LOOK_EVERY_S = 1.0
_TOLD_AFTER_S = 10.0  # a process on a free device starts sooner
_WAITING = "waiting for a free device to measure steps on"
_MEASURING = "measuring steps for the cap on device-seconds"


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

    A run that is paused gives the device back and measures anew when it is resumed.

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
        Interrupted: the run was cancelled or drained.
    """
    join_ray(address, resolved.study.resources, run, storage, console)
    terminate_like_interrupt()  # Ray has set its own handler, which aborts
    check_fit(resolved.study.resources, waits=address is not None, console=console)
    where = "of this machine" if address is None else "of the cluster"
    say(console, f"{_MEASURING} on a device {where}; {run / LOGS / _LOG} follows")
    arguments = resolved, dict(data), dict(searched), run.resolve(), storage
    orders = Orders(run)
    with posting(run) as post:
        while True:
            try:
                table, lines = _once(resolved.study.resources, arguments, orders, post, console)
                break
            except _Paused:
                post("paused, without a device")
                orders.wait_for_resume()
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, StudyError | WorkloadError) else None
                raise cause or _failed(run, error) from error
            except RayError as error:
                raise _failed(run, error) from error
    for line in lines:
        say(console, line)
    return table


class _Paused(Exception):
    """The run is to give up its device."""


def _once(
    resources: Resources, arguments: tuple[Any, ...], orders: Orders, post: Callable[[str], None], console: Console
) -> tuple[Calibration, list[str]]:
    """Wait for a device, measure on it and give it back, also where the run is told to end or to pause."""
    remote: Any = ray.remote
    device = remote(max_restarts=0, **_share(resources))(_Device).remote()
    try:
        post(_WAITING)
        _awaited(device.__ray_ready__.remote(), orders, lambda: say(console, _WAITING))
        post(_MEASURING)
        measured: tuple[Calibration, list[str]] = _awaited(device.measure.remote(*arguments), orders)
        return measured
    finally:
        ray.kill(device)


def _awaited(reference: Any, orders: Orders, tell: Callable[[], None] = lambda: None) -> Any:
    """The value of a reference; `tell` is called once if it takes long.

    Raises:
        Interrupted: the run was cancelled or drained.
        _Paused: it is to pause.
    """
    began, told = time.monotonic(), False
    while not ray.wait([reference], timeout=_LOOK_EVERY_S)[0]:
        orders.obey()
        if orders.wish() is Wish.PAUSE:
            raise _Paused
        if not told and time.monotonic() - began > _TOLD_AFTER_S:
            tell()
            told = True
    return ray.get(reference)


def _share(resources: Resources) -> dict[str, float]:
    """A whole device, like that of a cohort: nothing else of the run may train beside what is timed."""
    gpus = 1 if resources.device == "cuda" else 0
    return {"num_gpus": gpus, "num_cpus": 0 if gpus else resources.threads}


class _Device:
    """A process with a device of its own; as an actor it tells when it has got one."""

    def measure(
        self,
        resolved: ResolvedStudy,
        data: Mapping[str, PreparedData],
        searched: Searched,
        run: Path,
        storage: Storage | None,
    ) -> tuple[Calibration, list[str]]:
        """Returns the table and what was said, which the log has at once."""
        from tunebench.engine.solo import SoloPlan, solo_steps  # imports torch and NequIP, in this process only

        lines: list[str] = []

        def say(line: str) -> None:
            lines.append(line)
            log.warning(line)

        with log_to(run_here(run, storage) / LOGS / _LOG):
            if storage is not None:
                data = {name: fetch_prepared(storage, prepared) for name, prepared in data.items()}
                here = tuple(workload_here(workload, storage) for workload in resolved.study.workloads)
                resolved = replace(resolved, study=resolved.study.model_copy(update={"workloads": here}))
            return solo_steps(resolved, data, searched, SoloPlan(cache=graphs_folder()), say), lines


def _failed(run: Path, error: RayError) -> RunError:
    cause = getattr(error, "cause", None) or error
    return RunError(
        f"{run}: found no step times for the cap on device-seconds ({type(cause).__name__}: "
        f"{one_line(error)[:300]}), allowed: a device on which the study trains, or a {CALIBRATION} by `tunebench "
        "calibrate`"
    )
