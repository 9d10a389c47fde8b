"""Step times measured where trials will train: in a process of its own on a device of the cluster, gone afterwards.

The driver's own machine may have no such device, and what measuring leaves in memory would stay with it for the whole
study.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from tunebench.study.control import Wish
from tunebench.study.errors import RunError
from tunebench.study.notice import posting
from tunebench.study.spec import Resources, StudyError
from tunebench.study.step_times import CALIBRATION, DeviceTimes
from tunebench.tuning.console_lines import say
from tunebench.tuning.devices import most_frequent_first, share_of_kind
from tunebench.tuning.errand import Errand
from tunebench.tuning.failures import one_line
from tunebench.tuning.node_checks import devices_there
from tunebench.tuning.node_copy import run_here, workload_here
from tunebench.tuning.orders import Orders
from tunebench.tuning.stage import check_fit, join_ray
from tunebench.tuning.trial_log import LOGS, log_to
from tunebench.workloads.data import graphs_folder
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.stored_data import fetch_prepared

log = logging.getLogger(__name__)

_LOG = "step-times.log"
_LOOK_EVERY_S = 1.0
_TOLD_AFTER_S = 10.0  # a process on a free device starts sooner
_WAITING = "waiting for a free device to measure steps on"
_MEASURING = "measuring steps"
_FOR_A_CAP = " for the cap on device-seconds"
_NEEDED = {"cuda": "a GPU", "cpu": "the cores (resources.cpus_per_trial)"}


def measured_steps(errand: Errand, address: str | None, console: Console) -> DeviceTimes:
    """The solo step times of a study's arms on the kind of device of which a cluster has most: for a cap.

    A run that is paused gives the device back and measures anew when it is resumed.

    Args:
        errand: what is measured.
        address: Ray cluster to join, None for one of this machine alone.
        console: takes lines for the user.

    Raises:
        RunError: in one line, this machine has no such device, or the process that measures has died or failed.
        StudyError: the study asks for a GPU and its process was given none.
        WorkloadError: data or a model's arguments are refused.
        Interrupted: the run was cancelled or drained.
    """
    kinds = _kinds(errand, address, console)
    place = kinds[0] if kinds else _ANY
    where = "of this machine" if address is None else "of the cluster"
    return _measured_on(place, where, _FOR_A_CAP, errand, console)


def measured_kinds(errand: Errand, address: str, console: Console) -> Iterator[DeviceTimes]:
    """The solo step times of a study's arms on one device of every kind that a cluster has, one kind after the other.

    Arguments and errors are those of `measured_steps`. The kind of which there are most comes first.

    Raises:
        RunError: also where the cluster has no device on which the study trains.
    """
    kinds = _kinds(errand, address, console)
    if not kinds:
        needed = _NEEDED[errand.resolved.study.resources.device]
        raise RunError(f"{address}: found no device to measure on, allowed: a cluster with {needed} for one cohort")
    for place in kinds:
        yield _measured_on(place, "of the cluster", "", errand, console)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where to measure.

    Attributes:
        kind: of the device as Ray names it; None for any, also of one that is still to come.
        node: Ray's id of the node; None for any that has the kind.
    """

    kind: str | None = None
    node: str | None = None


_ANY = _Place()


def _kinds(errand: Errand, address: str | None, console: Console) -> list[_Place]:
    """Kinds of device in the cluster, which is joined; that of which there are most first."""
    resources = errand.resolved.study.resources
    join_ray(address, resources, errand.run, errand.storage, console)
    check_fit(resources, waits=address is not None, console=console)
    devices = devices_there(resources)
    kinds = most_frequent_first(device.kind for device in devices)
    # Ray can be asked for a kind that it knows; where it knows some, a device of none has to be pointed at
    unnamed = next((device.node for device in devices if not device.kind), None) if len(kinds) > 1 else None
    return [_Place(kind=kind, node=None if kind else unnamed) for kind in kinds]


def _measured_on(place: _Place, where: str, purpose: str, errand: Errand, console: Console) -> DeviceTimes:
    """Measure on one device."""
    named = f"a device of kind {place.kind}" if place.kind else "a device"
    say(console, f"{_MEASURING}{purpose} on {named} {where}; {errand.run / LOGS / _LOG} follows")
    orders = Orders(errand.run)
    with posting(errand.run) as post:
        while True:
            try:
                table, lines = _once(place, f"{_MEASURING}{purpose}", errand, orders, post, console)
                break
            except _Paused:
                post("paused, without a device")
                orders.wait_for_resume()
            except RayTaskError as error:
                cause = error.cause if isinstance(error.cause, StudyError | WorkloadError) else None
                raise cause or _failed(errand.run, error) from error
            except RayError as error:
                raise _failed(errand.run, error) from error
    for line in lines:
        say(console, line)
    return table


class _Paused(Exception):
    """The run is to give up its device."""


def _once(
    place: _Place, doing: str, errand: Errand, orders: Orders, post: Callable[[str], None], console: Console
) -> tuple[DeviceTimes, list[str]]:
    """Wait for a device, measure on it and give it back, also where the run is told to end or to pause."""
    remote: Any = ray.remote
    share = _share(errand.resolved.study.resources, place)
    device = remote(max_restarts=0, **share)(_Device).remote()
    try:
        post(_WAITING)
        _awaited(device.__ray_ready__.remote(), orders, lambda: say(console, _WAITING))
        post(doing)
        whole = replace(errand, run=errand.run.resolve(), data=dict(errand.data), searched=dict(errand.searched))
        measured: tuple[DeviceTimes, list[str]] = _awaited(device.measure.remote(whole, place.kind), orders)
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


def _share(resources: Resources, place: _Place) -> dict[str, Any]:
    """A whole device, like that of a cohort: nothing else of the run may train beside what is timed."""
    gpus = 1 if resources.device == "cuda" else 0
    share = {"num_gpus": gpus, "num_cpus": 0 if gpus else resources.threads}
    if place.node is not None:
        return {**share, "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=place.node, soft=False)}
    return {**share, "resources": share_of_kind(place.kind or "")}


class _Device:
    """A process with a device of its own; as an actor it tells when it has got one."""

    def measure(self, errand: Errand, kind: str | None) -> tuple[DeviceTimes, list[str]]:
        """Returns the table of a kind of device and what was said, which the log has at once."""
        from tunebench.engine.solo import SoloPlan, solo_steps  # imports torch and NequIP, in this process only

        lines: list[str] = []

        def say(line: str) -> None:
            lines.append(line)
            log.warning(line)

        run, resolved, data, storage = errand.run, errand.resolved, errand.data, errand.storage
        with log_to(run_here(run, storage) / LOGS / _LOG):
            if storage is not None:
                data = {name: fetch_prepared(storage, prepared) for name, prepared in data.items()}
                here = tuple(workload_here(workload, storage) for workload in resolved.study.workloads)
                resolved = replace(resolved, study=resolved.study.model_copy(update={"workloads": here}))
            plan = SoloPlan(rounds=errand.rounds, seconds=errand.seconds, cache=graphs_folder(), accelerator=kind)
            return solo_steps(resolved, data, errand.searched, plan, say), lines


def _failed(run: Path, error: RayError) -> RunError:
    cause = getattr(error, "cause", None) or error
    return RunError(
        f"{run}: found no step times ({type(cause).__name__}: "
        f"{one_line(error)[:300]}), allowed: a device on which the study trains, or a {CALIBRATION} by `tunebench "
        "calibrate`"
    )
