"""A factor on the learning rate of some weights is what a parameter group of their own would be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.optim.models import model_of
from tests.optim.test_optimizers import OPTIMIZERS, same, snapshot, through_a_file, train
from tunebench import optim
from tunebench.curvature.preconditioners import OptimizerState, preconditioner
from tunebench.optim.groups import matrix_groups, weight_groups
from tunebench.optim.optimizer import RuleOptimizer, state_key
from tunebench.optim.realised import realised_groups
from tunebench.optim.trained import learning_rate_factors
from tunebench.study.optimizer_config import optimizer_config
from tunebench.study.search_space import SearchSpace

FACTORS = {"layer0*": 0.1, "*readout*": 3.0}
GROUPS = {"tunebench.optim.matrix_groups": matrix_groups}


def built(name: str, lr_factors: Mapping[str, float] | None) -> tuple[torch.nn.Module, RuleOptimizer]:
    """A model and its optimizer, whose one group holds the factors, or which has a group for each factor."""
    model = model_of("nequip")
    config = optimizer_config(name, SearchSpace.load(name).defaults())
    config |= {"precondition_frequency": 2} if name.startswith("soap") else {}
    config |= {"weight_decay": 0.1}
    kind, settings = getattr(optim, config.pop("_target_").rpartition(".")[2]), config.pop("param_groups", {})
    group_builder: Any = GROUPS.get(settings.pop("_target_", ""), weight_groups)
    (whole,) = group_builder(model, lr_factors=lr_factors, **settings)
    groups = [whole] if lr_factors else _split(whole, config["lr"])
    optimizer: RuleOptimizer = kind(groups, **config)
    return model, optimizer


def _split(whole: dict[str, Any], rate: float) -> list[dict[str, Any]]:
    found = learning_rate_factors(whole["names"], FACTORS)
    groups = []
    for factor in sorted(set(found.values())):
        chosen = [index for index, name in enumerate(whole["names"]) if found[name] == factor]
        own = {key: type(value)(value[index] for index in chosen) for key, value in whole.items()}
        groups.append({**own, "lr": rate * factor})
    return groups


@OPTIMIZERS
def test_factors_are_groups_with_learning_rates_of_their_own_bit_for_bit(name: str) -> None:
    (one, factored), (other, grouped) = built(name, FACTORS), built(name, None)
    pair = list(one.parameters()), list(other.parameters())
    train(pair[0], factored, range(7))
    train(pair[1], grouped, range(7))
    if isinstance(factored, optim.AdamWScheduleFree):
        assert isinstance(grouped, optim.AdamWScheduleFree)
        assert same(snapshot(pair[0]), snapshot(pair[1]))
        factored.eval()
        grouped.eval()
    assert same(snapshot(pair[0]), snapshot(pair[1]))


@OPTIMIZERS
def test_a_state_with_factors_goes_on_bit_for_bit_and_not_under_other_factors(name: str) -> None:
    model, optimizer = built(name, FACTORS)
    parameters = list(model.parameters())
    train(parameters, optimizer, range(3))
    saved, weights = through_a_file(optimizer.state_dict()), snapshot(parameters)
    train(parameters, optimizer, range(3, 7))
    model, resumed = built(name, FACTORS)
    others = list(model.parameters())
    with torch.no_grad():
        for parameter, weight in zip(others, weights, strict=True):
            parameter.copy_(weight)
    resumed.load_state_dict(saved)
    train(others, resumed, range(3, 7))
    assert same(snapshot(others), snapshot(parameters))
    _, different = built(name, {"layer0*": 0.2})
    with pytest.raises(ValueError, match="found a state of other blocks or names"):
        different.load_state_dict(saved)


def test_the_realised_groups_show_the_factors() -> None:
    _, optimizer = built("soap", FACTORS)
    rows = realised_groups(optimizer)
    assert {row.get("lr_factor", 1.0) for row in rows} == {0.1, 1.0, 3.0}
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)
    assert all("lr_factors" not in row["settings"] for row in rows)


def test_the_preconditioner_of_a_slowed_weight_is_larger_by_the_inverse_of_its_factor() -> None:
    roots = []
    for factors in (FACTORS, {"*": 1.0}):
        model, optimizer = built("adamw", factors)
        train(list(model.parameters()), optimizer, range(1))
        record, names = optimizer.state[state_key(0)], optimizer.param_groups[0]["names"]
        state = OptimizerState(
            rule=optimizer.rule_of(optimizer.param_groups[0], optimizer.packing_of(0)),
            step=1,
            hyper=optimizer._hyper(optimizer.param_groups[0]),
            tensors=record["tensors"],
            weights=dict(zip(names, optimizer.param_groups[0]["params"], strict=True)),
        )
        ones = {name: torch.ones_like(weight, dtype=torch.float64) for name, weight in state.weights.items()}
        roots.append(preconditioner(state).root(ones))
    for name, factor in learning_rate_factors(roots[0], FACTORS).items():
        assert torch.allclose(roots[0][name], factor**0.5 * roots[1][name], rtol=1e-9)
