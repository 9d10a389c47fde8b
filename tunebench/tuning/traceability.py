"""Whether a workload's model can be written as a function of its weights, which the cohort needs."""

from __future__ import annotations

import torch
from nequip.utils.global_state import set_global_state

from tunebench.engine.batches import task_frames
from tunebench.engine.calibration import training_parts
from tunebench.engine.functional import OUTPUTS, Untraceable, functional_model
from tunebench.engine.padding import padding_plan
from tunebench.engine.resident import assemble, resident_frames
from tunebench.engine.task import TrialTask
from tunebench.study.record import Split
from tunebench.workloads.data import graphs_folder


def why_untraceable(task: TrialTask) -> str:
    """Why the model of a task cannot be traced, in one line; empty where it can.

    Trains nothing, and leaves the trace where cohorts look for it.
    """
    set_global_state()
    module, _ = training_parts(task)
    cutoff, device = task.workload.model.r_max_angstrom, torch.device(task.device)
    frames = resident_frames(task_frames(task, Split.TRAIN), cutoff, device, leave_out=("atomic_numbers", "pbc"))
    shape = padding_plan(frames.sizes, task.workload.batch_size).usual
    example = assemble(frames, torch.arange(shape.frames - 1, dtype=torch.int64, device=device), shape)
    stress = task.data.has_stress and (task.workload.loss.stress > 0 or task.objective.stress > 0)
    try:
        functional_model(module.model, example, OUTPUTS if stress else OUTPUTS[:2], graphs_folder())
    except Untraceable as error:
        return str(error)
    return ""
