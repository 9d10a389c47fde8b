from __future__ import annotations

import pytest
import torch

from tunebench.optim.eigenbasis import eigenbasis, orthonormalise, power_iteration

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
"""Of bases; factors are in float64."""


@pytest.fixture(autouse=True, params=["LAPACK", "products"])
def orthonormalised_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds for the way of the CPU and for that of a GPU."""
    if request.param == "products":
        monkeypatch.setattr("tunebench.optim.eigenbasis._LAPACK_ON", set())


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(*shape: int, seed: int = 1) -> torch.Tensor:
    q: torch.Tensor = torch.linalg.qr(gaussian(*shape, seed=seed)).Q
    return q


def factor(kind: str, size: int) -> torch.Tensor:
    """Two factors of one kind."""
    if kind == "full rank":
        x = gaussian(2, size, 3 * size)
        return x @ x.mT
    if kind == "rank 3":
        x = gaussian(2, size, 3)
        return x @ x.mT
    if kind == "dead":
        return torch.zeros(2, size, size, dtype=torch.float64)
    if kind == "half dead":
        x = gaussian(2, size, 3 * size)
        x[:, size // 2 :] = 0
        return x @ x.mT
    assert kind == "ill-conditioned"
    q = rotation(2, size, size)
    return (q * torch.logspace(0, -14, size, dtype=torch.float64)) @ q.mT


KINDS = pytest.mark.parametrize("kind", ["full rank", "rank 3", "dead", "half dead", "ill-conditioned"])


def orthogonality_error(basis: torch.Tensor) -> float:
    wide = basis.to(torch.float64)
    return float((wide.mT @ wide - torch.eye(basis.shape[-1], dtype=torch.float64)).abs().max())


def up_to_signs(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found * (found * expected).sum(-2, keepdim=True).sign() - expected).abs().max())


@pytest.mark.parametrize("size", [1, 2, 8, 33, 96])
def test_orthonormalise_equals_householder_qr_up_to_signs(size: int) -> None:
    x = gaussian(3, size, size) + 3 * torch.eye(size, dtype=torch.float64)
    found, sound = orthonormalise(x)
    assert sound.all()
    assert up_to_signs(found, torch.linalg.qr(x).Q) < 1e-12


def test_orthonormalise_reports_what_it_cannot_do_and_spares_the_rest() -> None:
    x = gaussian(4, 6, 6)
    expected, _ = orthonormalise(x)
    x[1] = torch.nan
    x[2, :, 3] = 0
    found, sound = orthonormalise(x)
    assert sound.tolist() == [True, False, False, True]
    assert torch.equal(found[[0, 3]], expected[[0, 3]])


def test_orthonormalise_masters_a_condition_number_of_1e12() -> None:
    x = rotation(2, 40, 40) @ torch.diag(torch.logspace(0, -12, 40, dtype=torch.float64)) @ rotation(2, 40, 40, seed=2)
    found, sound = orthonormalise(x)
    assert sound.all()
    assert orthogonality_error(found) < 1e-13


@pytest.mark.parametrize("size", [2, 8, 33, 96])
def test_a_refresh_equals_qr_of_the_sorted_product(size: int) -> None:
    s, q = factor("full rank", size), rotation(2, size, size, seed=5)
    found, order = power_iteration(s, q)
    for k in range(2):
        expected_order = torch.argsort(torch.diagonal(q[k].T @ s[k] @ q[k]), descending=True)
        assert torch.equal(order[k], expected_order)
        assert up_to_signs(found[k], torch.linalg.qr(s[k] @ q[k][:, expected_order]).Q) < 1e-10


@KINDS
@DTYPES
@pytest.mark.parametrize("size", [4, 33])
def test_bases_are_orthonormal_whatever_the_factor(kind: str, dtype: torch.dtype, size: int) -> None:
    s = factor(kind, size)
    aligned = eigenbasis(s)
    for basis in (aligned.to(dtype), rotation(2, size, size, seed=7).to(dtype)):
        refreshed, order = power_iteration(s, basis)
        assert orthogonality_error(refreshed) < (1e-6 if dtype == torch.float32 else 1e-12)
        assert torch.equal(order.sort(-1).values, torch.arange(size).expand(2, -1))
        assert refreshed.dtype == dtype
    assert orthogonality_error(aligned) < 1e-12


@DTYPES
def test_fifty_refreshes_on_random_gradients_keep_the_basis_orthonormal(dtype: torch.dtype) -> None:
    s = torch.zeros(3, 24, 24, dtype=torch.float64)
    q = torch.eye(24, dtype=dtype).repeat(3, 1, 1)
    for step in range(50):
        # Thin gradients of ever changing size: the factors are rank-deficient at first and never well-conditioned.
        x = 10.0 ** (step % 5 - 2) * gaussian(3, 24, 4, seed=step)
        s = torch.lerp(s, x @ x.mT, 0.05)
        q, _ = power_iteration(s, q)
        assert orthogonality_error(q) < (1e-6 if dtype == torch.float32 else 1e-13)


def test_repeated_refreshes_find_the_eigenvectors_of_a_fixed_factor() -> None:
    q = rotation(2, 12, 12, seed=3)
    s = (q * torch.logspace(0, -3, 12, dtype=torch.float64)) @ q.mT
    found = rotation(2, 12, 12, seed=4)
    errors = []
    for _ in range(60):
        found, _ = power_iteration(s, found)
        errors.append(up_to_signs(found, eigenbasis(s)))
    assert errors[0] > 0.1
    assert errors[-1] < 1e-10


def test_the_eigenbasis_is_that_of_eigh_in_descending_order() -> None:
    s = factor("full rank", 17)
    expected = torch.linalg.eigh(s).eigenvectors.flip(-1)
    assert up_to_signs(eigenbasis(s), expected) < 1e-10


def test_the_basis_of_a_null_space_does_not_depend_on_round_off() -> None:
    s = factor("rank 3", 20)
    noise = gaussian(2, 20, 20, seed=9)
    disturbed = s + 1e-16 * s.abs().max() * (noise + noise.mT)
    plain = [torch.linalg.eigh(x).eigenvectors.flip(-1) for x in (s, disturbed)]
    assert up_to_signs(*plain) > 0.1
    assert up_to_signs(eigenbasis(disturbed), eigenbasis(s)) < 1e-10
    basis = rotation(2, 20, 20, seed=8)
    first, second = power_iteration(s, basis)[0], power_iteration(disturbed, basis)[0]
    assert up_to_signs(second, first) < 1e-10


def test_a_refresh_of_a_rank_deficient_factor_spans_its_range_first() -> None:
    s = factor("rank 3", 20)
    found, _ = power_iteration(s, rotation(2, 20, 20, seed=8))
    assert float((s @ found[..., 3:]).abs().max()) < 1e-11 * float(s.abs().max())


@DTYPES
def test_dead_factors_keep_their_basis_and_poisoned_ones_only_their_order(dtype: torch.dtype) -> None:
    s, q = factor("full rank", 9).repeat(2, 1, 1), rotation(4, 9, 9).to(dtype)
    s[0], s[1, 2, 3], s[3] = 0, torch.inf, torch.nan
    found, order = power_iteration(s, q)
    torch.testing.assert_close(found[0], q[0], rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    for k in (1, 3):
        assert torch.equal(found[k], q[k][:, order[k]])
    assert torch.equal(found[2], power_iteration(s[2:3], q[2:3])[0][0])
    assert torch.equal(eigenbasis(s)[[0, 1, 3]], torch.eye(9, dtype=torch.float64).expand(3, 9, 9))


@DTYPES
@pytest.mark.parametrize("exponent", [-19, 19])
def test_the_size_of_gradients_does_not_matter(dtype: torch.dtype, exponent: int) -> None:
    # As large and small as squares of float32 gradients can be; a power of two, so that nothing else is rounded.
    scale = 2.0 ** (6 * exponent)
    for kind in ("full rank", "rank 3"):
        s, q = factor(kind, 8), rotation(2, 8, 8).to(dtype)
        assert torch.equal(eigenbasis(scale * s), eigenbasis(s))
        assert torch.equal(power_iteration(scale * s, q)[0], power_iteration(s, q)[0])


@DTYPES
def test_slots_equal_single_matrices(dtype: torch.dtype) -> None:
    s = torch.stack([factor(kind, 10) for kind in ("full rank", "rank 3", "dead", "ill-conditioned")])
    q = rotation(4, 2, 10, 10).to(dtype)
    slots, orders = torch.func.vmap(power_iteration)(s, q)
    first = torch.func.vmap(eigenbasis)(s)
    for slot in range(4):
        alone, order = power_iteration(s[slot], q[slot])
        assert torch.equal(slots[slot], alone)
        assert torch.equal(orders[slot], order)
        assert torch.equal(first[slot], eigenbasis(s[slot]))
