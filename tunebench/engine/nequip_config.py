"""A trial as NequIP's own configuration: the sections that `nequip-train` reads."""

from __future__ import annotations

from typing import Any

from nequip.utils import get_current_code_versions
from nequip.utils.global_state import get_latest_global_state

from tunebench.engine.loss import LossWeights
from tunebench.engine.task import TrialTask
from tunebench.optim.configuration import optimizer_config
from tunebench.study.record import Metric, Readout
from tunebench.study.spec import Loss
from tunebench.workloads.models import model_config
from tunebench.workloads.statistics import training_statistics

_QUANTITIES: dict[str, Any] = {
    "energy_per_atom": {"_target_": "nequip.data.PerAtomModifier", "field": "total_energy"},
    "forces": "forces",
    "stress": "stress",
}


def training_module(task: TrialTask) -> dict[str, Any]:
    """The `training_module` section: model, optimizer, schedule, loss and metrics of a trial.

    Its `_target_` is NequIP's own module; the model's statistics come from the training split only.
    """
    workload = task.workload
    statistics = training_statistics(
        task.data, workload.model.r_max_angstrom, workload.labels.force_fraction, task.seeds.labels
    )
    module = {
        "_target_": "nequip.train.EMALightningModule",
        "model": model_config(workload.model, task.data.type_names, statistics, task.seeds.init),
        "optimizer": optimizer_config(task.optimizer, task.hyperparameters),
        "lr_scheduler": lr_scheduler(task),
        "loss": loss_section(workload.loss),
        "val_metrics": metrics_section(workload.loss),
        "test_metrics": metrics_section(workload.loss),
        "ema_decay": workload.ema_decay,
    }
    if task.averaged is Readout.SCHEDULE_FREE:
        del module["ema_decay"]
        module["_target_"] = "nequip.train.ScheduleFreeLightningModule"
    return module


def plain_nequip_config(task: TrialTask, evaluate_every: int) -> dict[str, Any]:
    """A complete `nequip-train` config of a trial: same data, order, weights, settings and horizon.

    Raises:
        ValueError: the trial masks force labels, which NequIP's own data module cannot.
    """
    workload = task.workload
    if workload.labels.force_fraction < 1:
        raise ValueError(f"labels.force_fraction: found {workload.labels.force_fraction}, allowed: 1 for nequip-train")
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
        "training_module": training_module(task),
    }


def data_section(task: TrialTask) -> dict[str, Any]:
    """The `data` section: the prepared files read by NequIP's own data module, all labels in view."""
    workload = task.workload
    files = {split: str(file.path) for split, file in task.data.splits.items()}
    evaluation = {"batch_size": workload.evaluation_batch_size}
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
        "train_dataloader": {"batch_size": workload.batch_size, "shuffle": True, "drop_last": True},
        "val_dataloader": evaluation,
        "test_dataloader": evaluation,
    }


def info_dict(task: TrialTask, module: dict[str, Any]) -> dict[str, Any]:
    """What NequIP's tools look up in a checkpoint (`ModelFromCheckpoint`, `nequip-compile`, `nequip-package`)."""
    return {
        "versions": get_current_code_versions(verbose=False),
        "data": data_section(task),
        "trainer": {},
        "global_options": get_latest_global_state(),
        "runs": ["train"],
        "training_module": module,
    }


def lr_scheduler(task: TrialTask) -> dict[str, Any]:
    """The `lr_scheduler` section: the study's schedule, stepped after every batch."""
    return {
        "scheduler": {
            "_target_": "torch.optim.lr_scheduler.LambdaLR",
            "lr_lambda": {
                "_target_": "tunebench.engine.schedules.learning_rate_factor",
                "horizon": task.horizon,
                **task.schedule.model_dump(mode="json"),
            },
        },
        "interval": "step",
        "frequency": 1,
    }


def loss_section(loss: Loss) -> dict[str, Any]:
    """The `loss` section: mean squared errors over existing labels with the study's weights."""
    weights = LossWeights.of(loss)
    return _manager([_entry(q, "mse", "MeanSquaredError", getattr(weights, q)) for q in _QUANTITIES if _used(loss, q)])


def metrics_section(loss: Loss) -> dict[str, Any]:
    """A metrics section whose names are tunebench's `Metric` names."""
    kinds = (("mae", "MeanAbsoluteError"), ("rmse", "RootMeanSquaredError"))
    quantities = [q for q in _QUANTITIES if q != "stress" or _used(loss, q)]
    return _manager([_entry(q, short, metric, None) for q in quantities for short, metric in kinds])


def _used(loss: Loss, quantity: str) -> bool:
    return float(getattr(loss, quantity)) > 0


def _entry(quantity: str, short: str, metric: str, coefficient: float | None) -> dict[str, Any]:
    return {
        "name": f"{quantity}_{short}" if short == "mse" else Metric(f"{quantity}_{short}").value,
        "field": _QUANTITIES[quantity],
        "metric": {"_target_": f"nequip.train.{metric}"},
        "coeff": coefficient,
        "ignore_nan": quantity != "energy_per_atom",
    }


def _manager(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"_target_": "nequip.train.MetricsManager", "metrics": entries}
