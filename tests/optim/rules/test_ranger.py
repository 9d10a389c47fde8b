from __future__ import annotations

import pytest
import torch
from pytorch_optimizer import Ranger as Reference

from tests.optim.rules.conftest import (
    ADAM,
    BLOCKS,
    LOOKAHEAD,
    Run,
    Settings,
    by_matrix,
    constant,
    difference,
    losses_of_reference,
    losses_of_rule,
    noise,
    packing,
    reference_run,
    rule_run,
    weights,
    whole,
)
from tunebench.optim.blocks import Block, View
from tunebench.optim.packing import Packing
from tunebench.optim.rules.ranger import Ranger

HYPER = {**ADAM, **LOOKAHEAD, "eps": 1e-6, "weight_decay": 0.1}


def reference(views: list[torch.nn.Parameter], hyper: Settings = HYPER, **settings: bool) -> torch.optim.Optimizer:
    # The library's own choice before the threshold is the first moment times -1: see the test of its first step.
    chosen = {"use_gc": False, "degenerated_to_sgd": True, **settings}
    optimizer: torch.optim.Optimizer = Reference(
        views,
        lr=hyper["learning_rate"],
        betas=(hyper["beta1"], hyper["beta2"]),
        eps=hyper["eps"],
        weight_decay=hyper["weight_decay"],
        k=int(hyper["lookahead_k"]),
        alpha=hyper["lookahead_alpha"],
        **chosen,
    )
    return optimizer


@pytest.mark.parametrize("change", [{}, {"beta2": 0.999}, {"lookahead_k": 1.0}, {"lookahead_k": 6.0}], ids=str)
def test_follows_pytorch_optimizer_without_centralisation(change: Settings) -> None:
    params = weights()
    hyper = {**HYPER, **change}
    expected = reference_run(lambda views: reference(views, hyper), params, whole(params), 100)
    assert difference(rule_run(Ranger(packing(params)), params, hyper, 100), expected) < 1e-12


def test_centralises_as_pytorch_optimizer_does_on_out_in_matrices() -> None:
    params = weights()
    expected = reference_run(lambda views: reference(views, use_gc=True), params, by_matrix(BLOCKS), 100)
    found = rule_run(Ranger(packing(params), centralise=True), params, HYPER, 100)
    assert difference(found, expected) < 1e-12


def test_centralisation_lets_a_readout_train_that_the_library_freezes() -> None:
    params = {"readout": torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(32, 1)}

    def gradient(params: dict[str, torch.Tensor], step: int) -> dict[str, torch.Tensor]:
        return {"readout": torch.linspace(0.1, 2, 32, dtype=torch.float64).reshape(32, 1) / step}

    still = {**HYPER, "weight_decay": 0.0}
    theirs = reference_run(
        lambda views: reference(views, still, use_gc=True), params, whole(params), 12, gradient=gradient
    )
    rule = Ranger(Packing(params, [Block.whole("readout", (32, 1), View.MATRIX)]), centralise=True)
    ours = rule_run(rule, params, still, 12, gradient)
    assert difference(theirs, params) == 0.0
    assert difference(ours, params) > 1e-3


def test_descends_from_the_first_step_where_the_library_ascends() -> None:
    params = weights()
    still = {**HYPER, "weight_decay": 0.0, "lookahead_k": 100.0}
    theirs = reference_run(
        lambda views: reference(views, still, degenerated_to_sgd=False),
        params,
        whole(params),
        1,
        gradient=constant(1.0),
    )
    ours = rule_run(Ranger(packing(params)), params, still, 1, constant(1.0))
    for name, weight in params.items():
        assert bool((theirs[name] > weight).all())
        assert bool((ours[name] < weight).all())


def test_lookahead_keeps_the_slow_weights_between_its_steps() -> None:
    rule = Ranger(packing(weights()))
    run = Run.start(rule, weights())
    slow = {name: state for name, state in run.state.items() if name.startswith("slow/")}
    for step in range(1, 9):
        run = run.train(rule, HYPER, 1, noise(1.0))
        now = {name: run.state[name] for name in slow}
        assert (difference(now, slow) == 0.0) == (step % 4 != 0)
        slow = now


def test_learns_as_the_library_does_in_float32() -> None:
    ours = losses_of_rule(Ranger, HYPER)
    theirs = losses_of_reference(reference)
    assert ours[-1] < 0.7 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-2)
