"""What a study's checkpoints take on the disk, measured on one checkpoint of every arm that is never written."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace

import torch

from tunebench.engine.calibration import training_parts, untuned_task
from tunebench.study.plan import ArmPlan, plan_arms
from tunebench.study.resolve import ResolvedStudy
from tunebench.workloads.data import PreparedData


def disk_bytes(resolved: ResolvedStudy, data: Mapping[str, PreparedData]) -> int:
    """Bytes of all checkpoints that may lie there at once.

    Those of the tune stage while trials wait at their rungs, and those kept after the confirm stage: two files of each
    trial, one to resume and NequIP's own, and with a refinement a third one, which is at most as large.
    """
    confirm, keeps = resolved.study.confirm, resolved.study.keep_checkpoints != "none"
    files = 2 if confirm.refine is None else 3
    total = 0
    for arm in plan_arms(resolved):
        kept = files * min(confirm.top_k, arm.trials) * confirm.seeds if keeps else 0
        total += checkpoint_bytes(resolved, arm, data[arm.workload.name]) * (arm.trials + kept)
    return total


def checkpoint_bytes(resolved: ResolvedStudy, arm: ArmPlan, data: PreparedData) -> int:
    """Bytes of one checkpoint: weights, their average, and the optimizer's state with the arm's default settings."""
    module, optimizer = training_parts(replace(untuned_task(resolved, arm, data), device="cpu"))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the state exists after the first step
    file = io.BytesIO()
    torch.save({"module": module.state_dict(), "optimizer": optimizer.state_dict()}, file)
    return file.getbuffer().nbytes
