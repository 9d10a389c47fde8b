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
from tunebench.optim.rules.adam import Adam

HYPER = {**ADAM, "weight_decay": 0.1}


def reference(views: list[torch.nn.Parameter], *, decoupled: bool, eps: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW if decoupled else torch.optim.Adam
    return optimizer(views, lr=1e-2, betas=(0.9, 0.99), eps=eps, weight_decay=0.1)


@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
@pytest.mark.parametrize("eps", [1e-3, 1e-8, 1e-15])
def test_follows_torch(decoupled: bool, eps: float) -> None:
    params = weights()
    expected = reference_run(lambda views: reference(views, decoupled=decoupled, eps=eps), params, whole(params), 100)
    found = rule_run(Adam(packing(params), decoupled), params, {**HYPER, "eps": eps}, 100)
    assert difference(found, expected) < 1e-12


@pytest.mark.parametrize("decoupled", [False, True], ids=["adam", "adamw"])
def test_learns_as_torch_does_in_float32(decoupled: bool) -> None:
    ours = losses_of_rule(lambda packing: Adam(packing, decoupled), {**HYPER, "eps": 1e-8})
    theirs = losses_of_reference(lambda views: reference(views, decoupled=decoupled, eps=1e-8))
    assert ours[-1] < 0.5 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_a_square_beyond_float32_stops_a_weight_and_makes_no_nan() -> None:
    params = weights(torch.float32)
    rule = Adam(packing(params))
    still = {**ADAM, "weight_decay": 0.0}
    struck = Run.start(rule, params).train(rule, still, 1, constant(1e25))
    later = struck.train(rule, still, 5)
    assert all(average.isinf().all() for name, average in later.state.items() if name.startswith("exp_avg_sq"))
    assert difference(later.params, struck.params) == 0.0
