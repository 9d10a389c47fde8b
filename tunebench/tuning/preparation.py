"""Before any trial: the data of every workload, and a build of every arm that is held against its promise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tunebench.study.plan import plan_arms
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import StudyError
from tunebench.workloads.coverage import check_labels
from tunebench.workloads.data import PreparedData, prepare
from tunebench.workloads.errors import WorkloadError


def prepare_workloads(resolved: ResolvedStudy, console: Console) -> dict[str, PreparedData]:
    """The data of every workload by its name, built or found in the cache.

    Raises:
        StudyError: data that contradict the study, with file and key.
    """
    prepared = {}
    for index, workload in enumerate(resolved.study.workloads):
        with _naming_the_workload(resolved, index):
            prepared[workload.name] = prepare(
                workload.data,
                base=resolved.file.parent,
                progress=partial(_print_progress, console, workload.name),
            )
            check_labels(prepared[workload.name], workload, resolved.study.objective)
    return prepared


def initial_weights(resolved: ResolvedStudy, data: dict[str, PreparedData]) -> dict[str, dict[str, Any]]:
    """What the workloads start from that start from a trained model, by their name, as plain values for a record.

    Raises:
        StudyError: a file that has changed since the run began, or that cannot be used with the workload's data.
    """
    starts = {}
    for index, workload in enumerate(resolved.study.workloads):
        if workload.init is None:
            continue
        from tunebench.workloads.starting_point import starting_point  # imports torch and NequIP

        with _naming_the_workload(resolved, index):
            start = starting_point(workload.init, workload.model, data[workload.name])
        starts[workload.name] = {"file": Path(workload.init.path).name, "digest": start.digest, **start.about}
    return starts


def check_arms(resolved: ResolvedStudy, data: dict[str, PreparedData]) -> None:
    """Build the model and the optimizer of every arm, in every variant it may search, before any trial does.

    Raises:
        StudyError: arguments that the model's builder refuses, settings that an optimizer refuses, or an
            optimizer that treats other weights of the model than its search space promises.
    """
    from tunebench.engine.calibration import untuned_task  # imports torch and NequIP
    from tunebench.engine.promise import check_arm

    for arm in plan_arms(resolved):
        index = resolved.study.workloads.index(arm.workload)
        with _naming_the_workload(resolved, index):
            try:
                check_arm(replace(untuned_task(resolved, arm, data[arm.workload.name]), device="cpu"), arm.space)
            except ValueError as error:
                raise WorkloadError("model", f"{arm.workload.model.family} for {arm.optimizer}", str(error)) from error


@contextmanager
def _naming_the_workload(resolved: ResolvedStudy, index: int) -> Iterator[None]:
    """Turn a workload's error into the study's, with file and whole key."""
    try:
        yield
    except WorkloadError as error:
        key = f"workloads[{index}].{error.key}"
        raise StudyError(resolved.file, key, error.found, error.allowed) from error


def _print_progress(console: Console, workload: str, line: str) -> None:
    console.print(f"{workload}: {line}", highlight=False, soft_wrap=True)
