"""The `optimizer` sections of studies build the optimizers that the search spaces name, with all of their settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hydra.utils import get_class, instantiate

from tests.optim.models import model_of
from tunebench import optim
from tunebench.optim.optimizer import RuleOptimizer
from tunebench.study.optimizer_config import optimizer_config
from tunebench.study.search_space import ChoiceParameter, Role, SearchSpace, available_optimizers, shipped_optimizers

OPTIMIZERS = pytest.mark.parametrize("name", shipped_optimizers())
FAMILIES = pytest.mark.parametrize("family", ["nequip", "allegro"])


def build(name: str, model: torch.nn.Module, **changes: Any) -> RuleOptimizer:
    """The optimizer as NequIP's training module builds it from its section, with the defaults of its search space."""
    config = optimizer_config(name, {**SearchSpace.load(name).defaults(), **changes})
    groups = config.pop("param_groups", None)
    parameters = model.parameters() if groups is None else instantiate(groups, model=model)
    optimizer: RuleOptimizer = get_class(config.pop("_target_"))(params=parameters, **config)
    return optimizer


def trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int, scale: float = 1.0) -> None:
    """Steps on gradients that depend on the step alone."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            gradient = scale * torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def test_every_optimizer_of_the_package_has_a_search_space_and_every_space_an_optimizer() -> None:
    named = {SearchSpace.load(name).implementation for name in shipped_optimizers()}
    assert named == {f"tunebench.optim.{name}" for name in optim.__all__ if not name.endswith("_groups")}
    assert available_optimizers() == shipped_optimizers()


@OPTIMIZERS
@FAMILIES
def test_the_section_builds_the_optimizer_that_its_search_space_names(name: str, family: str) -> None:
    optimizer = build(name, model_of(family))
    assert type(optimizer) is get_class(SearchSpace.load(name).implementation)
    assert name in (optimizer.matrix_rule, optimizer.plain_rule)


@OPTIMIZERS
@FAMILIES
def test_hyperparameters_arrive_in_the_parameter_group(name: str, family: str) -> None:
    hyper = SearchSpace.load(name).defaults()
    changed: dict[str, Any] = {"learning_rate": 0.0123, "weight_decay": 0.0456, "eps": 3e-11}
    changed |= {beta: 0.77 for beta in ("beta1", "aux_beta1") if beta in hyper}
    changed |= {beta: 0.88 for beta in ("beta2", "aux_beta2") if beta in hyper}
    (group,) = build(name, model_of(family), **changed).param_groups
    assert (group["lr"], group["weight_decay"]) == (0.0123, 0.0456)
    expected: dict[str, Any] = {"betas": (0.77, 0.88), "aux_betas": (0.77, 0.88), "eps": 3e-11, "aux_eps": 3e-11}
    expected |= {key: hyper.get(key) for key in group.keys() & hyper.keys() if key not in changed}
    for key, value in expected.items():
        assert group.get(key, value) == value, key


@OPTIMIZERS
def test_the_section_is_plain_data(name: str) -> None:
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str)

    config = optimizer_config(name, SearchSpace.load(name).defaults())
    assert plain(config)
    assert "params" not in config


@OPTIMIZERS
def test_every_searched_hyperparameter_changes_the_section(name: str) -> None:
    space = SearchSpace.load(name)
    defaults = space.defaults()
    for parameter, description in space.parameters.items():
        others = [value for value in map(description.value_at, (0.0, 1.0)) if value != defaults[parameter]]
        assert optimizer_config(name, defaults | {parameter: others[0]}) != optimizer_config(name, defaults), parameter


@OPTIMIZERS
def test_every_choice_of_structure_builds_an_optimizer_that_trains(name: str) -> None:
    for parameter, description in SearchSpace.load(name).parameters.items():
        if description.role is Role.STRUCTURE and isinstance(description, ChoiceParameter):
            for choice in description.choices:
                model = model_of("nequip")
                trained(model, build(name, model, **{parameter: choice}), steps=3)
                assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())


def test_nesterov_without_momentum_is_plain_descent() -> None:
    hyper = SearchSpace.load("sgd").defaults() | {"nesterov": True, "momentum": 0.0}
    assert optimizer_config("sgd", hyper)["nesterov"] is False


@OPTIMIZERS
def test_a_missing_hyperparameter_is_an_error(name: str) -> None:
    hyper = SearchSpace.load(name).defaults()
    del hyper["learning_rate"]
    with pytest.raises(KeyError, match="learning_rate"):
        optimizer_config(name, hyper)


@OPTIMIZERS
@FAMILIES
def test_zero_gradients_leave_every_weight_finite(name: str, family: str) -> None:
    model = model_of(family)
    trained(model, build(name, model), steps=12, scale=0.0)  # beyond a refresh of SOAP's preconditioner
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@OPTIMIZERS
@FAMILIES
def test_every_weight_moves(name: str, family: str) -> None:
    model = model_of(family)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    trained(model, build(name, model), steps=7)  # beyond a synchronisation of Lookahead
    assert [key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])] == []
