from __future__ import annotations

import pytest
import torch

from tests.optim.rules.conftest import (
    SGD,
    difference,
    losses_of_reference,
    losses_of_rule,
    packing,
    reference_run,
    rule_run,
    weights,
    whole,
)
from tunebench.optim.rules.sgd import Sgd

Parameters = list[torch.nn.Parameter]


@pytest.mark.parametrize("nesterov", [False, True])
def test_follows_torch_sgd(nesterov: bool) -> None:
    params = weights()
    hyper = {**SGD, "learning_rate": 0.05, "weight_decay": 0.0}
    expected = reference_run(
        lambda views: torch.optim.SGD(views, lr=0.05, momentum=0.9, nesterov=nesterov), params, whole(params), 100
    )
    assert difference(rule_run(Sgd(packing(params), nesterov), params, hyper, 100), expected) < 1e-12


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_momentum_it_is_plain_descent(nesterov: bool) -> None:
    params = weights()
    hyper = {"learning_rate": 0.05, "momentum": 0.0, "weight_decay": 0.0}
    expected = reference_run(lambda views: torch.optim.SGD(views, lr=0.05), params, whole(params), 20)
    assert difference(rule_run(Sgd(packing(params), nesterov), params, hyper, 20), expected) < 1e-12


def test_weight_decay_is_decoupled_from_the_momentum() -> None:
    # torch's weight decay enters the momentum; ours shrinks the weights by lr * wd per step, whatever the momentum.
    params = weights()

    class Decoupled(torch.optim.SGD):
        def step(self, closure: None = None) -> None:  # type: ignore[override]
            with torch.no_grad():
                for view in self.param_groups[0]["params"]:
                    view.mul_(1 - 0.05 * 0.3)
            super().step()

    expected = reference_run(lambda views: Decoupled(views, lr=0.05, momentum=0.9), params, whole(params), 100)
    hyper = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.3}
    assert difference(rule_run(Sgd(packing(params)), params, hyper, 100), expected) < 1e-12


def test_learns_as_torch_does_in_float32() -> None:
    hyper = {"learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.0}
    ours = losses_of_rule(Sgd, hyper)
    theirs = losses_of_reference(lambda views: torch.optim.SGD(views, lr=0.05, momentum=0.9))
    assert ours[-1] < 0.5 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-2)
