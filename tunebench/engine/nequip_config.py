"""A trial as NequIP's own configuration: the sections that `nequip-train` reads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from nequip.utils import get_current_code_versions
from nequip.utils.global_state import get_latest_global_state

from tunebench.engine.task import TrialTask
from tunebench.study.record import Readout
from tunebench.study.spec import Workload
from tunebench.study.training_sections import training_sections
from tunebench.workloads.models import model_config
from tunebench.workloads.starting_point import kept_file, starting_point
from tunebench.workloads.statistics import training_statistics


def training_module(task: TrialTask, readout: Readout | None = None) -> dict[str, Any]:
    """The `training_module` section: model, optimizer, schedule, loss and metrics of a trial.

    Its `_target_` is NequIP's own module for `readout`, left out for the arm's averaged one; the model's statistics
    come from the training split only, or where the workload starts from a trained model, from that.
    """
    workload = task.workload
    statistics = training_statistics(
        task.data, workload.model.r_max_angstrom, workload.labels.force_fraction, task.seeds.labels
    )
    sections = training_sections(
        workload, task.optimizer, task.hyperparameters, task.schedule, readout or task.averaged, horizon=task.horizon
    )
    seed = task.seeds.init if workload.init is None else workload.init.seed
    model = model_config(workload.model, task.data.type_names, statistics, seed)
    if workload.init is not None:
        model |= starting_point(workload.init, workload.model, task.data).constants
    return {"_target_": sections.pop("_target_"), "model": model, **sections}


def plain_nequip_config(task: TrialTask, evaluate_every: int, readout: Readout | None = None) -> dict[str, Any]:
    """A complete `nequip-train` config of a trial: same data, order, labels, weights, settings and horizon.

    It measures and keeps the weights of `readout`, left out those of the arm's averaged one.
    """
    workload = task.workload
    return {
        "run": ["train"],
        "data": data_section(task),
        "trainer": {
            "_target_": "lightning.Trainer",
            "accelerator": "gpu" if task.device == "cuda" else "cpu",
            "devices": 1,
            "max_steps": workload.max_steps,
            "max_epochs": -1,
            "val_check_interval": evaluate_every,
            "check_val_every_n_epoch": None,
            "gradient_clip_val": workload.clip_global_norm,
            "num_sanity_val_steps": 0,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "training_module": _started(task, training_module(task, readout)),
    }


def _started(task: TrialTask, module: dict[str, Any]) -> dict[str, Any]:
    """A training module section whose model begins where the trial begins."""
    initial = task.workload.init
    if initial is None:
        return module
    start = kept_file(initial, task.workload.model, task.data)
    target = "tunebench.workloads.starting_point.started_model"
    return {**module, "model": {"_target_": target, "start": str(start), "model": module["model"]}}


def data_section(task: TrialTask) -> dict[str, Any]:
    """The `data` section: the prepared files read by NequIP's own data module.

    Where the trial sees part of the force labels, its frames come through `PreparedFrames`, which masks the others.
    """
    workload = task.workload
    if workload.labels.force_fraction < 1:
        return _masked_data_section(task)
    files = {split: str(file.path) for split, file in task.data.splits.items()}
    return {
        "_target_": "nequip.data.datamodule.ASEDataModule",
        "seed": task.seeds.order,
        "train_file_path": files["train"],
        "val_file_path": files["val"],
        "test_file_path": [path for split, path in files.items() if split not in ("train", "val")],
        "transforms": [
            {
                "_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper",
                "model_type_names": list(task.data.type_names),
            },
            {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": workload.model.r_max_angstrom},
        ],
        **_dataloaders(workload),
    }


def _masked_data_section(task: TrialTask) -> dict[str, Any]:
    workload = task.workload
    frames = {
        split: {
            "_target_": "tunebench.workloads.frames.PreparedFrames",
            "folder": str(task.data.folder),
            "split": split,
            "r_max": workload.model.r_max_angstrom,
            "type_names": list(task.data.type_names),
            "force_fraction": workload.labels.force_fraction,
            "label_seed": task.seeds.labels,
        }
        for split in task.data.splits
    }
    return {
        "_target_": "nequip.data.datamodule.NequIPDataModule",
        "seed": task.seeds.order,
        "train_dataset": frames.pop("train"),
        "val_dataset": frames.pop("val"),
        "test_dataset": list(frames.values()),
        **_dataloaders(workload),
    }


def _dataloaders(workload: Workload) -> dict[str, Any]:
    evaluation = {"batch_size": workload.evaluation_batch_size}
    training = {"batch_size": workload.batch_size, "shuffle": True, "drop_last": True}
    return {"train_dataloader": training, "val_dataloader": evaluation, "test_dataloader": dict(evaluation)}


@lru_cache(maxsize=1)
def _versions() -> Mapping[str, str | None]:
    versions: dict[str, str | None] = get_current_code_versions(verbose=False)
    return versions


def info_dict(task: TrialTask, module: dict[str, Any]) -> dict[str, Any]:
    """What NequIP's tools look up in a checkpoint (`ModelFromCheckpoint`, `nequip-compile`, `nequip-package`)."""
    return {
        "versions": dict(_versions()),
        "data": data_section(task),
        "trainer": {},
        "global_options": get_latest_global_state(),
        "runs": ["train"],
        "training_module": module,
    }
