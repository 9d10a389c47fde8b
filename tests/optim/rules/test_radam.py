from __future__ import annotations

import pytest
import torch

from tests.optim.rules.conftest import (
    ADAM,
    Run,
    constant,
    difference,
    losses_of_reference,
    losses_of_rule,
    packing,
    reference_run,
    rule_run,
    weights,
    whole,
)
from tunebench.optim.rules.radam import RAdam


def reference(views: list[torch.nn.Parameter], beta2: float = 0.99, eps: float = 1e-8) -> torch.optim.Optimizer:
    return torch.optim.RAdam(views, lr=1e-2, betas=(0.9, beta2), eps=eps, weight_decay=0.1, decoupled_weight_decay=True)


# 0.5: so short a memory is never rectified.
@pytest.mark.parametrize("beta2", [0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("eps", [1e-3, 1e-12])
def test_follows_torch(beta2: float, eps: float) -> None:
    params = weights()
    expected = reference_run(lambda views: reference(views, beta2, eps), params, whole(params), 100)
    hyper = {**ADAM, "beta2": beta2, "eps": eps, "weight_decay": 0.1}
    assert difference(rule_run(RAdam(packing(params)), params, hyper, 100), expected) < 1e-12


def test_first_steps_follow_the_gradient_and_later_ones_its_sign() -> None:
    params = weights()
    rule = RAdam(packing(params))
    hyper = {**ADAM, "weight_decay": 0.0}
    before = Run.start(rule, params)
    first = before.train(rule, hyper, 1, constant(1e-3))
    early = before.train(rule, hyper, 99, constant(1e-3))
    late = early.train(rule, hyper, 1, constant(1e-3))
    for name in before.params:
        assert torch.allclose(before.params[name] - first.params[name], torch.tensor(1e-5, dtype=torch.float64))
        assert bool((early.params[name] - late.params[name] > 1e-3).all())


def test_learns_as_torch_does_in_float32() -> None:
    ours = losses_of_rule(RAdam, {**ADAM, "eps": 1e-8, "weight_decay": 0.1})
    theirs = losses_of_reference(reference)
    assert ours[-1] < 0.5 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-2)
