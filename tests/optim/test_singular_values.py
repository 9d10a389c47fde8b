from __future__ import annotations

import pytest
import torch

from tunebench.optim.singular_values import square_root


def matrices(values: torch.Tensor, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices with these singular values, and with their square roots."""
    generator = torch.Generator().manual_seed(rows * cols)
    left = torch.linalg.qr(torch.randn(2, rows, rows, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(2, cols, rows, generator=generator, dtype=torch.float64)).Q.mT
    return (left * values) @ right, (left * values.sqrt()) @ right


def unit(x: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
    return x / norm


@pytest.mark.parametrize(("rows", "cols"), [(1, 7), (5, 5), (8, 64), (40, 41)])
def test_takes_the_roots_that_svd_takes(rows: int, cols: int) -> None:
    x, _ = matrices(torch.linspace(0.2, 3.0, rows, dtype=torch.float64), rows, cols)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close(unit(square_root([x])[0]), unit((u * s.sqrt().unsqueeze(-2)) @ vh), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("spread", "error"), [(-3, 1e-11), (-6, 1e-5), (-9, 1e-3), (-300, 1e-3)])
def test_small_singular_values_come_out_small(spread: int, error: float) -> None:
    x, expected = matrices(torch.logspace(0, spread, 24, dtype=torch.float64), 24, 48)
    assert float((unit(square_root([x])[0]) - unit(expected)).abs().max()) < error


def test_stacks_of_unlike_shape_and_dtype_do_not_mix() -> None:
    wide, _ = matrices(torch.linspace(1, 2, 6, dtype=torch.float64), 6, 30)
    high, _ = matrices(torch.linspace(1, 2, 28, dtype=torch.float64), 28, 30)
    together = square_root([wide, high.to(torch.float32)])
    torch.testing.assert_close(together[0], square_root([wide])[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(together[1], square_root([high.to(torch.float32)])[0], rtol=0, atol=1e-7)
    assert [x.dtype for x in together] == [torch.float64, torch.float32]


def test_zero_stays_zero_and_nan_spares_its_neighbours() -> None:
    x, _ = matrices(torch.linspace(1, 2, 4, dtype=torch.float64), 4, 9)
    stack = torch.cat([x, torch.zeros_like(x), torch.full_like(x, torch.nan)])
    roots = square_root([stack])[0]
    assert torch.equal(roots[:2], square_root([x])[0])
    assert (roots[2:4] == 0).all()
    assert roots[4:].isnan().all()
