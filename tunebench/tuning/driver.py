"""One driver: a Ray Tune run over a fixed list of trials, those of whole arms of one stage."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune

from tunebench.engine.board import TrialBoard
from tunebench.engine.task import Evaluation, TrialTask
from tunebench.study.record import TENSORBOARD, Reason, TrialRecord
from tunebench.study.spec import Asha, Resources
from tunebench.study.storage import Storage
from tunebench.tuning.asha import PerArmAsha, arm_ladders
from tunebench.tuning.entries import Called, Write
from tunebench.tuning.orders import Orders
from tunebench.tuning.pool_client import Room, TrialQueue, start_here
from tunebench.tuning.reception import Reception
from tunebench.tuning.recorder import Recorder
from tunebench.tuning.shares import Shares, trial_resources
from tunebench.tuning.tenancy import VISIT
from tunebench.tuning.trainable import train_trial
from tunebench.tuning.trial_actors import AFTER_LAST, use_trial_actors

TUNE = ".tune"
"""Folder of a run directory with Tune's own state, of which nothing is left at the end of a stage."""


@dataclass(frozen=True, kw_only=True)
class DriverWork:
    """What one driver works on.

    Attributes:
        name: of Tune's run; no two drivers of a stage share it.
        run: the run directory. storage: of the run, or None.
        records: trials of the driver's arms, those that have ended among them.
        tenants: open trials of the cohort engine, by name in the order they are to begin. alone: those of other
            engines.
        bound: kind of device, by workload, that all of `alone` are to train on, where they are to train on one.
        engines: name of the engine of each workload.
        rungs: steps by arm, where trials are stopped at all.
        asha: how the study stops; None stops nothing. fewest: trials that a rung lets go on at least.
        resources: what the study says of devices, slots and failures.
    """

    name: str
    run: Path
    storage: Storage | None
    records: Sequence[TrialRecord]
    tenants: Mapping[str, TrialTask]
    alone: Mapping[str, TrialTask]
    bound: Mapping[str, str]
    engines: Mapping[str, str]
    rungs: Mapping[str, tuple[int, ...]]
    asha: Asha | None
    fewest: int
    resources: Resources

    def of_arms(self, arms: Sequence[str], name: str) -> DriverWork:
        """The part of the work that is of some arms."""
        keys = {record.key.trial_id for record in self.records if record.key.arm in arms}
        return replace(
            self,
            name=name,
            records=[record for record in self.records if record.key.trial_id in keys],
            tenants={trial: task for trial, task in self.tenants.items() if trial in keys},
            alone={trial: task for trial, task in self.alone.items() if trial in keys},
            rungs={arm: steps for arm, steps in self.rungs.items() if arm in arms},
        )


def drive(work: DriverWork, room: Room, write: Write, callbacks: Sequence[tune.Callback] = ()) -> None:
    """Run a driver's open trials until each has ended; an interrupt returns early with trials left open.

    Args:
        work: what is to be done.
        room: how many trials may train at once.
        write: takes what becomes of trials.
        callbacks: further ones of Tune.

    Raises:
        Interrupted: the run was asked to end.
        RunStopped: the disk is full, the storage failed or the pool has died.
    """
    tasks = {**work.tenants, **work.alone}
    keys = {record.key.trial_id: record.key for record in work.records}
    orders = Orders(work.run)
    # the queue and the scheduler each ask the other while the stage runs
    queue = TrialQueue(
        list(tasks),
        work.tenants,
        room,
        lambda: scheduler.waiting,
        orders.closed,
        lambda trial: write([Called(key=keys[trial])]),
    )
    ladders = arm_ladders(work.asha, work.rungs, work.records, work.fewest)
    scheduler = PerArmAsha(ladders, keys.__getitem__, queue.first_with_room, orders.wish)
    recorder = Recorder(
        write,
        scheduler,
        keys,
        work.run,
        work.engines,
        left=lambda trial, result: room.vacate(trial, result.get(VISIT, "")),
        stopped=lambda key, last: _close_board(tasks[key.trial_id], last),
        obey=orders.obey,
        storage=work.storage,
    )
    use_trial_actors(lambda: start_here(Reception, room.actor, work.run.resolve(), work.storage, AFTER_LAST))
    fit(_trainable(work), queue, scheduler, [recorder, *callbacks], work.run, work.name, work.resources)


def _trainable(work: DriverWork) -> Any:
    alone = dict(work.alone)
    trial = tune.with_parameters(train_trial, tasks=alone)
    kinds = {name: work.bound.get(task.workload.name, "") for name, task in alone.items()}
    return tune.with_resources(trial, Shares(trial_resources(work.resources), kinds))


def fit(
    trainable: Any,
    queue: TrialQueue,
    scheduler: PerArmAsha,
    callbacks: list[tune.Callback],
    run: Path,
    name: str,
    resources: Resources,
) -> None:
    """Hand the trials of a queue to Tune and return when all have ended; of Tune's own folder nothing is left then."""
    storage = run.resolve() / TUNE
    tune.Tuner(
        trainable,
        param_space=queue.param_space,
        tune_config=tune.TuneConfig(
            num_samples=queue.num_samples,
            scheduler=scheduler,
            search_alg=queue,
            reuse_actors=True,
            trial_name_creator=_trial_id,
            trial_dirname_creator=_trial_id,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=str(storage),
            verbose=0,
            callbacks=callbacks,
            failure_config=tune.FailureConfig(max_failures=resources.max_failures),
        ),
    ).fit()
    shutil.rmtree(storage / name, ignore_errors=True)  # the journal, curves and logs hold all of it


def _close_board(task: TrialTask, last: Evaluation) -> None:
    """A stopped trial's process may be gone, and cannot tell a stop from a pause; its end is written here."""
    folder = task.run / TENSORBOARD / task.key.trial_id
    before = set(folder.glob("events.*"))
    TrialBoard(task.run, task.key, task.hyperparameters, last.step).close(last, Reason.STOPPED_ASHA)
    if task.storage is not None:
        for file in set(folder.glob("events.*")) - before:
            task.storage.put(file.relative_to(task.run).as_posix(), file)


def _trial_id(trial: Any) -> str:
    return str(trial.config["trial"])
