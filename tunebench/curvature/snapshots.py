"""Where a trial stood: from its checkpoint, or by training it again to the steps that are asked for.

A trial is read in a scratch folder, so nothing in its run changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tunebench.curvature.preconditioners import OptimizerState
from tunebench.engine.book import last_evaluation
from tunebench.engine.checkpoints import LAST, checkpoint_folder
from tunebench.engine.cohort import Cohort
from tunebench.engine.lightning import run_trial
from tunebench.engine.task import Evaluation, TrialTask
from tunebench.engine.tenant import ModuleShelf, Tenant
from tunebench.optim.factored import reads_average
from tunebench.optim.packing import Tensors
from tunebench.study.errors import RunError
from tunebench.study.record import Readout, Stage
from tunebench.study.spec import Engine
from tunebench.workloads.data import graphs_folder


@dataclass(frozen=True, kw_only=True, eq=False)
class Snapshot:
    """A trial at one step, on the CPU.

    Attributes:
        model: of its training module, for its structure and constants.
        optimizer: the update rule with its state and the trained weights.
        weights: where the trial says its solution is: the trained weights, for schedule-free ones their average.
        readout: which of them.
    """

    model: torch.nn.Module
    optimizer: OptimizerState
    weights: Tensors
    readout: Readout

    @property
    def step(self) -> int:
        """Finished steps."""
        return self.optimizer.step


def checkpoint_snapshot(task: TrialTask) -> Snapshot:
    """The trial at its last checkpoint.

    Raises:
        RunError: it has none.
    """
    folder = checkpoint_folder(task.run, task.key.trial_id)
    if not (folder / LAST).is_file():
        allowed = "a trial with a checkpoint (the study's keep_checkpoints), or steps to train it to again (--at)"
        raise RunError(f"{folder}: found no {LAST}, allowed: {allowed}")
    with TemporaryDirectory(prefix="tunebench-curvature-") as scratch:
        return _read(folder / LAST, replace(task, run=Path(scratch)))


def trained_snapshots(task: TrialTask, steps: Sequence[int], engine: Engine) -> Iterator[Snapshot]:
    """The trial at these steps, by training it anew from its seeds.

    Args:
        task: the trial; it trains through its first horizon only.
        steps: ascending, within that horizon.
        engine: that trained it, COHORT or LIGHTNING.

    Raises:
        RunError: a step outside the horizon, or the trial ends before it gets there.
    """
    if not steps or list(steps) != sorted(set(steps)) or steps[0] < 1 or steps[-1] > task.horizon:
        allowed = f"ascending, from 1 to {task.horizon}, the horizon of {task.key.trial_id}"
        raise RunError(f"curvature: steps: found {', '.join(map(str, steps)) or 'none'}, allowed: {allowed}")
    ends = task.horizons or (task.workload.max_steps,)
    with TemporaryDirectory(prefix="tunebench-curvature-") as scratch:
        again = replace(
            task,
            key=replace(task.key, stage=Stage.TUNE),  # the splits that are opened once stay closed
            run=Path(scratch),
            evaluation_steps=tuple(sorted({*steps, *ends})),
            rungs=(),
            refine=None,
            written_every_s=0.0,
            time_limit_s=None,
        )
        train = _by_lightning if engine is Engine.LIGHTNING else _by_cohort
        for evaluation, file in train(again, steps):
            if evaluation.step not in steps or not evaluation.is_sound:
                found = f"{evaluation.outcome} at step {evaluation.step}: {evaluation.message}"
                raise RunError(
                    f"curvature: {task.key.trial_id}: found {found}, allowed: a trial that gets to its steps"
                )
            with TemporaryDirectory(prefix="tunebench-curvature-") as reading:
                yield _read(file, replace(again, run=Path(reading)))


def _by_cohort(task: TrialTask, steps: Sequence[int]) -> Iterator[tuple[Evaluation, Path]]:
    """Reports at these steps, and the checkpoint of each."""
    name, file = task.key.trial_id, checkpoint_folder(task.run, task.key.trial_id) / LAST
    cohort = Cohort(task, 1, cache=graphs_folder(), compiled=False)
    cohort.join(task)
    while reports := cohort.advance():
        ((_, evaluation),) = reports
        yield evaluation, file
        if evaluation.step == steps[-1] or evaluation.outcome is not None:
            break
        cohort.go_on(name)
    if name in cohort.trials:
        cohort.leave(name)


def _by_lightning(task: TrialTask, steps: Sequence[int]) -> Iterator[tuple[Evaluation, Path]]:
    """Likewise; Lightning calls back, so all steps are trained before the first is returned."""
    file, kept = checkpoint_folder(task.run, task.key.trial_id) / LAST, []

    def report(evaluation: Evaluation) -> None:
        copy = task.run / f"{evaluation.step}.pt"
        if evaluation.is_sound:
            shutil.copyfile(file, copy)
        kept.append((evaluation, copy))
        if evaluation.step == steps[-1]:
            raise SystemExit

    with suppress(SystemExit):  # at the last step that was asked for
        run_trial(task, report)
    yield from kept


def _read(file: Path, task: TrialTask) -> Snapshot:
    """The trial as a checkpoint file has it; `task` runs in a folder of its own."""
    folder = checkpoint_folder(task.run, task.key.trial_id)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / LAST)
    if last_evaluation(task.run, task.key.trial_id) is None:
        raise RunError(f"{file}: found a checkpoint that cannot be read, allowed: a whole one")
    tenant = Tenant(task, ModuleShelf())
    tenant.book.close(None)
    state, rule = tenant.state, tenant.rule
    if state.step == 0:
        raise RunError(f"{file}: found a checkpoint of another horizon, allowed: one of at most {task.horizon} steps")
    optimizer = OptimizerState(
        rule=rule, step=state.step, hyper=tenant.hyper, tensors=state.optimizer, weights=state.weights
    )
    readout = Readout.RAW if reads_average(rule) is None else Readout.SCHEDULE_FREE
    weights = tenant.weights_of(state, readout)
    return Snapshot(model=tenant.model, optimizer=optimizer, weights=weights, readout=readout)
