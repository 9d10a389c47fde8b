"""Seconds of one training step of every arm, measured on this machine with untuned defaults."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nequip.data import AtomicDataDict
from nequip.utils.global_state import set_global_state

from tunebench.engine.batches import on_device, task_frames
from tunebench.engine.loss import LossWeights
from tunebench.engine.modules import build_module
from tunebench.engine.nequip_config import training_module
from tunebench.engine.task import TrialTask, trial_task
from tunebench.study.plan import ArmPlan, plan_arms, trial_seeds
from tunebench.study.record import Readout, Split, Stage
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import StudyError
from tunebench.workloads.data import PreparedData
from tunebench.workloads.frames import PreparedFrames
from tunebench.workloads.models import build_model
from tunebench.workloads.order import batch_order

_WARM, _TIMED = 3, 7


def step_seconds(resolved: ResolvedStudy, data: Mapping[str, PreparedData]) -> dict[str, float]:
    """Median seconds of a step (data, forward, backward, update) by arm name, without evaluation.

    Runs on the device the study asks for, one arm after the other.

    Raises:
        StudyError: the study asks for a GPU and there is none.
    """
    if resolved.study.resources.gpus_per_trial > 0 and not torch.cuda.is_available():
        allowed = "0 on a machine without a GPU, or a plan without measuring (--no-measure)"
        raise StudyError(resolved.file, "resources.gpus_per_trial", resolved.study.resources.gpus_per_trial, allowed)
    set_global_state()
    torch.set_num_threads(resolved.study.resources.threads)
    return {arm.name: _measure(untuned_task(resolved, arm, data[arm.workload.name])) for arm in plan_arms(resolved)}


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
    module = build_module(config, LossWeights.of(task.workload.loss), task.averaged).to(task.device)
    return module, module.configure_optimizers()["optimizer"]


def _measure(task: TrialTask) -> float:
    workload = task.workload
    module, optimizer = training_parts(task)
    module.train()
    if task.averaged is Readout.SCHEDULE_FREE:
        optimizer.train()
    frames = task_frames(task, Split.TRAIN)
    batches = batch_order(len(frames), workload.batch_size, _WARM + _TIMED, task.seeds.order)
    times = [_step(module, optimizer, frames, batch, task.device) for batch in batches]
    return statistics.median(times[_WARM:])


def _step(module: Any, optimizer: Any, frames: PreparedFrames, indices: list[int], device: str) -> float:
    began = time.perf_counter()
    batch = on_device(AtomicDataDict.batched_from_list(frames.__getitems__(indices)), device)
    optimizer.zero_grad()
    module.training_step(batch, 0).backward()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
