from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tunebench.optim.newton_schulz import CUBIC, QUINTIC, Coefficients, newton_schulz, orthogonalise

SCHEDULES: dict[str, list[Coefficients]] = {
    "muon": [QUINTIC] * 5,
    "six quintic": [QUINTIC] * 6,
    "quintic, cubic": [QUINTIC] * 5 + [CUBIC] * 2,
    "twelve slow": [(2.0, -1.5, 0.5)] * 12,
}
SIZES = [(1, 8), (8, 64), (32, 32), (64, 300), (96, 160), (32, 1024)]


def matrices(rows: int, cols: int, condition: float = 1.0, rank: int | None = None) -> torch.Tensor:
    """Three matrices with singular values spread evenly in the logarithm down to 1 / condition, float64."""
    generator = torch.Generator().manual_seed(rows * cols)
    x = torch.randn(3, rows, cols, generator=generator, dtype=torch.float64)
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    exponents = torch.linspace(0, 1, rows, dtype=torch.float64) if rows > 1 else torch.zeros(1, dtype=torch.float64)
    values = condition**-exponents
    if rank is not None:
        values = torch.where(torch.arange(rows) < rank, values, 0.0)
    spread: torch.Tensor = u * values @ v
    return spread


def direct(x: torch.Tensor, schedule: Sequence[Coefficients]) -> torch.Tensor:
    """The iteration as it is written, on the long matrices."""
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    for a, b, c in schedule:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e10])
@pytest.mark.parametrize("rank", [None, 1, 4])
def test_equals_the_direct_iteration_also_in_float32(
    schedule: list[Coefficients], size: tuple[int, int], condition: float, rank: int | None
) -> None:
    x = matrices(*size, condition, rank).to(torch.float32)
    expected = direct(x.to(torch.float64), schedule)
    assert float((orthogonalise([x.to(torch.float64)], schedule)[0] - expected).abs().max()) < 1e-10
    assert float((orthogonalise([x], schedule)[0] - expected).abs().max()) < 1e-3


def test_singular_values_end_near_one_and_singular_vectors_stay() -> None:
    x = matrices(32, 100, condition=30.0)
    u, values, v = torch.linalg.svd(newton_schulz(x), full_matrices=False)
    assert 0.6 < float(values.min()) < float(values.max()) < 1.3
    left, _, right = torch.linalg.svd(x, full_matrices=False)
    assert float((newton_schulz(x, 40, CUBIC) - left @ right).abs().max()) < 1e-10
    assert u.shape == (3, 32, 32)
    assert v.shape == (3, 32, 100)


def test_stacks_of_unlike_shapes_do_not_touch_each_other() -> None:
    stacks = [matrices(*size, 1e2) for size in SIZES]
    together = orthogonalise(stacks, SCHEDULES["muon"])
    for stack, found in zip(stacks, together, strict=True):
        assert float((found - direct(stack, SCHEDULES["muon"])).abs().max()) < 1e-12
    poisoned = [stack.clone() for stack in stacks]
    poisoned[1][2, 0, 0] = torch.nan
    struck = orthogonalise(poisoned, SCHEDULES["muon"])
    assert bool(struck[1][2].isnan().all())
    struck[1][2] = together[1][2]
    assert all(torch.equal(a, b) for a, b in zip(struck, together, strict=True))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-10, 1e10, 1e30])
def test_scale_of_the_matrix_does_not_matter(scale: float) -> None:
    x = matrices(16, 64, 10.0).to(torch.float32)
    assert torch.allclose(newton_schulz(x * scale), newton_schulz(x), atol=1e-4)


def test_zero_stays_zero() -> None:
    assert bool((newton_schulz(torch.zeros(2, 4, 6, dtype=torch.float32)) == 0).all())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
    ids=str,
)
def test_works_in_at_least_float32(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert newton_schulz(matrices(4, 6).to(dtype)).dtype == expected


def test_slots_side_by_side_equal_solo_runs() -> None:
    stacks = [torch.stack([matrices(*size, 10.0**power) for power in (0, 1, 2)]) for size in SIZES]
    together = torch.func.vmap(lambda *members: tuple(orthogonalise(members, SCHEDULES["muon"])))(*stacks)
    for slot in range(3):
        alone = orthogonalise([stack[slot] for stack in stacks], SCHEDULES["muon"])
        for a, b in zip(together, alone, strict=True):
            assert torch.allclose(a[slot], b, rtol=0, atol=1e-12)


def test_tall_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"found shape \(1, 6, 4\), allowed: rows <= cols"):
        newton_schulz(torch.zeros(1, 6, 4, dtype=torch.float32))


@pytest.mark.parametrize("setting", ["none", "ieee", "tf32"])
def test_leaves_the_precision_of_products_as_it_was(setting: str) -> None:
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = setting
    try:
        newton_schulz(matrices(4, 6).to(torch.float32))
        assert switch.fp32_precision == setting
    finally:
        switch.fp32_precision = before
