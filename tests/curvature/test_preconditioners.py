"""An optimizer's preconditioner is the map that its own update follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tunebench.curvature.operators import Coordinates, Explicit
from tunebench.curvature.preconditioners import (
    OptimizerState,
    Preconditioned,
    Preconditioner,
    preconditioner,
)
from tunebench.curvature.quadrature import quadrature
from tunebench.optim.blocks import Block, View
from tunebench.optim.packing import Packing, Tensors
from tunebench.optim.rule import UpdateRule
from tunebench.optim.rules.adam import Adam
from tunebench.optim.rules.lamb import Lamb
from tunebench.optim.rules.muon import Muon, Scale
from tunebench.optim.rules.radam import RAdam
from tunebench.optim.rules.ranger import Ranger
from tunebench.optim.rules.schedule_free import ScheduleFree
from tunebench.optim.rules.sgd import Sgd
from tunebench.optim.rules.soap import Soap
from tunebench.optim.rules.soap_muon import Recipe, SoapMuon

SHAPES = {"square": (6, 6), "tall": (8, 3), "wide": (4, 10), "product": (3, 2, 5), "vector": (7,)}
BLOCKS = [
    Block.whole("square", (6, 6), View.MATRIX),
    Block.whole("tall", (8, 3), View.MATRIX),
    Block.whole("wide", (4, 10), View.MATRIX),
    Block.whole("product", (3, 2, 5), View.PER_TYPE),
    Block.whole("vector", (7,)),
]
WEIGHTS = {name: torch.from_numpy(np.random.default_rng(1).standard_normal(shape)) for name, shape in SHAPES.items()}
HYPER = {
    "learning_rate": 0.01,
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.97,
    "momentum": 0.9,
    "eps": 1e-6,
    "clamp": float("inf"),
    "lookahead_k": 1000.0,
    "lookahead_alpha": 0.5,
    "shampoo_beta": 0.95,
    "precondition_frequency": 1000.0,
    "aux_learning_rate_ratio": 0.5,
    "aux_beta1": 0.8,
    "aux_beta2": 0.9,
    "aux_eps": 1e-7,
    "aux_weight_decay": 0.0,
}
ELEMENTWISE = Packing.elementwise(WEIGHTS)
MATRICES = Packing(WEIGHTS, BLOCKS)


@dataclass
class Run:
    """A rule after some steps of random gradients of unlike size: its state, and what its last step did."""

    state: OptimizerState
    moved: Tensors

    @property
    def preconditioner(self) -> Preconditioner:
        return preconditioner(self.state)

    @property
    def averaged(self) -> Tensors:
        """The averaged gradient by name of the weight."""
        packing, tensors = self.state.rule.packing, self.state.tensors
        held = {s.name: tensors.get(f"exp_avg/{s.name}", tensors.get(f"momentum/{s.name}")) for s in packing.segments}
        return packing.unpack(held)


def run(rule: UpdateRule, steps: int = 12, gradient: Callable[[int], Tensors] | None = None) -> Run:
    hyper = {name: torch.tensor(HYPER[name], dtype=torch.float64) for name in rule.hyperparameters}
    packing = rule.packing
    weights = packing.pack(WEIGHTS)
    state, before = rule.init(weights), weights
    draw = np.random.default_rng(2)
    for step in range(1, steps + 1):
        drawn = {n: torch.from_numpy(draw.standard_normal(w.shape)) for n, w in WEIGHTS.items()}
        sized = {
            n: g * torch.linspace(0.1, 3.0, g.numel(), dtype=torch.float64).view(g.shape) for n, g in drawn.items()
        }
        before = weights
        grads = packing.pack(gradient(step) if gradient else sized)
        number = torch.tensor(step, dtype=torch.int64)
        weights, state = rule.update(grads, state, weights, hyper, number, rule.phase(step, HYPER))
    named, old = packing.unpack(weights), packing.unpack(before)
    found = OptimizerState(rule=rule, step=steps, hyper=HYPER, tensors=state, weights=old)
    return Run(state=found, moved={name: named[name] - old[name] for name in named})


def inverse(preconditioner: Preconditioner, tensors: Tensors) -> Tensors:
    """P^-1 x, as C C^T x."""
    return preconditioner.root(preconditioner.root_transposed(tensors))


def assert_close(found: Tensors, expected: Tensors, rtol: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], rtol=rtol, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )


def name_of(rule: UpdateRule) -> str:
    return type(rule).__name__


@pytest.mark.parametrize(
    "rule", [Adam(ELEMENTWISE), RAdam(ELEMENTWISE), Ranger(ELEMENTWISE), Lamb(MATRICES)], ids=name_of
)
def test_an_elementwise_rule_moves_weights_by_its_inverse_times_the_averaged_gradient(rule: UpdateRule) -> None:
    ran = run(rule, steps=20)
    step = inverse(ran.preconditioner, ran.averaged)
    corrected = 1.0 if isinstance(rule, Lamb) else 1.0 - HYPER["beta1"] ** 20
    ratio = {name: -ran.moved[name] / HYPER["learning_rate"] * corrected / step[name] for name in step}
    rectification = ratio["vector"][0] if isinstance(rule, RAdam | Ranger) else torch.ones((), dtype=torch.float64)
    assert_close(ratio, {name: torch.ones_like(value) * rectification for name, value in ratio.items()}, rtol=1e-6)


def test_schedule_free_has_adams_preconditioner_for_its_gradient() -> None:
    ran, adam = run(ScheduleFree(ELEMENTWISE)), run(Adam(ELEMENTWISE))
    assert_close(inverse(ran.preconditioner, WEIGHTS), inverse(adam.preconditioner, WEIGHTS))


def test_sgd_and_rectified_adam_before_its_rectification_have_none() -> None:
    for ran in (run(Sgd(ELEMENTWISE)), run(RAdam(ELEMENTWISE), steps=3)):
        assert_close(inverse(ran.preconditioner, WEIGHTS), WEIGHTS)
        assert {part.kind for part in ran.preconditioner.parts} == {"identity"}


def test_soap_moves_weights_by_its_inverse_times_the_averaged_gradient() -> None:
    ran = run(Soap(MATRICES))
    step = inverse(ran.preconditioner, ran.averaged)
    matrix, rest = (1.0 - HYPER[beta] ** 11 for beta in ("beta1", "aux_beta1"))
    expected = {n: -m / HYPER["learning_rate"] * (rest if n == "vector" else matrix) for n, m in ran.moved.items()}
    assert_close(step, expected, rtol=1e-7)


@pytest.mark.parametrize("scale", list(Scale))
def test_muon_moves_matrices_by_its_inverse_times_the_momentum_as_far_as_newton_schulz_goes(scale: Scale) -> None:
    ran = run(Muon(MATRICES, nesterov=False, scale=scale))
    step = inverse(ran.preconditioner, ran.averaged)
    for name in ("square", "tall", "wide", "product"):
        moved, expected = -ran.moved[name].reshape(-1) / HYPER["learning_rate"], step[name].reshape(-1)
        assert float(moved @ expected / (moved.norm() * expected.norm())) > 0.95
        assert float(moved.norm() / expected.norm()) == pytest.approx(1.0, abs=0.25)
    expected = -ran.moved["vector"] / HYPER["learning_rate"] * (1.0 - HYPER["aux_beta1"] ** 12)
    torch.testing.assert_close(step["vector"], expected, rtol=1e-6, atol=1e-12)


def test_muons_preconditioner_is_the_damped_root_of_its_momentums_gram_matrix_from_the_smaller_side() -> None:
    ran = run(Muon(MATRICES))
    momentum, damping = ran.averaged["tall"], 3.4445**-5
    gram = momentum.mT @ momentum + damping**2 * momentum.square().sum() * torch.eye(3, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(gram)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.mT / (0.2 * 8**0.5)
    torch.testing.assert_close(inverse(ran.preconditioner, WEIGHTS)["tall"] @ root, WEIGHTS["tall"])


def test_soap_muon_orthogonalises_what_soap_has_whitened() -> None:
    ran, soap = run(SoapMuon(MATRICES)), run(Soap(MATRICES))
    # Where whitening changes nothing but the size, the two maps commute and the update is followed exactly.
    flat = {k: torch.full_like(t, 0.25) if k.startswith("exp_avg_sq") else t for k, t in ran.state.tensors.items()}
    state = OptimizerState(rule=ran.state.rule, step=12, hyper=HYPER, tensors=flat, weights=WEIGHTS)
    step = inverse(preconditioner(state), ran.averaged)
    for name in ("square", "tall", "wide"):
        left, _, right = torch.linalg.svd(ran.averaged[name], full_matrices=False)
        polar = left @ right
        unit = polar / polar.square().mean().sqrt() * (1.0 - HYPER["beta2"] ** 11) ** 0.5
        cosine = (step[name] * unit).sum() / step[name].norm() / unit.norm()
        assert float(cosine) > 0.999
        assert float(step[name].norm()) == pytest.approx(float(unit.norm()), rel=1e-3)
    assert_close(
        {"vector": inverse(ran.preconditioner, WEIGHTS)["vector"]},
        {"vector": inverse(soap.preconditioner, WEIGHTS)["vector"]},
    )


RULES = [
    Sgd(ELEMENTWISE),
    Adam(ELEMENTWISE),
    Lamb(MATRICES),
    ScheduleFree(ELEMENTWISE),
    Soap(MATRICES),
    Muon(MATRICES),
    SoapMuon(MATRICES),
    SoapMuon(MATRICES, rho=0.5),
    SoapMuon(MATRICES, recipe=Recipe.OLMO),
]


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_the_preconditioned_operator_is_symmetric_and_has_the_eigenvalues_of_the_inverse_times_the_hessian(
    rule: UpdateRule,
) -> None:
    found = run(rule).preconditioner
    everything = Coordinates({name: torch.ones_like(w, dtype=torch.bool) for name, w in WEIGHTS.items()})
    draw = np.random.default_rng(4)
    half = torch.from_numpy(draw.standard_normal((everything.size, everything.size)))
    matrix = half + half.mT
    hessian = Explicit(everything.size, lambda vector: matrix @ vector)
    operator = Preconditioned(hessian, everything, found)
    columns = torch.eye(everything.size, dtype=torch.float64)
    dense = torch.stack([operator(column) for column in columns], dim=1)
    scale = float(dense.abs().max())
    torch.testing.assert_close(dense, dense.mT, rtol=0.0, atol=1e-10 * scale)
    inverses = [everything.vector(inverse(found, everything.tensors(column))) for column in columns]
    expected = torch.linalg.eigvals(torch.stack(inverses, dim=1) @ matrix)
    eigenvalues = torch.linalg.eigvalsh(dense)
    torch.testing.assert_close(expected.real.sort().values, eigenvalues, rtol=1e-6, atol=1e-9 * scale)
    assert operator.products == hessian.products == everything.size


def test_adam_flattens_the_spectrum_of_a_diagonal_quadratic() -> None:
    curvatures = {n: torch.logspace(-4, 2, w.numel(), dtype=torch.float64).view(w.shape) for n, w in WEIGHTS.items()}
    draw = np.random.default_rng(5)

    def gradient(_: int) -> Tensors:
        """Of the quadratic at places that are as likely on one side as on the other, and equally far."""
        return {n: c * torch.from_numpy(draw.choice([-1.0, 1.0], c.shape)) for n, c in curvatures.items()}

    ran = run(Adam(ELEMENTWISE), steps=50, gradient=gradient)
    everything = Coordinates({name: torch.ones_like(w, dtype=torch.bool) for name, w in WEIGHTS.items()})
    diagonal = everything.vector(curvatures)
    hessian = Explicit(everything.size, lambda vector: diagonal * vector)
    plain, flat = (
        quadrature(operator, np.random.default_rng(0), probes=3, steps=40)
        for operator in (hessian, Preconditioned(hessian, everything, ran.preconditioner))
    )
    assert plain.condition[0] > 5.0
    assert flat.condition[0] == pytest.approx(1.0, abs=0.02)  # eps is a hundredth of the least curvature
    assert flat.spread_decades < 0.01
    assert flat.largest.value == pytest.approx(1.0, abs=1e-6)


def test_damping_is_reported_with_the_share_of_eigenvalues_that_it_makes() -> None:
    ran = run(Adam(ELEMENTWISE))
    quiet = {k: t * 1e-20 if k.startswith("exp_avg_sq") else t for k, t in ran.state.tensors.items()}
    state = OptimizerState(rule=ran.state.rule, step=12, hyper=HYPER, tensors=quiet, weights=WEIGHTS)
    (part,), (damped,) = ran.preconditioner.parts, preconditioner(state).parts
    assert part.damped_share == 0.0
    assert damped.damped_share == 1.0
    assert damped.damping == "eps 1.0e-06 added to the root"
    assert damped.least == pytest.approx(1e-6, rel=1e-2)


def test_a_block_without_momentum_is_counted_and_left_out() -> None:
    ran = run(Muon(MATRICES), gradient=lambda step: {n: w * (n != "tall") * step for n, w in WEIGHTS.items()})
    matrices, rest = ran.preconditioner.parts
    assert (matrices.excluded, rest.excluded) == (24, 0)
    step = inverse(ran.preconditioner, WEIGHTS)
    assert (step["tall"] == 0.0).all()
    assert all(bool(torch.isfinite(value).all()) for value in step.values())


@pytest.mark.parametrize(
    ("rule", "steps", "message"),
    [
        (Soap(MATRICES), 1, "found SOAP at step 1, which sets up its bases, allowed: 2 or later"),
        (SoapMuon(MATRICES, recipe=Recipe.NANOGPT), 5, "recipe nanogpt, no linear map, allowed: paper, olmo"),
        (Ranger(MATRICES, centralise=True), 5, "Ranger with centralised gradients, allowed: centralise: false"),
        (SoapMuon(MATRICES, recipe=Recipe.TRACK3), 5, "recipe track3, no linear map, allowed: paper, olmo"),
    ],
)
def test_a_rule_without_a_linear_preconditioner_is_refused_by_name(rule: UpdateRule, steps: int, message: str) -> None:
    ran = run(rule, steps=steps)
    with pytest.raises(ValueError, match=message):
        _ = ran.preconditioner


def test_before_the_first_step_there_is_no_preconditioner() -> None:
    rule = Adam(ELEMENTWISE)
    state = OptimizerState(
        rule=rule, step=0, hyper=HYPER, tensors=rule.init(rule.packing.pack(WEIGHTS)), weights=WEIGHTS
    )
    with pytest.raises(ValueError, match="found a checkpoint at step 0, allowed: 1 or later"):
        preconditioner(state)
