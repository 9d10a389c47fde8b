"""A base model on general data: one trial, kept in one file with where it came from.

The file is a NequIP checkpoint with a record beside the weights, so `workload.init` takes it, and so do NequIP's tools.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from tunebench.engine.checkpoints import FINAL, checkpoint_folder, drop_checkpoints
from tunebench.engine.cohort import Cohort
from tunebench.engine.lightning import run_trial
from tunebench.engine.task import Evaluation, TrialTask, trial_task
from tunebench.study.environment import environment
from tunebench.study.errors import RunError
from tunebench.study.files import replacing
from tunebench.study.plan import plan_arms, trial_seeds
from tunebench.study.record import Reason, Stage
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import Engine, InWords, StudyError
from tunebench.tuning.run_folder import held_run
from tunebench.workloads.data import PreparedData, graphs_folder
from tunebench.workloads.trained_model import RECORD, read_record

FOLDER = "bases"
SCHEMA_VERSION = 1

_LOOPS = "loops"  # where Lightning's training stood; these models are trained to their end

Say = Callable[[str], None]


def base_path(resolved: ResolvedStudy) -> Path:
    """Where the base model of a study is kept unless said otherwise: ``bases/NAME.ckpt``."""
    return Path(FOLDER) / f"{resolved.study.name}.ckpt"


def check_pretraining(resolved: ResolvedStudy) -> None:
    """Refuse a study of more than one arm.

    Raises:
        StudyError: several workloads or several optimizers.
    """
    for key, entries in (("workloads", resolved.study.workloads), ("optimizers", resolved.study.optimizers)):
        if len(entries) != 1:
            raise StudyError(resolved.file, key, InWords(f"{len(entries)} entries"), "one: a base model is one trial")


def pretrain(resolved: ResolvedStudy, data: PreparedData, out: Path, say: Say) -> dict[str, Any]:
    """Train the study's one arm to its horizon, with untuned or fixed hyperparameters, and write its file.

    A training that was interrupted goes on from its last evaluation; a file that this study has written stays.

    Args:
        resolved: a study of one workload and one optimizer.
        data: the workload's.
        out: the file; the training keeps its folder beside it, ``OUT.training``.
        say: takes lines for the user.

    Returns:
        The file's record: study, settings, seeds, data, versions and the errors reached.

    Raises:
        StudyError: several arms.
        RunError: `out` is something else's, or the training did not reach its horizon.
        WorkloadError: data, model or initial weights that cannot be used.
    """
    check_pretraining(resolved)
    if not out.name.endswith(".ckpt"):
        raise RunError(f"--out: found {out}, allowed: a name that ends in .ckpt")
    found = own_record(out, resolved, data)
    if found is not None:
        say(f"{out}: is there already, made by this study")
        return found
    folder = out.with_name(f"{out.name}.training")
    with held_run(resolved, folder):
        task = _task(resolved, data, folder)
        last = _trained(task, resolved.study.engine, say)
        if last.outcome is not Reason.FINISHED:
            ended = f"{last.outcome} at step {last.step}: {last.message}"
            raise RunError(f"{folder}: found a training that ended {ended}, allowed: one that reaches its horizon")
        record = _record(resolved, task, last)
        _write(out, checkpoint_folder(folder, task.key.trial_id) / FINAL, record)
        drop_checkpoints(folder, task.key.trial_id)
    return record


def own_record(out: Path, resolved: ResolvedStudy, data: PreparedData) -> dict[str, Any] | None:
    """The record of a file that this study has written from these data; None where there is no file.

    Raises:
        RunError: the file is another study's, of other data, or no base model at all.
    """
    if not out.exists():
        return None
    record = read_record(out)
    if record is None:
        raise RunError(f"{out}: found a file that `tunebench pretrain` did not write, allowed: another --out")
    for name, mine in (("study_hash", resolved.hash), ("data_hash", data.hash)):
        if record.get(name) != mine:
            theirs = f"{name} {str(record.get(name))[:12]} of study {record.get('study')}"
            raise RunError(f"{out}: found a base model with {theirs}, allowed: {mine[:12]}, or another --out")
    return record


def _task(resolved: ResolvedStudy, data: PreparedData, folder: Path) -> TrialTask:
    (arm,) = plan_arms(resolved)
    key = arm.key(Stage.CONFIRM, 0, 0)
    seeds = trial_seeds(resolved.study.seed, key.workload, key.stage, key.seed_index)
    task = trial_task(resolved, arm, data, key, params=arm.space.defaults(), seeds=seeds, run=folder)
    return replace(task, written_every_s=0.0)


def _trained(task: TrialTask, engine: Engine, say: Say) -> Evaluation:
    def report(evaluation: Evaluation) -> None:
        forces = evaluation.errors.get("val", {}).get(task.averaged.value, {}).get("forces_mae")
        found = "" if forces is None else f", validation force MAE {1e3 * forces:.1f} meV/Å"
        say(f"step {evaluation.step} of {task.workload.max_steps}{found}")

    return _by_cohort(task, report) if engine is Engine.COHORT else run_trial(task, report)


def _by_cohort(task: TrialTask, report: Callable[[Evaluation], None]) -> Evaluation:
    cohort = Cohort(task, 1, cache=graphs_folder())
    last = cohort.join(task)
    if last is not None:
        report(last)
    while last is None or last.outcome is None:
        ((name, last),) = cohort.advance()
        report(last)
        if last.outcome is None:
            cohort.go_on(name)
    return last


def _record(resolved: ResolvedStudy, task: TrialTask, last: Evaluation) -> dict[str, Any]:
    study, workload = resolved.study, task.workload
    return {
        "schema_version": SCHEMA_VERSION,
        "study": study.name,
        "study_hash": resolved.hash,
        "description": study.description,
        "workload": workload.model_dump(mode="json"),
        "optimizer": task.optimizer,
        "hyperparameters": dict(task.hyperparameters),
        "schedule": task.schedule.model_dump(mode="json"),
        "readout": task.averaged.value,
        "seed": study.seed,
        "seeds": asdict(task.seeds),
        "steps": last.step,
        "device_s": last.spent.device_s,
        "data_hash": task.data.hash,
        "splits": {name: split.frames for name, split in task.data.splits.items()},
        "types": list(task.data.type_names),
        "level_of_theory": task.data.level_of_theory,
        "errors": last.errors,
        "environment": environment({workload.name: task.data.hash}),
    }


def _write(out: Path, final: Path, record: Mapping[str, Any]) -> None:
    checkpoint = torch.load(final, map_location="cpu", weights_only=False)
    kept = {name: value for name, value in checkpoint.items() if name != _LOOPS}
    with replacing(out) as partial:
        torch.save({**kept, RECORD: dict(record)}, partial)
