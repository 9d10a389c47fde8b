"""NequIP's training modules without their bookkeeping per step.

NequIP's `training_step` runs a torchmetrics object and two logger calls on every batch, and reads each loss back to
the host. Here a step computes the loss and nothing else; errors are measured at the evaluation steps.
"""

from __future__ import annotations

from typing import Any

import torch
from nequip.train import EMALightningModule, ScheduleFreeLightningModule

from tunebench.engine.loss import LossWeights, weighted_loss
from tunebench.engine.task import TrialTask
from tunebench.optim.matrix_view import trainable_parameters
from tunebench.optim.trained import UnknownWeights, freeze_others, learning_rate_factors
from tunebench.study.record import Readout
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.starting_point import starting_point


class QuietSteps:
    """Mixin that replaces NequIP's training step; `loss_sum` and `loss_count` hold the loss since the last reading."""

    loss_weights: LossWeights
    loss_sum: torch.Tensor | None = None
    loss_count: int = 0

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Weighted loss of one batch."""
        target = dict(batch)  # the model adds its outputs to the dictionary it is given
        loss = weighted_loss(self(batch), target, self.loss_weights)  # type: ignore[operator]
        detached = loss.detach()
        self.loss_sum = detached if self.loss_sum is None else self.loss_sum + detached
        self.loss_count += 1
        return loss

    def on_train_epoch_end(self) -> None:
        """Nothing: errors are measured at the evaluation steps."""

    def mean_loss(self) -> float:
        """Mean training loss since the last call; NaN where no step was made. Reads the device once."""
        mean = float("nan") if self.loss_sum is None else self.loss_sum.item() / self.loss_count
        self.loss_sum, self.loss_count = None, 0
        return mean


class EMAModule(QuietSteps, EMALightningModule):  # type: ignore[misc]
    """NequIP's module with an exponential moving average of the weights."""


class ScheduleFreeModule(QuietSteps, ScheduleFreeLightningModule):  # type: ignore[misc]
    """NequIP's module for schedule-free optimizers."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the schedule out of NequIP's checkpoint.

        nequip 0.19.1 rebuilds the optimizer to read out its averaged weights, and fails where `configure_optimizers`
        also returns a scheduler.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] = {**checkpoint["hyper_parameters"], "lr_scheduler": None}


def trial_module(task: TrialTask, config: dict[str, Any], info: dict[str, Any] | None = None) -> Any:
    """A trial's training module with the weights that it starts from; those that stand still have no gradients.

    Args:
        task: the trial.
        config: its `training_module` section, which may have been changed in its optimizer or its precision.
        info: goes into NequIP's checkpoints.

    Raises:
        WorkloadError: initial weights that cannot be used.
        TypeError, AssertionError: arguments that NequIP's builder refuses.
    """
    module = build_module(config, LossWeights.of(task.workload.loss), task.averaged, info)
    initial = task.workload.init
    if initial is not None:
        (model,) = module.model.values()
        starting_point(initial, task.workload.model, task.data).put_into(model)
        try:
            freeze_others(module.model, initial.train)
            learning_rate_factors(trainable_parameters(module.model), initial.lr_factors)
        except UnknownWeights as error:
            raise WorkloadError(f"init.{error.key}", error.pattern, error.allowed) from error
        if task.averaged is Readout.EMA:
            for average, weight in zip(module.ema.ema_weights, module.model.parameters(), strict=True):
                average.copy_(weight.detach())
    return module


def build_module(
    config: dict[str, Any], weights: LossWeights, averaged: Readout, info: dict[str, Any] | None = None
) -> Any:
    """The training module of a `training_module` section; `info` goes into NequIP's checkpoints.

    Raises:
        TypeError, AssertionError: arguments that NequIP's builder refuses.
    """
    kind = ScheduleFreeModule if averaged is Readout.SCHEDULE_FREE else EMAModule
    sizes = {"train": 1, "val": 1, "test": 1, "predict": 0}
    module = kind(num_datasets=sizes, info_dict=info, **module_arguments(config))
    module.loss_weights = weights
    return module


def module_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """What a `training_module` section says of its module, which keeps it as its hyperparameters."""
    return {name: value for name, value in config.items() if name != "_target_"}
