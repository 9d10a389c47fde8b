"""The first-order optimizers, for Lightning, `nequip-train` and plain PyTorch.

Epsilon is 1e-12 by default: 1e-8 exceeds the gradients of l > 0 tensor-product weights, so whole blocks would stand
still when the loss is given in other units. Weight decay is decoupled everywhere but in `Adam`, whose definition it is
not. Learning rates are relative: e3nn's and NequIP's weights have unit RMS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch

from tunebench.optim.factored import Averaged, reads_average
from tunebench.optim.optimizer import BlockOptimizer, Group, RuleOptimizer, state_key
from tunebench.optim.packing import Packing, Tensors
from tunebench.optim.rule import UpdateRule
from tunebench.optim.rules.adam import Adam as AdamRule
from tunebench.optim.rules.lamb import Lamb as LambRule
from tunebench.optim.rules.radam import RAdam as RAdamRule
from tunebench.optim.rules.ranger import Ranger as RangerRule
from tunebench.optim.rules.schedule_free import ScheduleFree as ScheduleFreeRule
from tunebench.optim.rules.sgd import Sgd as SgdRule
from tunebench.optim.settings_checks import checked

Params = Iterable[Any]
Betas = tuple[float, float]
EPS = 1e-12


class SGD(RuleOptimizer):
    """Stochastic gradient descent with momentum and decoupled weight decay.

    Raises:
        ValueError: a setting out of range (as for every optimizer here).
    """

    plain_rule = "sgd"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-2,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        capture: bool = False,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, checked({**defaults, "capture": capture}))

    def _rule(self, group: Group, packing: Packing) -> UpdateRule:
        return SgdRule(packing, nesterov=group["nesterov"])

    def _hyper(self, group: Group) -> dict[str, float]:
        return rates(group) | {"momentum": float(group["momentum"])}


class AdamW(RuleOptimizer):
    """AdamW (arXiv:1711.05101)."""

    plain_rule = "adamw"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = EPS,
        weight_decay: float = 1e-2,
        capture: bool = False,
    ) -> None:
        super().__init__(params, _adam_defaults(lr, betas, eps, weight_decay, capture=capture))

    def _rule(self, group: Group, packing: Packing) -> UpdateRule:
        return AdamRule(packing, decoupled=True)

    def _hyper(self, group: Group) -> dict[str, float]:
        return _adam_hyper(group)


class Adam(AdamW):
    """Adam (arXiv:1412.6980); weight decay enters the gradient, as in torch.optim.Adam."""

    plain_rule = "adam"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = EPS,
        weight_decay: float = 0.0,
        capture: bool = False,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, capture)

    def _rule(self, group: Group, packing: Packing) -> UpdateRule:
        return AdamRule(packing, decoupled=False)


class RAdam(AdamW):
    """Rectified Adam (arXiv:1908.03265) with decoupled weight decay."""

    plain_rule = "radam"

    def _rule(self, group: Group, packing: Packing) -> UpdateRule:
        return RAdamRule(packing)


class LAMB(BlockOptimizer):
    """LAMB (arXiv:1904.00962v3, no bias correction); the trust ratio is taken per block.

    Args:
        clamp: upper bound of a block's weight norm in the trust ratio; None for none. e3nn's unit-RMS weights have
            norms of 10 to 500, so the customary 10 would hide the layers' sizes.
    """

    plain_rule = "lamb"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = EPS,
        weight_decay: float = 0.0,
        clamp: float | None = None,
        capture: bool = False,
    ) -> None:
        super().__init__(params, _adam_defaults(lr, betas, eps, weight_decay, clamp=clamp, capture=capture))

    def _rule(self, group: Group, packing: Packing) -> UpdateRule:
        return LambRule(packing)

    def _hyper(self, group: Group) -> dict[str, float]:
        return _adam_hyper(group) | {"clamp": math.inf if group["clamp"] is None else float(group["clamp"])}


class Ranger(BlockOptimizer):
    """Ranger: RAdam with Lookahead (arXiv:1907.08610), optionally with gradient centralisation (arXiv:2004.01461).

    Args:
        k: steps between two synchronisations of Lookahead.
        alpha: share of the way that slow weights follow.
        centralise: subtract a matrix's mean gradient over its inputs; vectors are left alone.
    """

    plain_rule = "ranger"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: Betas = (0.95, 0.999),
        eps: float = EPS,
        weight_decay: float = 0.0,
        k: int = 6,
        alpha: float = 0.5,
        centralise: bool = False,
        capture: bool = False,
    ) -> None:
        more = {"k": k, "alpha": alpha, "centralise": centralise, "capture": capture}
        super().__init__(params, _adam_defaults(lr, betas, eps, weight_decay, **more))

    def _rule(self, group: Group, packing: Packing) -> UpdateRule:
        return RangerRule(packing, centralise=group["centralise"])

    def _hyper(self, group: Group) -> dict[str, float]:
        return _adam_hyper(group) | {"lookahead_k": float(group["k"]), "lookahead_alpha": float(group["alpha"])}


class AdamWScheduleFree(RuleOptimizer):
    """Schedule-free AdamW (arXiv:2405.15682).

    Call `eval()` before the weights are validated or saved for use, `train()` before training goes on. A step with a
    closure, as Lightning makes, returns to training weights by itself, so validation in the middle of an epoch is safe.
    Going there and back restores every bit.

    Args:
        warmup_steps: steps of linear learning rate warm-up.
        r: a step's weight in the average grows with its number to this power.
        weight_lr_power: and with the largest learning rate so far to this one.
    """

    plain_rule = "schedule_free"

    def __init__(
        self,
        params: Params,
        lr: float = 2.5e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = EPS,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        capture: bool = False,
    ) -> None:
        more = {"warmup_steps": warmup_steps, "r": r, "weight_lr_power": weight_lr_power, "capture": capture}
        super().__init__(params, _adam_defaults(lr, betas, eps, weight_decay, train_mode=True, **more))
        if not betas[0] > 0:
            raise ValueError(f"betas: found {betas[0]} first, allowed: above 0, or no weights would be averaged")

    def _rule(self, group: Group, packing: Packing) -> ScheduleFreeRule:
        return ScheduleFreeRule(packing, group["warmup_steps"], group["r"], group["weight_lr_power"])

    def _hyper(self, group: Group) -> dict[str, float]:
        return _adam_hyper(group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step, see `RuleOptimizer.step`.

        Raises:
            ValueError: the weights are the averaged ones and no closure is given to compute gradients at others.
        """
        if closure is not None:
            self.train()
        elif not all(group["train_mode"] for group in self.param_groups):
            raise ValueError("step: found averaged weights, allowed: training weights; call train() first")
        return super().step(closure)

    @torch.no_grad()
    def eval(self) -> None:
        """Put the averaged weights into the parameters; nothing where they are there."""
        for index, group in enumerate(self.param_groups):
            if group["train_mode"]:
                group["train_mode"] = False
                tensors, averaged, hyper = self._at_rest(index, group)
                trained = self._weights(index)
                self._put(index, averaged(trained, tensors, hyper))
                tensors |= {f"y/{name}": vector for name, vector in trained.items()}

    @torch.no_grad()
    def train(self) -> None:
        """Put the training weights back into the parameters; nothing where they are there."""
        for index, group in enumerate(self.param_groups):
            if not group["train_mode"]:
                group["train_mode"] = True
                tensors, _, _ = self._at_rest(index, group)
                kept = [name for name in tensors if name.startswith("y/")]
                self._put(index, {name.removeprefix("y/"): tensors.pop(name) for name in kept})

    def _at_rest(self, index: int, group: Group) -> tuple[Tensors, Averaged, Tensors]:
        running = self._prepared(index, group)
        averaged = reads_average(running.rule)
        assert averaged is not None
        return self.state[state_key(index)]["tensors"], averaged, running.hyper_on_device(self._hyper(group))


_RATES = {"learning_rate": "lr", "weight_decay": "weight_decay"}


def _adam_defaults(lr: float, betas: Betas, eps: float, weight_decay: float, **more: Any) -> Group:
    return checked({"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **more})


def _adam_hyper(group: Group) -> dict[str, float]:
    beta1, beta2 = group["betas"]
    numbers = {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}
    return {name: float(value) for name, value in numbers.items()} | rates(group)


def rates(group: Group) -> dict[str, float]:
    """Learning rate and weight decay of a group."""
    return {name: float(group[key]) for name, key in _RATES.items()}
