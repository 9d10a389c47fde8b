from __future__ import annotations

import math

import pytest
import torch
from pytorch_optimizer import Lamb as Reference

from tests.optim.rules.conftest import (
    ADAM,
    by_block,
    difference,
    losses_of_reference,
    losses_of_rule,
    noise,
    packing,
    reference_run,
    rule_run,
    tensors,
    weights,
)
from tunebench.optim.blocks import Block, View
from tunebench.optim.packing import Packing, Tensors
from tunebench.optim.rules.lamb import Lamb

HYPER = {**ADAM, "eps": 1e-6, "weight_decay": 0.1}


def reference(views: list[torch.nn.Parameter], clamp: float = 10.0, adam_debias: bool = True) -> torch.optim.Optimizer:
    # Without `adam_debias` the library divides the learning rate by 1 - beta1^t: see the test of its first step.
    library = Reference(views, lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, adam_debias=adam_debias)
    library.clamp = clamp
    return library


# 3 lies among the blocks' norms, 10 is the library's own.
@pytest.mark.parametrize("clamp", [3.0, 10.0, math.inf])
def test_follows_pytorch_optimizer_block_by_block(clamp: float) -> None:
    params = {name: 2.0 * w for name, w in weights().items()}
    expected = reference_run(lambda views: reference(views, clamp), params, by_block(), 100)
    assert difference(rule_run(Lamb(packing(params)), params, {**HYPER, "clamp": clamp}, 100), expected) < 1e-12


def relative_steps(clamp: float) -> list[float]:
    """First step over weight norm of two blocks of one flat weight, of norms 20 and 400."""
    params = {"linear": torch.cat([torch.full((100,), 2.0), torch.full((100,), 40.0)]).to(torch.float64)}
    blocks = [Block.slice("linear", str(path), 100 * path, (10, 10), View.MATRIX) for path in range(2)]
    rule = Lamb(Packing(params, blocks))
    packed = rule.packing.pack(params)
    hyper = tensors({**HYPER, "weight_decay": 0.0, "clamp": clamp})
    grads = {name: torch.full_like(w, 0.1) for name, w in packed.items()}
    new, _ = rule.update(grads, rule.init(packed), packed, hyper, torch.tensor(1))
    moved = (rule.packing.unpack(new)["linear"] - params["linear"]).reshape(2, 100)
    norms = params["linear"].reshape(2, 100).norm(dim=1)
    return [float(step) for step in moved.norm(dim=1) / norms]


def test_without_a_clamp_every_path_moves_by_the_learning_rate_relative_to_its_norm() -> None:
    assert relative_steps(math.inf) == pytest.approx([1e-2, 1e-2], rel=1e-4)


def test_the_customary_clamp_hides_the_norms_of_e3nn_weights() -> None:
    assert relative_steps(10.0) == pytest.approx([1e-2 * 10 / 20, 1e-2 * 10 / 400], rel=1e-4)


def test_the_first_step_obeys_the_learning_rate_where_the_library_exceeds_it_tenfold() -> None:
    params = weights()
    hyper = {**HYPER, "clamp": 10.0}
    shrunk = {name: (1 - 1e-2 * 0.1) * w for name, w in params.items()}

    def relative_step(after: Tensors) -> float:
        return float((after["mlp.0"] - shrunk["mlp.0"]).norm() / shrunk["mlp.0"].norm())

    theirs = reference_run(lambda views: reference(views, adam_debias=False), params, by_block(), 1)
    assert relative_step(rule_run(Lamb(packing(params)), params, hyper, 1)) == pytest.approx(1e-2, rel=1e-4)
    assert relative_step(theirs) == pytest.approx(1e-1, rel=1e-4)


def test_a_block_of_zero_weights_starts_to_move() -> None:
    params = weights()
    params["readout"] = torch.zeros_like(params["readout"])
    found = rule_run(Lamb(packing(params)), params, {**HYPER, "clamp": math.inf}, 1, noise(1.0))
    assert bool((found["readout"] != 0).all())


def test_learns_as_the_library_does_in_float32() -> None:
    ours = losses_of_rule(Lamb, {**HYPER, "clamp": 10.0})
    theirs = losses_of_reference(reference)
    assert ours[-1] < 0.5 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-2)
