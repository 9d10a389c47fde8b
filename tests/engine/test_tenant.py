"""What a trial brings into a cohort and how it is put back into NequIP's module."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from nequip.utils.global_state import set_global_state

from tests.engine.conftest import MakeTask, Reports
from tests.engine.test_lightning import assert_same_state
from tunebench.engine.checkpoints import checkpoint_folder, load_checkpoint, save_checkpoint
from tunebench.engine.lightning import run_trial
from tunebench.engine.tenant import ModuleShelf, SlotState, Tenant
from tunebench.optim.matrix_view import trainable_parameters
from tunebench.optim.realised import BrokenPromise
from tunebench.study.record import Readout
from tunebench.study.search_space import Treats, available_optimizers


def assert_same(found: SlotState, expected: SlotState) -> None:
    assert_same_state(vars(found), vars(expected))


def shuffled(state: SlotState, step: int) -> SlotState:
    """A state in which no two tensors are alike."""
    generator = torch.Generator().manual_seed(step)

    def noise(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        drawn = {name: torch.randn(t.shape, generator=generator, dtype=torch.float64) for name, t in tensors.items()}
        return {name: drawn[name].to(t.dtype) for name, t in tensors.items()}

    return replace(
        state,
        step=step,
        weights=noise(state.weights),
        averages=noise(state.averages),
        optimizer=noise(state.optimizer),
    )


@pytest.mark.parametrize("family", ["nequip", "allegro"])
def test_a_trial_starts_from_the_weights_that_nequip_draws_for_its_seed(make_task: MakeTask, family: str) -> None:
    set_global_state()  # NequIP builds none without
    first, shelf = make_task(family=family, name="first"), ModuleShelf()
    second = replace(make_task("soap", family=family, name="second"), seeds=replace(first.seeds, init=7))
    tenants = [Tenant(task, shelf) for task in (first, second, replace(first, run=first.run.parent / "third"))]
    assert_same_state(tenants[0].state.weights, tenants[2].state.weights)
    assert any(
        not torch.equal(tenants[0].state.weights[name], tenants[1].state.weights[name])
        for name in tenants[0].state.weights
    )
    for tenant in tenants:
        assert_same_state(tenant.state.weights, tenant.state.averages)
        assert tenant.state.weights.keys() == trainable_parameters(tenant.model).keys()
        assert tenant.state.step == 0


@pytest.mark.parametrize("optimizer", available_optimizers())
def test_a_state_comes_back_from_the_checkpoint_that_it_was_saved_in_bit_for_bit(
    make_task: MakeTask, optimizer: str
) -> None:
    task, shelf = make_task(optimizer), ModuleShelf()
    reports = Reports(stop_after=1)
    with pytest.raises(SystemExit):
        run_trial(task, reports)
    tenant = Tenant(task, shelf)
    assert tenant.state.step == 4
    state = shuffled(tenant.state, step=4)
    if tenant.task.averaged is not Readout.EMA:
        state = replace(state, averages=state.weights)
    evaluation = json.dumps(reports[0].to_plain())
    saved = tenant.saved(state)
    save_checkpoint(checkpoint_folder(task.run, tenant.name), {"evaluation": evaluation, "rows": [], **saved})
    Tenant(make_task(optimizer, name="between", learning_rate=1e-5), shelf)  # shares the module
    again = Tenant(task, shelf)
    assert_same(again.state, state)
    assert again.hyper == tenant.hyper
    assert_same_state(again.saved(again.state), saved)


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free", "soap"])
def test_what_a_tenant_saves_is_what_the_lightning_engine_saved(make_task: MakeTask, optimizer: str) -> None:
    task = make_task(optimizer)
    with pytest.raises(SystemExit):
        run_trial(task, Reports(stop_after=1))
    written = load_checkpoint(checkpoint_folder(task.run, task.key.trial_id))
    assert written is not None
    tenant = Tenant(task, ModuleShelf())
    saved = tenant.saved(tenant.state)
    assert_same_state(saved["module"], written["module"])
    assert_same_state(saved["scheduler"], written["scheduler"])
    assert_same_state(saved["optimizer"]["state"], written["optimizer"]["state"])
    for found, expected in zip(saved["optimizer"]["param_groups"], written["optimizer"]["param_groups"], strict=True):
        assert found == expected


def test_the_learning_rate_is_that_before_the_schedule_which_has_a_factor_for_every_step(make_task: MakeTask) -> None:
    tenant = Tenant(make_task(steps=40, evaluation_steps=(40,), learning_rate=0.01), ModuleShelf())
    factors = tenant.learning_rate_factors()
    assert tenant.hyper["learning_rate"] == 0.01
    assert (len(factors), factors.dtype) == (41, torch.float64)
    assert factors[:3].tolist() == [0.5, 1.0, 1.0]  # a twentieth of the horizon warms up
    assert float(factors[-1]) == 0.0


def test_a_tenant_whose_rule_treats_other_weights_than_promised_is_refused(make_task: MakeTask) -> None:
    with pytest.raises(BrokenPromise, match=r"^muon: found muon on "):
        Tenant(replace(make_task("muon"), treats=Treats.ALL), ModuleShelf())
