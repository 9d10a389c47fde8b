"""The reference optimizers: study hyperparameters as NequIP `optimizer` sections.

Each section is plain data with `_target_`, so the same dictionary serves tunebench and `nequip-train`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pytorch_optimizer import Lamb as _Lamb

Hyperparameters = Mapping[str, Any]


def optimizer_config(name: str, hyper: Hyperparameters) -> dict[str, Any]:
    """NequIP's `training_module.optimizer` section of one configuration.

    Raises:
        KeyError: an optimizer without an update rule here, or a hyperparameter its rule needs is missing.
    """
    return _BUILDERS[name](hyper)


def realised_groups(name: str, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the optimizer really does to how many weights: rule, tensors, parameters, share and settings per rule."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    total = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    for index, group in enumerate(optimizer.param_groups):
        settings = {k: v for k, v in group.items() if k != "params" and isinstance(v, int | float | str | bool | tuple)}
        for parameter in group["params"]:
            rule = _rule_of(name, group, parameter)
            row = rows.setdefault((rule, index), {"rule": rule, "tensors": 0, "parameters": 0, "settings": settings})
            row["tensors"] += 1
            row["parameters"] += parameter.numel()
    return [{**row, "share": row["parameters"] / total} for row in rows.values()]


def _rule_of(name: str, group: Mapping[str, Any], parameter: torch.Tensor) -> str:
    if name == "muon":
        return "muon" if group["use_muon"] else "adamw"
    if name == "soap":
        rotated = parameter.ndim >= 2 and min(parameter.shape) <= group["max_precondition_dim"]
        return "soap" if rotated else "adam"
    return name


def matrix_groups(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Parameter groups for Muon: the matrices of hidden MLPs, as nequip 0.19 and allegro 0.8 group them, and the rest.

    Embeddings, readouts and tensor-product coefficients are tables, not maps, and stay with Muon's AdamW, as do
    e3nn's flat weights, which hide their matrices.

    Raises:
        ValueError: the model has no such matrix; Muon would silently be AdamW.
    """
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        hidden = parameter.ndim == 2 and ".mlp." in name and "readout" not in name
        (matrices if hidden else rest).append(parameter)
    if not matrices:
        raise ValueError("muon: found no matrix of a hidden MLP in this model, allowed: at least one")
    return [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}]


class Lamb(_Lamb):
    """pytorch_optimizer's LAMB with its clamp of the weight norm exposed.

    The library clamps at 10, which e3nn's unit-variance weights exceed almost everywhere; `clamp=None` removes it.
    """

    def __init__(self, params: Iterable[Any], *, clamp: float | None = 10.0, **settings: Any) -> None:
        super().__init__(params, **settings)
        self.clamp = math.inf if clamp is None else clamp


def _adam(target: str) -> Callable[[Hyperparameters], dict[str, Any]]:
    def build(hyper: Hyperparameters) -> dict[str, Any]:
        return {"_target_": target, **_adam_settings(hyper)}

    return build


def _adam_settings(hyper: Hyperparameters) -> dict[str, Any]:
    return {
        "lr": hyper["learning_rate"],
        "betas": (hyper["beta1"], hyper["beta2"]),
        "weight_decay": hyper["weight_decay"],
        "eps": hyper["eps"],
    }


def _radam(hyper: Hyperparameters) -> dict[str, Any]:
    return {"_target_": "torch.optim.RAdam", **_adam_settings(hyper), "decoupled_weight_decay": True}


def _sgd(hyper: Hyperparameters) -> dict[str, Any]:
    return {
        "_target_": "torch.optim.SGD",
        "lr": hyper["learning_rate"],
        "momentum": hyper["momentum"],
        "nesterov": hyper["nesterov"] and hyper["momentum"] > 0,
        "weight_decay": hyper["weight_decay"],
    }


def _lamb(hyper: Hyperparameters) -> dict[str, Any]:
    return {"_target_": "tunebench.optim.reference.Lamb", **_adam_settings(hyper), "clamp": hyper["clamp"]}


def _ranger(hyper: Hyperparameters) -> dict[str, Any]:
    # Gradient centralisation averages over the wrong axis of (in, out) weights and freezes (n, 1) readouts: off.
    return {
        "_target_": "pytorch_optimizer.Ranger",
        **_adam_settings(hyper),
        "k": hyper["lookahead_k"],
        "alpha": hyper["lookahead_alpha"],
        "use_gc": False,
    }


def _muon(hyper: Hyperparameters) -> dict[str, Any]:
    return {
        "_target_": "pytorch_optimizer.Muon",
        "param_groups": {"_target_": "tunebench.optim.reference.matrix_groups"},
        "lr": hyper["learning_rate"],
        "momentum": hyper["momentum"],
        "weight_decay": hyper["weight_decay"],
        "use_adjusted_lr": True,  # 0.2 sqrt(max(in, out)): updates of Adam's size, so learning rates are comparable
        "adamw_lr": hyper["learning_rate"],
        "adamw_betas": (hyper["aux_beta1"], hyper["aux_beta2"]),
        "adamw_wd": hyper["weight_decay"],
        "adamw_eps": hyper["eps"],
    }


def _soap(hyper: Hyperparameters) -> dict[str, Any]:
    return {
        "_target_": "pytorch_optimizer.SOAP",
        **_adam_settings(hyper),
        "precondition_frequency": hyper["precondition_frequency"],
        "max_precondition_dim": hyper["max_precondition_dim"],
    }


_BUILDERS: dict[str, Callable[[Hyperparameters], dict[str, Any]]] = {
    "adam": _adam("torch.optim.Adam"),
    "adamw": _adam("torch.optim.AdamW"),
    "radam": _radam,
    "sgd": _sgd,
    "lamb": _lamb,
    "ranger": _ranger,
    "schedule_free": _adam("schedulefree.AdamWScheduleFree"),
    "muon": _muon,
    "soap": _soap,
}
