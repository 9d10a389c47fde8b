"""Update rules as ordinary `torch.optim.Optimizer` classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch

from tunebench.optim.captured import CapturedStep
from tunebench.optim.factored import Factored
from tunebench.optim.groups import group_blocks, group_factors, group_names
from tunebench.optim.packing import Packing, Tensors
from tunebench.optim.rule import UpdateRule
from tunebench.optim.settings_checks import checked

Group = dict[str, Any]

# `param_names` and `initial_lr` are torch's own.
_GROUP_KEYS = ("params", "names", "blocks", "lr_factors", "param_names", "initial_lr")


@dataclass
class Running:
    """What a parameter group needs at each step, built from it at its first.

    Attributes:
        rule: the update rule.
        parameters: by name.
        captured: the step as CUDA graphs, where the group asks for it.
    """

    rule: UpdateRule
    parameters: dict[str, torch.nn.Parameter]
    captured: CapturedStep | None
    _known: dict[str, tuple[float, torch.Tensor]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the weights are now."""
        return next(iter(self.parameters.values())).device

    def hyper_on_device(self, floats: Mapping[str, float]) -> Tensors:
        """Hyperparameters as tensors; a changed one is filled in place, so that a captured graph sees it."""
        for name, value in floats.items():
            found = self._known.get(name)
            if found is None or found[1].device != self.device:
                self._known[name] = value, torch.full((), value, dtype=torch.float64, device=self.device)
            elif found[0] != value:
                self._known[name] = value, found[1].fill_(value)
        return {name: tensor for name, (_, tensor) in self._known.items()}


class RuleOptimizer(torch.optim.Optimizer):
    """Base of the optimizers here: parameter groups outside, one pure update rule on packed weights inside.

    Numbers in a group (`lr`, `precondition_frequency`, ...) are read at every step, so they may change while running;
    what selects another algorithm (`nesterov`, `scale`, ...) is read once. The state of a group is held under
    `state["group 0"]`: its number of steps and the rule's packed tensors. A parameter without a gradient is left as
    it is.

    Args:
        params: parameters or groups; `matrix_groups` makes groups that know their blocks.
        defaults: the groups' settings. `capture`: on CUDA, replay the step as a CUDA graph (weights must stay where
            they are in memory; they may move, at the price of a new capture).
    """

    matrix_rule: str | None = None
    """Name of the rule that treats matrix blocks; None where all weights are treated alike."""
    plain_rule: str = ""
    """Name of the rule that treats everything else."""

    def __init__(self, params: Iterable[Any], defaults: Group) -> None:
        self._running: dict[int, Running] = {}
        super().__init__(params, defaults)

    @abstractmethod
    def _rule(self, group: Group, packing: Packing) -> UpdateRule:
        """The rule of a group's settings."""

    @abstractmethod
    def _hyper(self, group: Group) -> dict[str, float]:
        """The rule's hyperparameters, from a group's settings."""

    def _packing(self, group: Group, parameters: Mapping[str, torch.nn.Parameter]) -> Packing:
        return Packing.elementwise(parameters, group_factors(group))

    def rule_of(self, group: Group, packing: Packing) -> UpdateRule:
        """The rule of a group's settings on these weights, whatever factors their learning rates have."""
        if packing.parts.keys() == {1.0}:
            return self._rule(group, packing)
        return Factored.of(packing, lambda part: self._rule(group, part))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all groups; `closure`, where given, computes the loss and its gradients first.

        Raises:
            ValueError: a sparse gradient, or `capture` for weights that are not on a CUDA device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            if any(parameter.grad is not None for parameter in group["params"]):
                self._step_group(index, group)
        return loss

    def _step_group(self, index: int, group: Group) -> None:
        running = self._prepared(index, group)
        record = self.state[state_key(index)]
        record["step"] += 1
        floats = self._hyper(group)
        phase = running.rule.phase(record["step"], floats)
        hyper = running.hyper_on_device(floats)
        grads = {name: _gradient(parameter) for name, parameter in running.parameters.items()}
        live = [name for name, parameter in running.parameters.items() if parameter.grad is not None]
        if running.captured is not None:
            running.captured(grads, live, record["tensors"], hyper, record["step"], phase)
            return
        step = torch.full((), record["step"], dtype=torch.int64, device=running.device)
        packed = running.rule.packing.pack(grads)
        weights, record["tensors"] = running.rule.update(
            packed, record["tensors"], self._weights(index), hyper, step, phase
        )
        self._put(index, weights, live)

    def _prepared(self, index: int, group: Group) -> Running:
        """The group's rule, with its state on the device where its parameters are now."""
        running = self._running.get(index)
        if running is None:
            parameters = dict(zip(group_names(group), group["params"], strict=True))
            rule = self.rule_of(group, self._packing(group, parameters))
            captured = CapturedStep(rule, parameters) if group["capture"] else None
            running = self._running[index] = Running(rule, parameters, captured)
        record = self.state[state_key(index)]
        if not record:
            record |= {"step": 0, "tensors": running.rule.init(self._weights(index))}
        elif any(tensor.device != running.device for tensor in record["tensors"].values()):
            record["tensors"] = {name: tensor.to(running.device) for name, tensor in record["tensors"].items()}
        return running

    def _weights(self, index: int) -> Tensors:
        """A group's weights, packed and detached."""
        running = self._running[index]
        return running.rule.packing.pack({name: p.detach() for name, p in running.parameters.items()})

    def _put(self, index: int, weights: Tensors, live: Sequence[str] | None = None) -> None:
        """Write packed weights into a group's parameters, or into those of these names only."""
        running = self._running[index]
        named = running.rule.packing.unpack(weights)
        names = list(running.parameters) if live is None else live
        torch._foreach_copy_([running.parameters[name] for name in names], [named[name] for name in names])

    def packing_of(self, index: int) -> Packing:
        """How the weights of a parameter group are packed."""
        group = self.param_groups[index]
        return self._packing(group, dict(zip(group_names(group), group["params"], strict=True)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`, bit-exactly; the file's tensors are copied.

        Raises:
            ValueError: the groups differ, or weights were packed under another view.
        """
        for index, (own, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            if _layout(own) != _layout(saved):
                raise ValueError(f"group {index}: found a state of other blocks or names, allowed: the group's own")
        super().load_state_dict(state_dict)
        for key, record in list(self.state.items()):
            if "tensors" in record:  # torch copies the states of parameters only
                copied = {name: tensor.clone() for name, tensor in record["tensors"].items()}
                self.state[key] = {**record, "tensors": copied}

    def add_param_group(self, param_group: Group) -> None:
        """Add a group; what it does not set follows the defaults.

        Raises:
            ValueError: a setting that the optimizer does not have, or with a value it cannot run with.
        """
        unknown = sorted(param_group.keys() - self.defaults.keys() - set(_GROUP_KEYS))
        if unknown:
            raise ValueError(f"group: found {unknown[0]}, allowed: {', '.join([*_GROUP_KEYS, *self.defaults])}")
        checked({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._running = {}


def state_key(index: int) -> Any:
    """Where a group's state lies in `Optimizer.state`."""
    # torch maps integer keys to parameters, and passes others through.
    return f"group {index}"


def _layout(group: Mapping[str, Any]) -> tuple[Any, ...]:
    blocks = group.get("blocks")
    plain = blocks and tuple(tuple((p, o, tuple(s), tuple(t), v) for p, o, s, t, v in found) for found in blocks)
    names = group.get("names")
    factors = group.get("lr_factors")
    return plain, names and tuple(names), factors and tuple(factors)


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    if parameter.grad.is_sparse:
        raise ValueError("gradient: found a sparse tensor, allowed: dense ones")
    return parameter.grad


class BlockOptimizer(RuleOptimizer):
    """Base of the optimizers that look at blocks, for example matrices, rather than at elements."""

    def _packing(self, group: Group, parameters: Mapping[str, torch.nn.Parameter]) -> Packing:
        return Packing.shared(parameters, group_blocks(group), group_factors(group))
