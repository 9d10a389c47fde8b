"""Training steps of the lightning engine alone, and what they take with untuned defaults: the times in a plan."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from nequip.data import AtomicDataDict
from nequip.utils.global_state import set_global_state

from tunebench.engine.batches import on_device, task_frames
from tunebench.engine.graphs import synchronize
from tunebench.engine.modules import trial_module
from tunebench.engine.nequip_config import training_module
from tunebench.engine.task import TrialTask, trial_task
from tunebench.study.plan import ArmPlan, plan_arms, trial_seeds
from tunebench.study.record import Readout, Split, Stage
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import StudyError
from tunebench.workloads.data import PreparedData
from tunebench.workloads.models import build_model
from tunebench.workloads.order import batch_order

_WARM, _TIMED = 3, 7


def step_seconds(resolved: ResolvedStudy, data: Mapping[str, PreparedData]) -> dict[str, float]:
    """Median seconds of a step (data, forward, backward, update) by arm name, without evaluation.

    Runs on the device the study asks for, one arm after the other.

    Raises:
        StudyError: the study asks for a GPU and there is none.
    """
    check_device(resolved, "or a plan without measuring (--no-measure)")
    set_global_state()
    torch.set_num_threads(resolved.study.resources.threads)
    return {arm.name: _measure(untuned_task(resolved, arm, data[arm.workload.name])) for arm in plan_arms(resolved)}


def check_device(resolved: ResolvedStudy, otherwise: str) -> None:
    """Refuse to measure on a machine without the GPU that the study asks for.

    Args:
        resolved: the study.
        otherwise: what else is allowed, for the message.

    Raises:
        StudyError: there is none.
    """
    if resolved.study.resources.gpus_per_trial > 0 and not torch.cuda.is_available():
        allowed = f"0 on a machine without a GPU, {otherwise}"
        raise StudyError(resolved.file, "resources.gpus_per_trial", resolved.study.resources.gpus_per_trial, allowed)


def untuned_task(resolved: ResolvedStudy, arm: ArmPlan, data: PreparedData) -> TrialTask:
    """A trial of an arm with the untuned defaults of its search space; it belongs to no run."""
    key = arm.key(Stage.TUNE, 0, 0)
    seeds = trial_seeds(resolved.study.seed, key.workload, key.stage, key.seed_index)
    return trial_task(resolved, arm, data, key, params=arm.space.defaults(), seeds=seeds, run=Path())


def training_parts(task: TrialTask) -> tuple[Any, Any]:
    """A trial's training module and optimizer as Lightning would build them.

    Raises:
        WorkloadError: the model's builder refuses its arguments.
        ValueError: the optimizer finds nothing to do in this model.
    """
    config = training_module(task)
    build_model(config["model"])  # names what is wrong with the arguments
    module = trial_module(task, config).to(task.device)
    return module, configured_optimizer(module)


def configured_optimizer(module: Any) -> Any:
    """The optimizer of a training module.

    Raises:
        ValueError: its parameter groups find nothing to do in this model; Hydra would hide that in an error of its own.
    """
    try:
        return module.configure_optimizers()["optimizer"]
    except InstantiationException as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None
        raise


class LightningSteps:
    """The training steps of a trial as the lightning engine makes them, with nothing between them.

    Args:
        task: the trial.

    Raises:
        WorkloadError: the data or the model's arguments are refused.
        ValueError: the optimizer finds nothing to do in this model.
    """

    def __init__(self, task: TrialTask) -> None:
        self._task, workload = task, task.workload
        self._module, self._optimizer = training_parts(task)
        self._module.train()
        if task.averaged is Readout.SCHEDULE_FREE:
            self._optimizer.train()
        self._frames = task_frames(task, Split.TRAIN)
        self._batches = iter(batch_order(len(self._frames), workload.batch_size, workload.max_steps, task.seeds.order))

    def run(self, steps: int) -> None:
        """So many steps (data, forward, backward, update, average); returns when the device is done.

        Raises:
            ValueError: the trial's horizon is nearer than that.
        """
        for done in range(steps):
            batch = next(self._batches, None)
            if batch is None:
                raise ValueError(f"run: found {steps} steps, allowed: {done}, which are left to the horizon")
            self._step(batch)
        synchronize(torch.device(self._task.device))

    def _step(self, indices: list[int]) -> None:
        batch = on_device(AtomicDataDict.batched_from_list(self._frames.__getitems__(indices)), self._task.device)
        self._optimizer.zero_grad()
        self._module.training_step(batch, 0).backward()
        limit = self._task.workload.clip_global_norm
        if limit is not None:
            torch.nn.utils.clip_grad_norm_(self._module.parameters(), limit)
        self._optimizer.step()
        if self._task.averaged is Readout.EMA:
            self._module.ema.update_parameters(self._module.model)


def _measure(task: TrialTask) -> float:
    horizon = _WARM + _TIMED
    workload = task.workload.model_copy(update={"max_steps": horizon})
    steps = LightningSteps(replace(task, workload=workload, evaluation_steps=(horizon,), horizons=()))
    steps.run(_WARM)
    return statistics.median(_seconds(steps) for _ in range(_TIMED))


def _seconds(steps: LightningSteps) -> float:
    began = time.perf_counter()
    steps.run(1)
    return time.perf_counter() - began
