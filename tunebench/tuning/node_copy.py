"""A run on a node that does not see the driver's disk: its folder there, and what of a trial is brought to it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunebench.study.storage import Storage

if TYPE_CHECKING:
    from tunebench.engine.task import TrialTask
    from tunebench.study.spec import Workload


def run_here(run: Path, storage: Storage | None) -> Path:
    """The run directory on this node: that of the driver, or with a storage a folder in this node's cache."""
    if storage is None:
        return run
    from tunebench.workloads.data import cache_folder  # imports ASE, which the reception does without

    address = storage.address.rstrip("/")
    digest = hashlib.sha256(address.encode()).hexdigest()[:12]
    return cache_folder().expanduser().resolve() / "runs" / f"{address.rpartition('/')[2]}-{digest}"


def task_here(task: TrialTask) -> TrialTask:
    """A trial's task with the paths of this node; its data and base model are brought here where they are not yet.

    Raises:
        StorageError: the storage cannot be read.
        WorkloadError: this node's cache cannot be written.
    """
    if task.storage is None:
        return task
    from tunebench.workloads.stored_data import fetch_prepared  # likewise

    return replace(
        task,
        run=run_here(task.run, task.storage),
        data=fetch_prepared(task.storage, task.data),
        workload=workload_here(task.workload, task.storage),
    )


def workload_here(workload: Workload, storage: Storage) -> Workload:
    """A workload whose base model, if it has one, lies on this node; it is brought here where it is not yet.

    Raises:
        StorageError: the storage cannot be read.
    """
    if workload.init is None:
        return workload
    from tunebench.workloads.stored_data import fetch_initial  # likewise

    return workload.model_copy(update={"init": fetch_initial(storage, workload.init)})
