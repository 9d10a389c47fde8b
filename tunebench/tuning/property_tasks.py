"""Physical properties of the confirm stage's models, as Ray tasks after training.

A task has one model and is the only writer of its files. What a file holds is not computed again, so a second start
goes on where a kill came, with the entry that it interrupted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayTaskError, TaskCancelledError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from tunebench.properties.model_record import (
    ModelRecord,
    fail_model,
    has_reference,
    make_reference,
    measure_model,
    reference_name,
)
from tunebench.properties.models_of_run import models_of_run
from tunebench.properties.of_study import Measurement, measurements
from tunebench.properties.time_limit import EntryClock, ended_by_clock
from tunebench.study.control import Wish
from tunebench.study.errors import RunError
from tunebench.study.record import Readout, TrialRecord
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import ModelProperties, Study
from tunebench.study.storage import Storage
from tunebench.tuning.console_lines import say
from tunebench.tuning.orders import Orders
from tunebench.tuning.stage import join_ray
from tunebench.tuning.trial_log import log_to, trial_log

if TYPE_CHECKING:
    from tunebench.tuning.runner import RunOptions

_LOOK_EVERY_S = 1.0
_SAY_EVERY_S = 30.0


@dataclass(frozen=True, kw_only=True)
class ModelJob:
    """One model and what is to be computed of it.

    Attributes:
        model: its name, which is that of its files.
        checkpoint: where it lies.
        readout: which weights; None for a reference, which is the section's own.
        measured: sections and their plans.
        cpus, gpus: what its task is given.
    """

    model: str
    checkpoint: Path
    readout: Readout | None
    measured: tuple[Measurement, ...]
    cpus: float
    gpus: float

    @property
    def device(self) -> str:
        """Where the model runs."""
        return "cuda" if self.gpus > 0 else "cpu"

    def left(self, run: Path) -> int:
        """Entries that are not done."""
        if self.readout is None:
            return 0 if has_reference(run, self.measured[0].section) else 1
        done = ModelRecord(run, self.model).entries
        return sum(entry not in done for part in self.measured for entry in part.plan.properties)


def reference_jobs(study: Study) -> list[ModelJob]:
    """A job for the reference of each section."""
    jobs = []
    for index, section in enumerate(study.properties):
        workload = (section.workloads or (study.workloads[0].name,))[0]
        own = tuple(part for part in measurements(study, workload) if part.section == index)
        name = reference_name(index)
        jobs.append(_job(name, Path(), None, own, study.properties))
    return jobs


def model_jobs(study: Study, records: Sequence[TrialRecord], run: Path) -> list[ModelJob]:
    """A job for each model that the confirm stage has left."""
    return [
        _job(model.name, model.checkpoint, model.readout, model.measured, study.properties)
        for model in models_of_run(study, records, run)
    ]


def run_properties(
    resolved: ResolvedStudy,
    records: Sequence[TrialRecord],
    options: RunOptions,
    storage: Storage | None,
    console: Console,
) -> None:
    """Compute all properties that are not there, references first.

    On a joined cluster they wait for whatever node has room. With a storage, models are measured on the driver's node,
    which alone has their checkpoints as files.

    Raises:
        RunError: a reference cannot be computed, or the driver's node has no room for a model.
        Interrupted: that was asked; what is done is kept.
    """
    study, run = resolved.study, options.run.resolve()
    jobs = model_jobs(study, records, run)
    if not any(job.left(run) for job in jobs):
        return
    join_ray(options.address, study.resources, run, storage, console)
    references = reference_jobs(study)
    alone = storage is not None or options.address is None
    node = _node_with_room([*references, *jobs]) if alone else None
    _Tasks(run, study, node, console).work_off(references, "references")
    _Tasks(run, study, node, console).work_off(jobs, "models")


def _node_with_room(jobs: Sequence[ModelJob]) -> str:
    """Ray's id of the driver's node.

    Raises:
        RunError: it is too small for a job.
    """
    own = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    (room,) = (node["Resources"] for node in nodes if node["NodeID"] == own)
    cpus, gpus = room.get("CPU", 0.0), room.get("GPU", 0.0)
    wanted = max(job.cpus for job in jobs), max(job.gpus for job in jobs)
    if cpus < wanted[0] or gpus < wanted[1]:
        raise RunError(
            f"properties: found {cpus:g} CPUs and {gpus:g} GPUs on the driver's node, which measures the models of a "
            f"machine alone or of a run with a storage, allowed: at least {wanted[0]:g} CPUs and {wanted[1]:g} GPUs "
            "(cpus_per_model, gpus_per_model)"
        )
    return str(own)


def _job(
    name: str,
    checkpoint: Path,
    readout: Readout | None,
    measured: tuple[Measurement, ...],
    sections: Sequence[ModelProperties],
) -> ModelJob:
    """A model that several sections measure gets the most that one of them asks for."""
    return ModelJob(
        model=name,
        checkpoint=checkpoint,
        readout=readout,
        measured=measured,
        cpus=max(sections[part.section].cpus_per_model for part in measured),
        gpus=max(sections[part.section].gpus_per_model for part in measured),
    )


def _measure(job: ModelJob, run: Path) -> None:
    """The task: in a process of its own, with the resources of the job."""
    import torch

    from tunebench.properties.calculators import calculator_from

    torch.set_num_threads(max(int(job.cpus), 1))
    clock = EntryClock(run=run, model=job.model)
    with log_to(trial_log(run, f"{job.model}.properties")):
        if job.readout is None:
            (part,) = job.measured
            make_reference(run, part, job.device, clock)
        else:
            measure_model(
                run,
                job.model,
                job.measured,
                lambda: calculator_from(job.checkpoint, job.device, job.readout),
                clock=clock,
            )


class _Tasks:
    """Works off jobs on the cluster, and lets them go where something else is asked of the run."""

    def __init__(self, run: Path, study: Study, node: str | None, console: Console) -> None:
        self._run, self._study, self._node, self._console = run, study, node, console
        self._orders = Orders(run)
        self._said = time.monotonic()

    def work_off(self, jobs: Sequence[ModelJob], what: str) -> None:
        """Return when all jobs are done.

        Raises:
            RunError: a reference cannot be had.
            Interrupted: the run is cancelled or drained.
        """
        say_left = partial(self._say, len(jobs), what)
        while left := [job for job in jobs if job.left(self._run)]:
            self._orders.wait_for_resume()
            say_left(len(left))
            self._round(left, say_left)
        say_left(0)

    def _say(self, planned: int, what: str, left: int) -> None:
        say(self._console, f"properties: {planned - left} of {planned} {what} done")
        self._said = time.monotonic()

    def _round(self, jobs: Sequence[ModelJob], say_left: Callable[[int], None]) -> None:
        """Start all jobs and wait; Ray runs as many at a time as the cluster has room for."""
        remote: Any = ray.remote(_measure)
        where = "DEFAULT" if self._node is None else NodeAffinitySchedulingStrategy(node_id=self._node, soft=False)
        tasks = {
            remote.options(
                num_cpus=job.cpus,
                num_gpus=job.gpus,
                max_retries=self._study.resources.max_failures,
                name=job.model,
                scheduling_strategy=where,
            ).remote(job, self._run): job
            for job in jobs
        }
        pending = list(tasks)
        try:
            while pending and self._orders.wish() is Wish.RESUME:
                ready, pending = ray.wait(pending, timeout=_LOOK_EVERY_S)
                for task in ready:
                    self._end(task, tasks)
                if pending and time.monotonic() - self._said >= _SAY_EVERY_S:
                    say_left(len(pending))
        finally:
            for task in pending:
                ray.cancel(task, force=True)

    def _end(self, task: Any, tasks: Mapping[Any, ModelJob]) -> None:
        """Take a task's end; one whose process died again and again, or that raised, has failed properties."""
        job = tasks[task]
        try:
            ray.get(task)
            return
        except TaskCancelledError:
            return
        except RayTaskError as error:
            reason = " ".join(f"{type(error.cause).__name__}: {error.cause}".split())[:300]
        except ray.exceptions.RayError as error:
            if ended_by_clock(self._run, job.model):
                return  # its next process records that and goes on with the other entries
            reason = f"its process ended: {' '.join(str(error).split())[:200]}"
        if job.readout is None:
            raise RunError(f"{self._run}: {job.model} of the properties: {reason}")
        say(self._console, f"{job.model}: {reason}")
        fail_model(self._run, job.model, job.measured, reason)
