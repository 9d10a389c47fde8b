from __future__ import annotations

import math

import pytest
import torch

from tunebench.optim.clipping import clip_by_global_norm


def gradients(scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Two segments of unlike dtype."""
    generator = torch.Generator().manual_seed(0)
    draws = {dtype: torch.randn(50, generator=generator, dtype=torch.float64) for dtype in ("float32", "float64")}
    return {name: (scale * draw).to(getattr(torch, name)) for name, draw in draws.items()}


def clipped(grads: dict[str, torch.Tensor], limit: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    return clip_by_global_norm(grads, torch.tensor(limit, dtype=torch.float64))


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1.0, 9.0, 100.0, math.inf])
def test_equals_torch(limit: float) -> None:
    grads = {name: grad.to(torch.float64) for name, grad in gradients().items()}
    views = {name: torch.nn.Parameter(torch.zeros_like(grad)) for name, grad in grads.items()}
    for name, view in views.items():
        view.grad = grads[name].clone()
    expected = torch.nn.utils.clip_grad_norm_(views.values(), limit)
    found, norm = clipped(grads, limit)
    assert float(norm) == pytest.approx(float(expected), rel=1e-15)
    for name, view in views.items():
        torch.testing.assert_close(found[name], view.grad, rtol=1e-14, atol=0)


def test_one_norm_for_all_dtypes_which_each_segment_keeps() -> None:
    grads = gradients()
    found, norm = clipped(grads, 1.0)
    assert float(norm) == pytest.approx(math.sqrt(sum(float(g.double().square().sum()) for g in grads.values())))
    assert {name: grad.dtype for name, grad in found.items()} == {name: grad.dtype for name, grad in grads.items()}
    assert float(clipped(found, 1.0)[1]) == pytest.approx(1.0, rel=1e-6)


def test_gradients_within_the_limit_stay_bit_for_bit() -> None:
    grads = gradients()
    found, _ = clipped(grads, 1e3)
    assert all(torch.equal(found[name], grad) for name, grad in grads.items())


def test_squares_beyond_float32_are_no_infinity() -> None:
    found, norm = clipped(gradients(1e30), 1.0)
    assert math.isfinite(float(norm))
    assert float(clipped(found, 1.0)[1]) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_passed_on(value: float) -> None:
    grads = gradients()
    grads["float32"][3] = value
    found, norm = clipped(grads, 1.0)
    assert not math.isfinite(float(norm))
    assert bool(found["float32"][3].isnan())


def test_slots_are_clipped_by_their_own_norm_and_limit() -> None:
    grads = {name: torch.stack([grad, 10 * grad, grad]) for name, grad in gradients().items()}
    limits = torch.tensor([1.0, 1.0, 100.0], dtype=torch.float64)
    found, norms = torch.func.vmap(clip_by_global_norm)(grads, limits)
    for slot, limit in enumerate(limits):
        alone, norm = clip_by_global_norm({name: grad[slot] for name, grad in grads.items()}, limit)
        assert float(norms[slot]) == pytest.approx(float(norm), rel=1e-14)
        for name, grad in alone.items():
            torch.testing.assert_close(found[name][slot], grad, rtol=1e-6, atol=0)
