"""What a study says of training as sections of a `nequip-train` config: schedule, loss, metrics, averaging.

Plain data with `_target_`; imports neither Ray nor torch. `tunebench.engine.nequip_config` adds data and model.
"""

from __future__ import annotations

import copy
from typing import Any

from tunebench.study.optimizer_config import Hyperparameters, optimizer_config
from tunebench.study.record import Metric, Readout
from tunebench.study.spec import Loss, Schedule, Workload

_QUANTITIES: dict[str, Any] = {
    "energy_per_atom": {"_target_": "nequip.data.PerAtomModifier", "field": "total_energy"},
    "forces": "forces",
    "stress": "stress",
}
_MODULES = {
    Readout.RAW: "NequIPLightningModule",
    Readout.EMA: "EMALightningModule",
    Readout.SCHEDULE_FREE: "ScheduleFreeLightningModule",
}
_LABELLED_ERROR = "tunebench.engine.labelled.LabelledMeanSquaredError"


def training_sections(
    workload: Workload,
    optimizer: str,
    hyper: Hyperparameters,
    schedule: Schedule,
    readout: Readout,
    *,
    horizon: int | None = None,
) -> dict[str, Any]:
    """The `training_module` section but for its model, which needs the data.

    Args:
        workload: what is trained.
        optimizer: name of the update rule.
        hyper: its hyperparameters, searched and fixed.
        schedule: of the learning rate.
        readout: the weights that NequIP measures and keeps; RAW is not for schedule-free optimizers, which NequIP's
            plain module cannot read out.
        horizon: steps after which the schedule ends; left out, the workload's.
    """
    return {
        "_target_": f"nequip.train.{_MODULES[readout]}",
        "optimizer": optimizer_section(workload, optimizer, hyper),
        "lr_scheduler": lr_scheduler(schedule, horizon or workload.max_steps),
        "loss": loss_section(workload.loss, partial_forces=workload.labels.force_fraction < 1),
        "val_metrics": metrics_section(workload.loss),
        "test_metrics": metrics_section(workload.loss),
        **({"ema_decay": workload.ema_decay} if readout is Readout.EMA else {}),
    }


def optimizer_section(workload: Workload, optimizer: str, hyper: Hyperparameters) -> dict[str, Any]:
    """The `optimizer` section: the rule with its settings, and what it treats where that is not the whole model.

    Args:
        workload: what is trained, and from which weights.
        optimizer: name of the update rule.
        hyper: its hyperparameters.
    """
    section, initial = optimizer_config(optimizer, hyper), workload.init
    if initial is None or not initial.chooses:
        return section
    groups = section.get("param_groups", {"_target_": "tunebench.optim.weight_groups"})
    train = list(initial.train) if isinstance(initial.train, tuple) else initial.train
    return section | {"param_groups": {**groups, "train": train, "lr_factors": dict(initial.lr_factors)}}


def lr_scheduler(schedule: Schedule, horizon: int) -> dict[str, Any]:
    """The `lr_scheduler` section: the study's schedule, stepped after every batch."""
    return {
        "scheduler": {
            "_target_": "torch.optim.lr_scheduler.LambdaLR",
            "lr_lambda": {
                "_target_": "tunebench.engine.schedules.learning_rate_factor",
                "horizon": horizon,
                **schedule.model_dump(mode="json"),
            },
        },
        "interval": "step",
        "frequency": 1,
    }


def loss_section(loss: Loss, *, partial_forces: bool = False) -> dict[str, Any]:
    """The `loss` section: mean squared errors over existing labels with the study's weights, which sum to 1.

    Args:
        loss: the weights.
        partial_forces: some batches may hold no force label at all, of which NequIP's own metric makes NaN.
    """
    total = loss.energy_per_atom + loss.forces + loss.stress
    used = [quantity for quantity in _QUANTITIES if _used(loss, quantity)]
    entries = [_entry(q, "mse", "MeanSquaredError", getattr(loss, q) / total) for q in used]
    for entry in entries:
        if partial_forces and entry["field"] == _QUANTITIES["forces"]:
            entry["metric"] = {"_target_": _LABELLED_ERROR}
    return _manager(entries)


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
        "field": copy.deepcopy(_QUANTITIES[quantity]),  # YAML writes what occurs twice as an anchor
        "metric": {"_target_": f"nequip.train.{metric}"},
        "coeff": coefficient,
        "ignore_nan": quantity != "energy_per_atom",
    }


def _manager(entries: list[dict[str, Any]]) -> dict[str, Any]:
    return {"_target_": "nequip.train.MetricsManager", "metrics": entries}
