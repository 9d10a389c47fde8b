from __future__ import annotations

import math

import pytest
import torch
from nequip.train.muon import muon_update

from tests.optim.rules.conftest import (
    BLOCKS,
    MUON,
    Run,
    by_matrix,
    difference,
    losses_of_reference,
    losses_of_rule,
    noise,
    packing,
    reference_run,
    rule_run,
    tensors,
    weights,
)
from tunebench.optim.blocks import Block, View
from tunebench.optim.packing import Packing, Tensors
from tunebench.optim.rules.muon import Muon, Scale

TORCH_NAMES = {Scale.KELLER: "original", Scale.MATCH_RMS_ADAMW: "match_rms_adamw"}
HYPER = {**MUON, "weight_decay": 0.1, "aux_weight_decay": 0.2}


class Reference:
    """torch.optim.Muon on (out, in) matrices and AdamW on the rest."""

    def __init__(self, views: list[torch.nn.Parameter], scale: Scale, nesterov: bool) -> None:
        self.optimizers = [
            torch.optim.Muon(
                [view for view in views if view.ndim == 2],
                lr=1e-2,
                weight_decay=0.1,
                momentum=0.95,
                nesterov=nesterov,
                adjust_lr_fn=TORCH_NAMES[scale],
            ),
            torch.optim.AdamW(
                [view for view in views if view.ndim == 1], lr=5e-3, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.2
            ),
        ]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def moved(params: Tensors, grads: Tensors, blocks: list[Block], scale: Scale = Scale.MATCH_RMS_ADAMW) -> Tensors:
    """What one step subtracts from each weight per unit of learning rate."""
    muon = Muon(Packing(params, blocks), scale=scale)
    packed = muon.packing.pack(params)
    hyper = tensors({**MUON, "learning_rate": 1.0, "weight_decay": 0.0})
    new, _ = muon.update(muon.packing.pack(grads), muon.init(packed), packed, hyper, torch.tensor(1))
    return {name: params[name] - w for name, w in muon.packing.unpack(new).items()}


@pytest.mark.parametrize("scale", list(Scale))
@pytest.mark.parametrize("nesterov", [False, True])
def test_follows_torch_muon_in_full_precision(scale: Scale, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # torch casts to bfloat16 in all cases; a copy in place of the cast gives its trajectory in float64.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    params = weights()
    expected = reference_run(lambda views: Reference(views, scale, nesterov), params, by_matrix(BLOCKS), 100)
    found = rule_run(Muon(packing(params), nesterov, scale), params, HYPER, 100)
    assert difference(found, expected) < 1e-9


@pytest.mark.parametrize("scale", list(Scale))
def test_one_step_is_torch_muon_to_its_bfloat16(scale: Scale) -> None:
    params = weights()
    expected = reference_run(lambda views: Reference(views, scale, True), params, by_matrix(BLOCKS), 1)
    found = rule_run(Muon(packing(params), scale=scale), params, HYPER, 1)
    assert 1e-6 < difference(found, expected) < 1e-3


@pytest.mark.parametrize("scale", list(Scale))
def test_learns_as_torch_does_in_float32(scale: Scale) -> None:
    class Transposed(Reference):
        """The reference on (in, out) weights: it works on transposed copies and writes them back."""

        def __init__(self, views: list[torch.nn.Parameter]) -> None:
            self.views = views
            copies = [view.detach().mT.contiguous() if view.shape[1] > 1 else view.detach()[:, 0] for view in views]
            self.copies = [torch.nn.Parameter(copy.clone()) for copy in copies]
            super().__init__(self.copies, scale, True)

        def step(self) -> None:
            for view, copy in zip(self.views, self.copies, strict=True):
                assert view.grad is not None
                copy.grad = view.grad.mT.contiguous().reshape(copy.shape)
            super().step()
            for view, copy in zip(self.views, self.copies, strict=True):
                view.data = copy.detach().mT.clone() if copy.ndim == 2 else copy.detach().clone().unsqueeze(1)

    ours = losses_of_rule(lambda packing: Muon(packing, scale=scale), HYPER)
    theirs = losses_of_reference(Transposed)
    assert ours[-1] < 0.5 * ours[0]
    assert sum(ours) == pytest.approx(sum(theirs), rel=0.05)


@pytest.mark.parametrize(("shape", "factor"), [((8, 64), math.sqrt(8)), ((192, 32), 1.0), ((64, 480), math.sqrt(7.5))])
def test_keller_scale_is_out_over_in_where_nequip_takes_in_over_out(shape: tuple[int, int], factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(shape, generator=generator, dtype=torch.float32)
    params = {"mlp": torch.zeros(shape, dtype=torch.float32)}
    ours = moved(params, {"mlp": grad}, [Block.whole("mlp", shape, View.MATRIX)], scale=Scale.KELLER)["mlp"]
    theirs = muon_update(grad.clone(), torch.zeros_like(grad))
    orthogonal = math.sqrt(min(shape))
    assert float(ours.norm()) == pytest.approx(factor * orthogonal, rel=0.3)
    assert float(theirs.norm()) == pytest.approx(math.sqrt(max(1, shape[0] / shape[1])) * orthogonal, rel=0.3)


@pytest.mark.parametrize("shape", [(8, 64), (64, 8), (32, 32), (48, 20)])
def test_match_rms_scale_gives_updates_of_adams_size(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    grads = {"mlp": torch.randn(shape, generator=generator, dtype=torch.float32)}
    update = moved({"mlp": torch.zeros_like(grads["mlp"])}, grads, [Block.whole("mlp", shape, View.MATRIX)])["mlp"]
    assert float(update.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


@pytest.mark.parametrize("view", [View.MERGED, View.PER_TYPE])
def test_orthogonalises_the_matrices_of_the_view(view: View) -> None:
    grad = weights()["sc"][24:].reshape(4, 3, 5)
    params = {"sc": torch.zeros(60, dtype=torch.float64)}
    blocks = [Block.slice("sc", "1o", 0, (4, 3, 5), view)]
    update = moved(params, {"sc": grad.reshape(-1)}, blocks)["sc"].reshape(4, 3, 5)
    found = [update.reshape(12, 5)] if view is View.MERGED else list(update.unbind(1))
    for matrix in found:
        values = torch.linalg.svdvals(matrix) / (0.2 * math.sqrt(max(matrix.shape)))
        assert 0.5 < float(values.min()) < float(values.max()) < 1.3


@pytest.mark.parametrize("rms", [1e-10, 1e-20, 1e-30])
def test_tiny_gradients_give_full_updates_where_an_absolute_floor_shrinks_them(rms: float) -> None:
    params = weights(torch.float32)
    grads = noise(1.0)(params, 1)
    full = moved(params, grads, BLOCKS)
    tiny = moved(params, {name: grad * rms for name, grad in grads.items()}, BLOCKS)
    matrices = [name for name in params if name not in ("readout", "scales")]
    assert difference({n: tiny[n] for n in matrices}, {n: full[n] for n in matrices}) < 1e-4
    theirs = muon_update(grads["mlp.0"] * rms, torch.zeros_like(grads["mlp.0"]))
    assert float(theirs.norm()) < 0.8 * float(muon_update(grads["mlp.0"], torch.zeros_like(grads["mlp.0"])).norm())


def test_momentum_of_bfloat16_weights_is_the_average_of_gradients_where_torch_overwrites_it() -> None:
    grad = weights()["mlp.0"].to(torch.bfloat16)
    view = torch.nn.Parameter(torch.zeros_like(grad))
    view.grad = grad.clone()
    theirs: torch.optim.Optimizer = torch.optim.Muon([view], lr=1e-2, momentum=0.9, nesterov=False)
    theirs.step()
    rule = Muon(Packing({"mlp": grad}, [Block.whole("mlp", (5, 8), View.MATRIX)]), nesterov=False)
    run = Run.start(rule, {"mlp": torch.zeros_like(grad)})
    run = run.train(rule, {**HYPER, "momentum": 0.9}, 1, lambda params, step: {"mlp": grad})
    momentum = rule.packing.unpack({name.removeprefix("momentum/"): w for name, w in run.state.items()})["mlp"]
    expected = 0.1 * grad.to(torch.float64)
    assert torch.allclose(momentum.to(torch.float64), expected, rtol=1e-2)
    assert not torch.allclose(theirs.state[view]["momentum_buffer"].to(torch.float64), expected, rtol=1e-2)
    assert run.params[rule.packing.segments[0].name].dtype == torch.bfloat16


def test_the_gradient_is_left_as_it_was_where_nequip_overwrites_it() -> None:
    params = weights()
    grads = noise(1.0)(params, 1)
    before = {name: grad.clone() for name, grad in grads.items()}
    moved(params, grads, BLOCKS)
    assert difference(grads, before) == 0.0
    muon_update(grads["mlp.0"], torch.zeros_like(grads["mlp.0"]))
    assert difference(grads, before) > 1e-2


def test_vectors_follow_adamw_at_their_own_learning_rate() -> None:
    params = {name: weights()[name] for name in ("mlp.0", "scales")}
    halved = rule_run(Muon(packing(params)), params, {**MUON, "aux_weight_decay": 0.0}, 1)
    full = rule_run(Muon(packing(params)), params, {**MUON, "aux_weight_decay": 0.0, "aux_learning_rate_ratio": 1.0}, 1)
    step = {"full": full["scales"] - params["scales"], "half": halved["scales"] - params["scales"]}
    assert torch.allclose(step["full"].abs(), torch.tensor(1e-2, dtype=torch.float64))
    assert torch.allclose(step["half"].abs(), torch.tensor(5e-3, dtype=torch.float64))
    assert torch.equal(full["mlp.0"], halved["mlp.0"])
