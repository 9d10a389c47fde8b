"""The frames of a trial and the device they go to."""

from __future__ import annotations

from typing import Any

import torch

from tunebench.engine.task import TrialTask
from tunebench.study.record import Split
from tunebench.workloads.frames import PreparedFrames


def task_frames(task: TrialTask, split: str) -> PreparedFrames:
    """A split as the trial sees it: force labels masked in training and validation, never elsewhere."""
    workload = task.workload
    masked = split in (Split.TRAIN, Split.VAL)
    return PreparedFrames(
        folder=str(task.data.folder),
        split=split,
        r_max=workload.model.r_max_angstrom,
        type_names=list(task.data.type_names),
        force_fraction=workload.labels.force_fraction if masked else 1.0,
        label_seed=task.seeds.labels,
    )


def on_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on `device`."""
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
