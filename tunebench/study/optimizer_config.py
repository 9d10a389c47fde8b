"""Study hyperparameters as NequIP `optimizer` sections.

Each section is plain data with `_target_`, so the same dictionary serves tunebench, `nequip-train` and the report.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Hyperparameters = Mapping[str, Any]


def optimizer_config(name: str, hyper: Hyperparameters) -> dict[str, Any]:
    """NequIP's `training_module.optimizer` section of one configuration.

    Args:
        name: of the optimizer and its search space.
        hyper: the hyperparameters of that search space, searched and fixed.

    Raises:
        KeyError: an unknown optimizer, or a hyperparameter that its rule needs is missing.
    """
    return _BUILDERS[name](hyper)


def _settings(target: str, hyper: Hyperparameters) -> dict[str, Any]:
    return {
        "_target_": f"tunebench.optim.{target}",
        "lr": hyper["learning_rate"],
        "weight_decay": hyper["weight_decay"],
    }


def _adam_settings(target: str, hyper: Hyperparameters) -> dict[str, Any]:
    return _settings(target, hyper) | {"betas": (hyper["beta1"], hyper["beta2"]), "eps": hyper["eps"]}


def _auxiliary_settings(hyper: Hyperparameters) -> dict[str, Any]:
    """For the weights that are no matrices; learning rate and weight decay are those of the matrices."""
    return {"aux_betas": (hyper["aux_beta1"], hyper["aux_beta2"]), "aux_eps": hyper["eps"]}


def _blocks(hyper: Hyperparameters) -> dict[str, Any]:
    return {"param_groups": {"_target_": "tunebench.optim.matrix_groups", "fctp_view": hyper["fctp_view"]}}


def _adam(target: str) -> Callable[[Hyperparameters], dict[str, Any]]:
    return lambda hyper: _adam_settings(target, hyper)


def _sgd(hyper: Hyperparameters) -> dict[str, Any]:
    return _settings("SGD", hyper) | {
        "momentum": hyper["momentum"],
        "nesterov": hyper["nesterov"] and hyper["momentum"] > 0,
    }


def _lamb(hyper: Hyperparameters) -> dict[str, Any]:
    return _adam_settings("LAMB", hyper) | _blocks(hyper) | {"clamp": hyper["clamp"]}


def _ranger(hyper: Hyperparameters) -> dict[str, Any]:
    return (
        _adam_settings("Ranger", hyper)
        | _blocks(hyper)
        | {"k": hyper["lookahead_k"], "alpha": hyper["lookahead_alpha"], "centralise": hyper["centralise"]}
    )


def _muon(hyper: Hyperparameters) -> dict[str, Any]:
    return (
        _settings("Muon", hyper)
        | _blocks(hyper)
        | {"momentum": hyper["momentum"], "nesterov": hyper["nesterov"], "scale": hyper["scale"]}
        | _auxiliary_settings(hyper)
    )


def _soap(hyper: Hyperparameters) -> dict[str, Any]:
    names = ("precondition_frequency", "max_precondition_dim", "sides", "basis")
    return (
        _adam_settings("SOAP", hyper)
        | _blocks(hyper)
        | {name: hyper[name] for name in names}
        | _auxiliary_settings(hyper)
    )


def _soap_muon(hyper: Hyperparameters) -> dict[str, Any]:
    return _soap(hyper) | {
        "_target_": "tunebench.optim.SOAPMuon",
        "recipe": hyper["recipe"],
        "rho": hyper["rho"],
    }


_BUILDERS: dict[str, Callable[[Hyperparameters], dict[str, Any]]] = {
    "adam": _adam("Adam"),
    "adamw": _adam("AdamW"),
    "radam": _adam("RAdam"),
    "sgd": _sgd,
    "lamb": _lamb,
    "ranger": _ranger,
    "schedule_free": _adam("AdamWScheduleFree"),
    "muon": _muon,
    "soap": _soap,
    "soap_muon": _soap_muon,
}
