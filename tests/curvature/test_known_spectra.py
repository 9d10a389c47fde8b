"""Lanczos, its quadrature and the trace estimators on operators whose eigenvalues are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tunebench.curvature.lanczos import lanczos
from tunebench.curvature.operators import Explicit
from tunebench.curvature.probes import rademacher
from tunebench.curvature.quadrature import quadrature
from tunebench.curvature.trace import hutch_plus_plus, hutchinson

# As a Hessian of a trained potential: a few large eigenvalues, a bulk near zero, some negative, a double one.
EIGENVALUES = np.concatenate(
    [[50.0, 20.0, 20.0, 3.0], np.geomspace(1e-6, 1.0, 340, dtype=np.float64), -np.geomspace(1e-6, 0.5, 56)]
)


def rotated(eigenvalues: np.ndarray, seed: int = 0) -> Explicit:
    """An operator with these eigenvalues in a random basis."""
    size = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    matrix = torch.from_numpy(basis * eigenvalues @ basis.T)
    return Explicit(size, lambda vector: matrix @ vector)


def start(size: int, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(size))


def test_extreme_ritz_values_are_the_extreme_eigenvalues_to_a_millionth():
    found = quadrature(rotated(EIGENVALUES), np.random.default_rng(3), probes=2, steps=60)
    for extreme, exact in ((found.largest, EIGENVALUES.max()), (found.least, EIGENVALUES.min())):
        assert abs(extreme.value - exact) < 1e-6 * EIGENVALUES.max()
        assert abs(extreme.value - exact) <= extreme.bound + 1e-12 * EIGENVALUES.max()


@pytest.mark.parametrize("steps", [1, 5, 25])
def test_an_eigenvalue_lies_within_the_residual_bound_of_every_ritz_value(steps: int):
    found = lanczos(rotated(EIGENVALUES), start(len(EIGENVALUES)), steps)
    distance = np.abs(found.values[:, None] - EIGENVALUES).min(1)
    assert (distance <= found.bounds + 1e-12 * EIGENVALUES.max()).all()


def test_reorthogonalisation_keeps_copies_of_a_found_eigenvalue_away():
    found = lanczos(rotated(EIGENVALUES), start(len(EIGENVALUES)), 200)
    assert (np.abs(found.values - 50.0) < 1e-3).sum() == 1
    assert (np.abs(found.values - 20.0) < 1e-3).sum() <= 2  # rounding may show the second direction of a double one


def test_a_run_through_the_whole_space_finds_every_eigenvalue():
    eigenvalues = np.linspace(-1.0, 2.0, 30)
    found = lanczos(rotated(eigenvalues), start(30), 50)
    np.testing.assert_allclose(found.values, eigenvalues, atol=1e-12)
    np.testing.assert_allclose(found.weights.sum(), 1.0)


def test_a_start_vector_inside_an_invariant_space_ends_the_run_with_exact_values():
    operator = Explicit(50, lambda vector: torch.linspace(1.0, 50.0, 50, dtype=torch.float64) * vector)
    vector = torch.zeros(50, dtype=torch.float64)
    vector[[3, 17]] = 1.0
    found = lanczos(operator, vector, 40)
    np.testing.assert_allclose(found.values, [4.0, 18.0])
    assert operator.products == 2
    assert found.bounds.max() < 1e-11


def test_the_quadrature_is_exact_for_polynomials_up_to_twice_the_steps():
    operator, vector = rotated(np.linspace(-1.0, 1.0, 100)), start(100)
    found = lanczos(operator, vector, 4)
    power, unit = vector / vector.norm(), vector / vector.norm()
    for degree in range(8):
        assert (found.weights * found.values**degree).sum() == pytest.approx(float(unit @ power), abs=1e-13)
        power = operator(power)


@pytest.mark.parametrize("seed", range(3))
def test_the_distribution_is_the_true_one_within_its_sampling_error(seed: int):
    found = quadrature(rotated(EIGENVALUES, seed), np.random.default_rng(seed), probes=8, steps=80)
    places = np.array([-0.3, -0.05, 0.05, 0.3, 0.9, 2.0, 10.0, 30.0])
    share, error = found.distribution(places)
    exact = (EIGENVALUES[:, None] < places).mean(0)
    assert (np.abs(share - exact) < 4.0 * error + 2e-3).all()
    assert error.max() < 0.02


def test_the_smoothed_density_is_the_true_one_within_its_sampling_error_and_integrates_to_one():
    found = quadrature(rotated(EIGENVALUES), np.random.default_rng(5), probes=8, steps=80)
    places, width = np.linspace(-3.0, 60.0, 4001), 0.3
    density, error = found.density(places, width)
    bells = np.exp(-0.5 * ((places - EIGENVALUES[:, None]) / width) ** 2) / (width * np.sqrt(2.0 * np.pi))
    assert (np.abs(density - bells.mean(0)) < 4.0 * error + 1e-3 * bells.mean(0).max()).all()
    assert np.trapezoid(density, places) == pytest.approx(1.0, abs=1e-6)


def test_both_traces_agree_with_the_truth_within_their_errors_and_the_sketch_is_closer():
    operator, exact = rotated(EIGENVALUES), EIGENVALUES.sum()
    plain = hutchinson(operator, np.random.default_rng(0), 60)
    sketched = hutch_plus_plus(operator, np.random.default_rng(0), 60)
    of_runs = quadrature(operator, np.random.default_rng(0), probes=20, steps=3).trace
    assert operator.products == 60 + 60 + 60
    for value, error in ((plain.value, plain.standard_error), (sketched.value, sketched.standard_error), of_runs):
        assert abs(value - exact) < 4.0 * error
    assert sketched.standard_error < 0.5 * plain.standard_error


def test_a_sketch_of_the_whole_space_gives_the_trace_exactly():
    found = hutch_plus_plus(rotated(np.linspace(-1.0, 3.0, 10)), np.random.default_rng(0), 30)
    assert found.value == pytest.approx(10.0)
    assert found.standard_error == 0.0


def test_one_probe_has_no_known_error():
    assert np.isnan(hutchinson(rotated(EIGENVALUES), np.random.default_rng(0), 1).standard_error)


@given(scale=st.floats(1e-9, 1e9), sign=st.sampled_from([1.0, -1.0]), size=st.integers(1, 40))
def test_a_flat_spectrum_has_condition_one_and_no_spread_at_any_scale(scale: float, sign: float, size: int):
    found = quadrature(Explicit(size, lambda v: sign * scale * v), np.random.default_rng(0), probes=2, steps=5)
    assert found.condition[0] == pytest.approx(1.0)
    assert found.spread_decades == pytest.approx(0.0, abs=1e-6)
    assert found.negative_share == (0.0 if sign > 0.0 else 1.0)


def test_condition_spread_and_negative_share_are_those_of_the_eigenvalues():
    eigenvalues = np.array([8.0, 2.0, 2.0, -4.0])
    found = quadrature(rotated(eigenvalues), np.random.default_rng(0), probes=4000, steps=4)
    logs, shares = np.log10(np.abs(eigenvalues)), np.abs(eigenvalues) / 16.0
    spread = np.sqrt((shares * (logs - (shares * logs).sum()) ** 2).sum())
    assert found.condition[0] == pytest.approx(8.0 / 4.0, abs=4.0 * found.condition[1])
    assert found.negative_share == pytest.approx(0.25, abs=0.01)
    assert found.spread_decades == pytest.approx(spread, abs=0.01)


def test_an_operator_of_zeros_has_neither_condition_nor_spread():
    found = quadrature(Explicit(5, torch.zeros_like), np.random.default_rng(0), probes=2, steps=3)
    assert (found.largest.value, found.largest.bound) == (0.0, 0.0)
    assert np.isnan(found.condition[0])
    assert np.isnan(found.spread_decades)


@pytest.mark.parametrize(("vector", "steps"), [(torch.zeros(3, dtype=torch.float64), 2), (torch.ones(3), 0)])
def test_a_zero_vector_or_no_step_is_refused(vector: torch.Tensor, steps: int):
    with pytest.raises(ValueError, match="allowed: at least 1, finite, not 0"):
        lanczos(Explicit(3, lambda v: v), vector, steps)


def test_a_product_that_is_not_finite_is_an_error_and_no_spectrum():
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        lanczos(Explicit(3, lambda v: v * torch.nan), torch.ones(3, dtype=torch.float64), 3)


def test_equal_seeds_draw_equal_signs():
    first, second = (rademacher(np.random.default_rng(7), 100) for _ in range(2))
    assert torch.equal(first, second)
    assert set(first.tolist()) == {-1.0, 1.0}
