"""One stage of a study: a Ray Tune run over a fixed list of trials, or several beside each other."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from rich.console import Console

from tunebench.engine.board import write_experiment
from tunebench.engine.task import TrialTask
from tunebench.study.errors import RunError
from tunebench.study.journal import JournalWriter
from tunebench.study.plan import ArmPlan
from tunebench.study.record import Stage, TrialRecord
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.run_copy import RunCopy
from tunebench.study.spec import Engine, Resources
from tunebench.study.storage import Storage
from tunebench.tuning.arm_boards import ArmBoards
from tunebench.tuning.devices import most_frequent_first
from tunebench.tuning.driver import TUNE, DriverWork, drive
from tunebench.tuning.driver_log import log_driver
from tunebench.tuning.engine_choice import EngineChoice
from tunebench.tuning.entries import Clerk
from tunebench.tuning.node_checks import Standard, check_nodes, devices_there
from tunebench.tuning.pool_client import PoolClient
from tunebench.tuning.progress import Progress
from tunebench.tuning.ray_environment import terminate_like_interrupt
from tunebench.tuning.retention import retention
from tunebench.tuning.shards import Shards
from tunebench.tuning.shares import trial_resources

if TYPE_CHECKING:
    from tunebench.tuning.runner import RunOptions

_OBJECT_STORE_BYTES = 128 * 2**20  # trials exchange files, not objects


def run_stage(
    resolved: ResolvedStudy,
    stage: Stage,
    arms: list[ArmPlan],
    records: list[TrialRecord],
    tasks: Mapping[str, TrialTask],
    engines: Mapping[str, EngineChoice],
    pool: PoolClient,
    shards: Shards,
    copy: RunCopy,
    journal: JournalWriter,
    boards: ArmBoards,
    options: RunOptions,
    console: Console,
) -> None:
    """Run `tasks`, the trials of `records` that have not ended, until each is closed in the journal.

    Trials of the cohort engine come first: their tenants wait for slots of `pool`, the others for Ray's resources.
    Where one driver is enough, this process is it. Ctrl-C returns early with trials left open.
    """
    study = resolved.study
    write_experiment(options.run, {name for arm in arms for name in (*arm.space.parameters, *arm.space.fixed)})
    progress = Progress.of(options.run, stage, console, records)
    join_ray(options.address, study.resources, options.run, copy.storage, console)
    check_fit(study.resources, waits=options.address is not None, console=console)
    names = {workload: choice.engine.value for workload, choice in engines.items()}
    workloads = {name: task.workload.name for name, task in tasks.items()}
    shared = {name: workload for name, workload in workloads.items() if names[workload] == Engine.COHORT}
    tenants = {name: tasks[name] for name in in_turn(shared, len(devices_there(study.resources)))}
    alone = {name: task for name, task in tasks.items() if name not in tenants}
    alike = stage is Stage.CONFIRM and "F9" not in study.waive
    begun = _kinds(records)
    work = DriverWork(
        name=stage.value,
        run=options.run.resolve(),
        storage=copy.storage,
        records=records,
        tenants=tenants,
        alone=alone,
        bound=_bound(alone, begun, study.resources) if alike else {},
        engines=names,
        rungs={arm.name: arm.rungs for arm in arms} if stage is Stage.TUNE else {},
        asha=study.tune.asha,
        fewest=study.confirm.top_k,
        resources=study.resources,
    )
    pool.plan(tenants, others_wait=bool(alone), kinds=begun if alike else None, bound=work.bound)
    clerk, watching = Clerk(journal, progress, retention(study.keep_checkpoints), copy), Watching(boards, pool)
    with progress:
        works = shards.divided(work)
        if len(works) == 1:
            drive(work, pool, clerk.write, [watching])
        else:
            shards.run(works, pool, clerk.write, watching.look)
    shutil.rmtree(options.run / TUNE, ignore_errors=True)


def _kinds(records: list[TrialRecord]) -> dict[str, str]:
    """Kinds of device on which the trials of each workload have begun, where any has."""
    return {record.key.workload: record.device for record in records if record.device is not None}


def _bound(tasks: Mapping[str, TrialTask], begun: Mapping[str, str], resources: Resources) -> dict[str, str]:
    """Kinds of device, by workload, on which trials of the lightning engine train that are all to train on one.

    That on which their workload has begun, else that of which the cluster has most. Ray cannot be asked for a kind that
    it does not know, nor for one that is still to come: those trials train on any, and the report says so.
    """
    there = most_frequent_first(device.kind for device in devices_there(resources) if device.kind)
    workloads = dict.fromkeys(task.workload.name for task in tasks.values())
    found = {workload: begun.get(workload) or next(iter(there), "") for workload in workloads}
    return {workload: kind for workload, kind in found.items() if kind}


def in_turn(trials: Mapping[str, str], devices: int) -> list[str]:
    """The order in which trials begin: those of as many workloads as there are devices by turns, then the next ones.

    A device trains one workload at a time. Trials of more workloads than devices would wait and fill no slot. With
    fewer, devices that could have begun with one each would all begin with the first and change over on the way.

    Args:
        trials: the workload of each, in the order of the study.
        devices: of the cluster, as far as it has grown.
    """
    of_workload: dict[str, list[str]] = {}
    for trial, workload in trials.items():
        of_workload.setdefault(workload, []).append(trial)
    left, together = list(of_workload.values()), max(devices, 1)
    turns = chain.from_iterable(zip_longest(*left[first : first + together]) for first in range(0, len(left), together))
    return [trial for turn in turns for trial in turn if trial is not None]


class Watching(tune.Callback):
    """Shows the arms of a stage, and what becomes of the cluster's nodes, while Tune works on it."""

    def __init__(self, boards: ArmBoards, pool: PoolClient) -> None:
        self._boards, self._pool = boards, pool

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, and a resumed run makes its own

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Show what is new, where it is time to."""
        self.look()

    def look(self) -> None:
        """Show what is new, where it is time to.

        Raises:
            RunStopped: the pool has died.
        """
        self._boards.show_when_due()
        self._pool.look()


def join_ray(address: str | None, resources: Resources, run: Path, storage: Storage | None, console: Console) -> None:
    """Join a cluster, or start one on this machine, whose ports ask for the token of `set_ray_environment`.

    A process that is connected already stays so. SIGTERM ends it as Ctrl-C does, as before.

    Raises:
        RunError: a node of the cluster runs other software than this process, or does not share the run's storage.
    """
    log_driver(run)
    joins = not ray.is_initialized()
    if joins:
        own = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES, "configure_logging": False}
        where = {"address": address} if address else {"address": "local", **own}
        environment = {"env_vars": {"OMP_NUM_THREADS": str(resources.threads)}}
        ray.init(**where, runtime_env=environment, log_to_driver=False)
    terminate_like_interrupt()  # Ray has set its own handler, which aborts
    if joins and address:
        check_nodes(Standard.of_driver(resources.device, run, storage), console)


def check_fit(resources: Resources, *, waits: bool, console: Console) -> None:
    """Look for a node with room for one trial.

    A cluster may still grow, so there (`waits`) it is a warning.

    Raises:
        RunError: this machine has no room and never will.
    """
    wanted = trial_resources(resources)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if any(all(node.get(name, 0.0) >= amount for name, amount in wanted.items()) for node in nodes):
        return
    found = "; ".join(f"{node.get('CPU', 0.0):g} CPUs and {node.get('GPU', 0.0):g} GPUs" for node in nodes)
    allowed = f"a node with {wanted['CPU']:g} CPUs and {wanted['GPU']:g} GPUs for one trial (resources)"
    if not waits:
        raise RunError(f"this machine: found {found}, allowed: {allowed}")
    console.print(f"waiting for {allowed}; the cluster has {found}", style="yellow", highlight=False, soft_wrap=True)
