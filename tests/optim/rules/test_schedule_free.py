from __future__ import annotations

import pytest
import torch
from schedulefree import AdamWScheduleFree

from tests.optim.rules.conftest import (
    ADAM,
    Run,
    Stepper,
    difference,
    losses_of_reference,
    losses_of_rule,
    packing,
    reference_run,
    rule_run,
    tensors,
    weights,
    whole,
)
from tunebench.optim.rules.schedule_free import ScheduleFree

HYPER = {**ADAM, "eps": 1e-8, "weight_decay": 0.1}
SETTINGS = pytest.mark.parametrize(
    "settings", [{}, {"warmup_steps": 20}, {"warmup_steps": 7, "r": 1.5, "weight_lr_power": 1.0}], ids=str
)


class Training:
    """The library's optimizer in training mode."""

    def __init__(self, views: list[torch.nn.Parameter], **settings: float) -> None:
        self.optimizer = AdamWScheduleFree(
            views, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, foreach=False, **settings
        )
        self.optimizer.train()

    def step(self) -> None:
        self.optimizer.step()


@SETTINGS
def test_trained_weights_follow_schedulefree(settings: dict[str, float]) -> None:
    params = weights()
    expected = reference_run(lambda views: Training(views, **settings), params, whole(params), 100)
    rule = ScheduleFree(packing(params), **settings)  # type: ignore[arg-type]
    assert difference(rule_run(rule, params, HYPER, 100), expected) < 1e-12


@SETTINGS
def test_averaged_weights_follow_schedulefree_and_lead_back(settings: dict[str, float]) -> None:
    params = weights()
    built: list[Training] = []

    def build(views: list[torch.nn.Parameter]) -> Stepper:
        built.append(Training(views, **settings))
        return built[0]

    expected = reference_run(build, params, whole(params), 50, finish=lambda: built[0].optimizer.eval())
    rule = ScheduleFree(packing(params), **settings)  # type: ignore[arg-type]
    run = Run.start(rule, params).train(rule, HYPER, 50)
    averaged = rule.averaged(run.params, run.state, tensors(HYPER))
    assert difference(rule.packing.unpack(averaged), expected) < 1e-12
    assert difference(run.params, averaged) > 1e-4
    assert difference(rule.trained(averaged, run.state, tensors(HYPER)), run.params) < 1e-12


def test_a_learning_rate_of_zero_from_the_start_moves_nothing() -> None:
    params = weights()
    found = rule_run(ScheduleFree(packing(params)), params, {**HYPER, "learning_rate": 0.0}, 3)
    assert difference(found, params) == 0.0


def test_learns_as_the_library_does_in_float32() -> None:
    ours = losses_of_rule(ScheduleFree, HYPER)
    theirs = losses_of_reference(Training)
    assert ours[-1] < 0.5 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-2)
