"""What a trial brings into a cohort, and how it is put back into NequIP's module to be saved.

A trial enters and leaves through the module and optimizer of the lightning engine, so both engines write and read the
same checkpoints, and a trial may go on in either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import lightning
import torch

from tunebench.engine.book import TrialBook
from tunebench.engine.checkpoints import FINAL
from tunebench.engine.modules import module_arguments, trial_module
from tunebench.engine.nequip_config import info_dict, training_module
from tunebench.engine.promise import check_groups
from tunebench.engine.schedules import schedule_factor
from tunebench.engine.slot_group import repacked
from tunebench.engine.task import TrialTask
from tunebench.optim.factored import reads_average
from tunebench.optim.groups import group_factors, group_names
from tunebench.optim.matrix_view import trainable_parameters
from tunebench.optim.optimizer import BlockOptimizer, RuleOptimizer, state_key
from tunebench.optim.packing import Packing, Tensors
from tunebench.optim.realised import realised_groups
from tunebench.optim.rule import UpdateRule
from tunebench.study.files import replacing
from tunebench.study.record import Readout, Reason, Stage
from tunebench.study.spec import Schedule
from tunebench.workloads.models import build_model


@dataclass(frozen=True, kw_only=True)
class SlotState:
    """Everything the next step of a trial depends on, on the CPU.

    Attributes:
        step: finished steps.
        weights: trainable weights by name.
        averages: their exponential moving averages; the weights themselves where the trial keeps none.
        optimizer: the update rule's state.
        loss_sum, loss_count: training losses since the last evaluation, and how many.
    """

    step: int
    weights: Tensors
    averages: Tensors
    optimizer: Tensors
    loss_sum: float = 0.0
    loss_count: float = 0.0


class Tenant:
    """A trial with the module, optimizer and rule that it brings.

    Args:
        task: the trial; it goes on at the horizon of its checkpoint.
        modules: built modules to use again, of trials with the same model.

    Attributes:
        book: what is written of the trial.
        model: NequIP's model on the CPU, shared with other tenants: only `state` and `save` fill it.
        rule: the update rule on weights sorted by name.
        hyper: the rule's hyperparameters, the learning rate without its schedule.
        state: where it starts, or goes on from.

    Raises:
        WorkloadError: the model's builder refuses its arguments.
        BrokenPromise: the optimizer treats other weights than the search space promises.
    """

    def __init__(self, task: TrialTask, modules: ModuleShelf) -> None:
        self.book = TrialBook(task)
        self.task = task = self.book.task
        self._config = training_module(task)
        self._module, self._initial = modules.module(task, self._config)
        self._module.optimizer_config = self._config["optimizer"]
        self._module.lr_scheduler_config = self._config["lr_scheduler"]
        configured = self._module.configure_optimizers()
        self._optimizer: RuleOptimizer = configured["optimizer"]
        self._scheduler = configured["lr_scheduler"]["scheduler"]
        self.model = self._module.model
        self.book.groups = realised_groups(self._optimizer)
        check_groups(task, self.book.groups, self.model)
        (group,) = self._optimizer.param_groups
        self._own_packing = self._optimizer.packing_of(0)
        names = {id(parameter): name for name, parameter in trainable_parameters(self.model).items()}
        self._renamed = dict(zip(group_names(group), (names[id(p)] for p in group["params"]), strict=True))
        self.rule = self._named_rule(group)
        # The schedule has set the first step's rate already.
        self.hyper = self._optimizer._hyper({**group, "lr": group["initial_lr"]})
        self.state = self._first_state()

    @property
    def name(self) -> str:
        """The trial's id."""
        return self.task.key.trial_id

    def _named_rule(self, group: Mapping[str, Any]) -> UpdateRule:
        parameters = trainable_parameters(self.model)
        packing = self._own_packing
        if not isinstance(self._optimizer, BlockOptimizer):
            packing = Packing.elementwise(parameters, group_factors(group))
        elif set(self._renamed) != set(parameters):
            raise ValueError(
                "optimizer: found blocks without the names of their weights, allowed: those of matrix_groups"
            )
        return self._optimizer.rule_of(dict(group), packing)

    def _first_state(self) -> SlotState:
        """The state of a trial that starts, or of its checkpoint."""
        checkpoint = self.book.take_checkpoint()
        self._module.load_state_dict(checkpoint["module"] if checkpoint else self._initial)
        parameters = {name: p.detach().clone() for name, p in trainable_parameters(self.model).items()}
        averages = parameters
        if self.task.averaged is Readout.EMA:
            averages = self._named_averages()
        tensors = self.rule.init(self.rule.packing.pack(parameters))
        if checkpoint:
            self._optimizer.load_state_dict(checkpoint["optimizer"])
            record = self._optimizer.state[state_key(0)]
            tensors = repacked(record["tensors"], self._own_packing, self.rule.packing, self._renamed)
        return SlotState(step=self.book.last.step, weights=parameters, averages=averages, optimizer=tensors)

    def _named_averages(self) -> Tensors:
        position = {id(p): index for index, p in enumerate(self.model.parameters())}
        held = self._module.ema.ema_weights
        return {n: held[position[id(p)]].detach().clone() for n, p in trainable_parameters(self.model).items()}

    def weights_of(self, state: SlotState, readout: Readout) -> Tensors:
        """The weights of a readout in a state of the trial, by name."""
        if readout is Readout.RAW:
            return state.weights
        read = reads_average(self.rule)
        if read is None:
            return state.averages
        hyper = {name: torch.tensor(value, dtype=torch.float64) for name, value in self.hyper.items()}
        averaged = read(self.rule.packing.pack(state.weights), state.optimizer, hyper)
        return self.rule.packing.unpack(averaged)

    def learning_rate_factors(self) -> torch.Tensor:
        """What the schedule makes of the learning rate at each step, float64 (workload's horizon + 1,)."""
        return _factors(self.task.schedule, self.task.horizon, self.task.workload.max_steps)

    def learning_rate_factor(self, step: int) -> float:
        """Factor for the update that follows `step` finished steps."""
        return schedule_factor(self.task.schedule, step, self.task.horizon)

    def saved(self, state: SlotState) -> dict[str, Any]:
        """The engine's part of a checkpoint; a finished confirm trial also writes NequIP's own checkpoint."""
        self._fill(state)
        if self.book.last.outcome is Reason.FINISHED and self.task.key.stage is Stage.CONFIRM:
            self._write_final()
        rate = self._optimizer.param_groups[0]["lr"]
        scheduler = {"last_epoch": state.step, "_step_count": state.step + 1, "_last_lr": [rate]}
        return {
            "module": {name: _copied(value) for name, value in self._module.state_dict().items()},
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict() | scheduler,
        }

    def _fill(self, state: SlotState) -> None:
        """Put a state into the module and the optimizer."""
        self._module.load_state_dict(self._initial)
        with torch.no_grad():
            for name, parameter in trainable_parameters(self.model).items():
                parameter.copy_(state.weights[name])
            if self.task.averaged is Readout.EMA:
                position = {id(p): index for index, p in enumerate(self.model.parameters())}
                for name, parameter in trainable_parameters(self.model).items():
                    self._module.ema.ema_weights[position[id(parameter)]].copy_(state.averages[name])
                self._module.ema.num_updates = state.step + 1
        back = {name: own for own, name in self._renamed.items()}
        tensors = repacked(state.optimizer, self.rule.packing, self._own_packing, back)
        self._optimizer.state[state_key(0)] = {"step": state.step, "tensors": tensors}
        (group,) = self._optimizer.param_groups
        group["lr"] = self.hyper["learning_rate"] * self.learning_rate_factor(state.step)
        if "train_mode" in group:
            group["train_mode"] = True

    def _write_final(self) -> None:
        """NequIP's own checkpoint of the state that was filled in, without the optimizer's; others share the module."""
        own = module_arguments(self._config)
        self._module.hparams.update(own, info_dict=info_dict(self.task, self._config))
        trainer = _trainer()
        trainer.strategy.connect(self._module)
        self._module.trainer = trainer
        trainer.strategy.optimizers = [self._optimizer]
        try:
            with replacing(self.book.folder / FINAL) as partial:
                trainer.save_checkpoint(partial, weights_only=True)
        finally:  # neither holds on to what belongs to this trial
            trainer.strategy.optimizers = []
            self._module.trainer = None


class ModuleShelf:
    """Training modules by model, so that trials of one model build it once; not for use by several threads."""

    def __init__(self) -> None:
        self._shelf: dict[str, tuple[Any, Tensors]] = {}

    def module(self, task: TrialTask, config: dict[str, Any]) -> tuple[Any, Tensors]:
        """The module of a task's model on the CPU, and its initial state."""
        key = json.dumps([config["model"], config.get("ema_decay"), task.averaged.value], sort_keys=True, default=str)
        if key not in self._shelf:
            try:
                module = trial_module(task, config)
            except Exception:
                build_model(config["model"])  # names what is wrong with the arguments
                raise
            self._shelf[key] = module, {name: _copied(value) for name, value in module.state_dict().items()}
        return self._shelf[key]


@lru_cache(maxsize=1)  # making one takes as long as writing a checkpoint
def _trainer() -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@lru_cache(maxsize=16)  # half of what it took a trial with 36 000 steps to join; slots copy it
def _factors(schedule: Schedule, horizon: int, last: int) -> torch.Tensor:
    return torch.tensor([schedule_factor(schedule, step, horizon) for step in range(last + 1)], dtype=torch.float64)


def _copied(value: Any) -> Any:
    return value.detach().clone() if torch.is_tensor(value) else value
