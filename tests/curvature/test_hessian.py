"""Hessian-vector products of the training loss against finite differences of its gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nequip.utils.global_state import set_global_state

from tests.engine.test_cohort import CrystalTrials
from tunebench.curvature.operators import Hessian
from tunebench.curvature.probes import rademacher
from tunebench.engine.full_batch import FullBatch, full_batch, model_in
from tunebench.engine.tenant import ModuleShelf, Tenant
from tunebench.optim.packing import Tensors
from tunebench.study.spec import Family


def loss_of(trials: CrystalTrials, family: Family) -> FullBatch:
    """The loss over a trial's training frames: energies, half of the forces, stress."""
    set_global_state()
    task = trials.task("adamw", family=family)
    model = Tenant(task, ModuleShelf()).model
    return full_batch(task, model_in(task, torch.float64, model), "train", chunk_frames=5)


def by_differences(loss: FullBatch, along: Tensors, step: float = 1e-4) -> Tensors:
    """The Hessian times a vector by central differences of gradients, of fourth order in the step."""
    weights = {name: parameter.detach().clone() for name, parameter in loss.parameters.items()}

    def gradient(at: float) -> Tensors:
        loss.set_weights({name: weight + at * step * along[name] for name, weight in weights.items()})
        return loss.loss_and_gradient()[1]

    far_left, left, right, far_right = (gradient(at) for at in (-2.0, -1.0, 1.0, 2.0))
    loss.set_weights(weights)
    return {n: (8.0 * (right[n] - left[n]) - (far_right[n] - far_left[n])) / (12.0 * step) for n in weights}


@pytest.fixture(scope="module", params=list(Family), ids=str)
def loss(request: pytest.FixtureRequest, trials: CrystalTrials) -> FullBatch:
    return loss_of(trials, request.param)


def test_products_are_finite_differences_of_gradients_to_a_hundred_thousandth(loss: FullBatch) -> None:
    assert loss.counts.forces > 0
    assert loss.counts.stress > 0
    hessian = Hessian(loss, np.random.default_rng(0))
    vector = rademacher(np.random.default_rng(1), hessian.size)
    found = hessian(vector)
    expected = hessian.coordinates.vector(by_differences(loss, hessian.coordinates.tensors(vector)))
    assert float((found - expected).norm()) < 1e-5 * float(expected.norm())


def test_products_are_symmetric_and_the_same_whether_graphs_are_kept_or_not(loss: FullBatch) -> None:
    kept = Hessian(loss, np.random.default_rng(0))
    anew = Hessian(loss, np.random.default_rng(0), keep_graphs=False)
    x, y = (rademacher(np.random.default_rng(seed), kept.size) for seed in (2, 3))
    torch.testing.assert_close(kept(x), anew(x), rtol=1e-10, atol=1e-12)
    assert float(x @ kept(y)) == pytest.approx(float(y @ kept(x)), rel=1e-9)
    assert kept.products == 4
    assert kept.loss == pytest.approx(anew.loss)


def test_an_element_is_dead_only_where_the_loss_does_not_depend_on_it(loss: FullBatch) -> None:
    hessian = Hessian(loss, np.random.default_rng(0))
    live = hessian.coordinates.tensors(torch.ones(hessian.size, dtype=torch.float64))
    before, gradient = loss.loss_and_gradient()
    weights = {name: parameter.detach().clone() for name, parameter in loss.parameters.items()}
    loss.set_weights({name: weight + 0.1 * (1.0 - live[name]) for name, weight in weights.items()})
    after, _ = loss.loss_and_gradient()
    loss.set_weights(weights)
    assert float(after) == pytest.approx(float(before), rel=1e-12)
    assert all((gradient[name][live[name] == 0.0] == 0.0).all() for name in gradient)
