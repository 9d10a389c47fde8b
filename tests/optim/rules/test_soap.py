from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar
from unittest import mock

import pytest
import pytorch_optimizer
import torch

from tests.optim.rules.conftest import (
    BLOCKS,
    SOAP,
    Run,
    by_block,
    by_matrix,
    constant,
    difference,
    draw,
    losses_of_reference,
    losses_of_rule,
    noisy_bowl,
    packing,
    reference_run,
    rule_run,
    train_slots,
    weights,
)
from tests.optim.rules.naive_soap import NaiveSoap
from tunebench.optim.blocks import Block, View
from tunebench.optim.eigenbasis import eigenbasis
from tunebench.optim.factors import Sides
from tunebench.optim.packing import Packing, Tensors
from tunebench.optim.rule import Phase
from tunebench.optim.rules.soap import Basis, Soap

TEN = {**SOAP, "precondition_frequency": 10}
VECTORS = [position for position, block in enumerate(BLOCKS) if not block.is_matrix]

# As in the library, which has one set of betas, and (u, v, w) read as one matrix, since it would rotate v as well.
LIKE_THE_LIBRARY = {**TEN, "shampoo_beta": 0.95, "aux_learning_rate_ratio": 1.0, "aux_beta2": 0.95}
LIKE_THE_LIBRARY |= {"aux_weight_decay": 1e-2}
FLAT_BLOCKS = [
    block if block.view is not View.PER_TYPE else Block.slice("sc", "1o", 24, (4, 3, 5), View.MERGED)
    for block in BLOCKS
]


@pytest.fixture(autouse=True, params=["LAPACK", "products"])
def orthonormalised_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds for the way of the CPU and for that of a GPU."""
    if request.param == "products":
        monkeypatch.setattr("tunebench.optim.eigenbasis._LAPACK_ON", set())


class DoubleSoap(pytorch_optimizer.SOAP):
    """The library's SOAP, entirely in the weights' precision and with a definite basis of the first null space."""

    refreshes = 0

    @staticmethod
    def get_orthogonal_matrix(mat: Any) -> list[Any]:
        return [m if len(m) == 0 else eigenbasis(m) for m in mat]

    def get_orthogonal_matrix_qr(self, state: Any, max_precondition_dim: int = 10000, merge_dims: bool = False) -> Any:
        self.refreshes += 1
        # The library casts what it decomposes to float32.
        with mock.patch.object(torch.Tensor, "to", lambda tensor, dtype: tensor):
            return super().get_orthogonal_matrix_qr(state, max_precondition_dim, merge_dims)


Kind = TypeVar("Kind", bound=pytorch_optimizer.SOAP)


def library_soap(kind: type[Kind], views: Sequence[torch.Tensor], eps: float = 1e-12) -> Kind:
    return kind(views, lr=1e-2, betas=(0.9, 0.95), eps=eps, weight_decay=1e-2, precondition_frequency=10)


def frozen_basis(run: Run) -> Tensors:
    return {name: tensor for name, tensor in run.state.items() if name.startswith("basis/")}


def changes_of_basis(rule: Soap, run: Run, hyper: dict[str, float], steps: int) -> tuple[Run, list[int]]:
    """The run so many steps later, and the steps in which its bases changed."""
    changed = []
    for _ in range(steps):
        after = run.train(rule, hyper, 1)
        if difference(frozen_basis(after), frozen_basis(run)) > 0:
            changed.append(after.steps)
        run = after
    return run, changed


def test_reproduces_the_library_in_float64_over_ten_refreshes() -> None:
    params = weights()
    built: list[DoubleSoap] = []

    def build(views: list[torch.nn.Parameter]) -> DoubleSoap:
        built.append(library_soap(DoubleSoap, views))
        return built[0]

    expected = reference_run(build, params, by_matrix(FLAT_BLOCKS), 101)
    found = rule_run(Soap(Packing(params, FLAT_BLOCKS)), params, LIKE_THE_LIBRARY, 101)
    assert built[0].refreshes == 10 * len(FLAT_BLOCKS)
    assert difference(found, expected) < 1e-9


@pytest.mark.parametrize(
    ("settings", "naive"),
    [
        ({}, {}),
        ({"basis": Basis.CURRENT}, {"current": True}),
        ({"basis_warmup_steps": 4}, {"warmup": 4}),
        ({"max_precondition_dim": 5}, {"rotated": lambda m, n: (m <= 5, n <= 5)}),
        ({"sides": Sides.ONE}, {"rotated": lambda m, n: (m <= n, n < m)}),
    ],
    ids=["published", "current basis", "warm-up", "largest dimension", "one side"],
)
def test_reproduces_soap_word_for_word_in_every_view(settings: dict[str, object], naive: dict[str, object]) -> None:
    params = weights()
    built: list[NaiveSoap] = []

    def build(views: list[torch.nn.Parameter]) -> NaiveSoap:
        built.append(NaiveSoap(views, TEN, vectors=VECTORS, **naive))  # type: ignore[arg-type]
        return built[0]

    expected = reference_run(build, params, by_block(), 101)
    found = rule_run(Soap(packing(params), **settings), params, TEN, 101)  # type: ignore[arg-type]
    assert built[0].refreshes >= 10
    # The factor of eight columns of this (8, 1) block is rank-deficient during a warm-up, where plain QR is arbitrary.
    thin = slice(88, 96) if "warmup" in naive else slice(0, 0)
    expected["linear"][thin], found["linear"][thin] = 0, 0
    assert difference(found, expected) < 1e-9


def test_the_settings_of_the_basis_all_matter() -> None:
    params = weights()
    rules = [
        Soap(packing(params), basis_warmup_steps=warmup, max_precondition_dim=dim, sides=sides, basis=basis)
        for warmup, dim, sides, basis in (
            (0, 100, Sides.TWO, Basis.PAST),
            (4, 100, Sides.TWO, Basis.PAST),
            (0, 5, Sides.TWO, Basis.PAST),
            (0, 100, Sides.ONE, Basis.PAST),
            (0, 100, Sides.TWO, Basis.CURRENT),
        )
    ]
    ends = [rule_run(rule, params, TEN, 12) for rule in rules]
    assert all(difference(end, ends[0]) > 1e-3 for end in ends[1:])


class FlatReadout:
    """The library's SOAP on the regression network with its (6, 1) readout as the vector it is to the rule."""

    def __init__(self, views: Sequence[torch.nn.Parameter], eps: float) -> None:
        self.views = views
        self.own = [torch.nn.Parameter(torch.empty(v.squeeze(-1).shape, dtype=v.dtype)) for v in views]
        self.optimizer = library_soap(pytorch_optimizer.SOAP, self.own, eps)

    def step(self) -> None:
        for view, own in zip(self.views, self.own, strict=True):
            assert view.grad is not None
            own.data, own.grad = view.detach().reshape(own.shape).clone(), view.grad.reshape(own.shape)
        self.optimizer.step()
        for view, own in zip(self.views, self.own, strict=True):
            view.data = own.detach().reshape(view.shape)


def test_the_loss_falls_as_with_the_library_in_float32() -> None:
    expected = losses_of_reference(lambda views: FlatReadout(views, 1e-5))
    found = losses_of_rule(lambda packing: Soap(packing), {**LIKE_THE_LIBRARY, "eps": 1e-5, "aux_eps": 1e-5})
    assert found[:10] == pytest.approx(expected[:10], rel=1e-2)  # the library's bases in float32 differ by machine
    assert found[-1] < 0.1 * found[0]
    assert sum(found) == pytest.approx(sum(expected), rel=0.05)


def test_a_small_epsilon_does_not_drive_weights_along_round_off_of_the_null_space() -> None:
    # Without noise in the gradients, all that the null space of the first factor sees is round-off, which Adam brings
    # to full size. What libraries make of it in float32 can treble the loss, on some machines.
    losses = losses_of_rule(lambda packing: Soap(packing), LIKE_THE_LIBRARY)
    assert max(losses) < 1.2 * losses[0]


def test_float32_follows_float64_along_the_smallest_eigenvalues_that_count() -> None:
    # Singular values down to 2e-3 of the largest, eigenvalues to 4e-6: 1e-6 would be undefined, and the round-off of a
    # factor in float32 is 1e-7. Every step is as long along the smallest as along the largest.
    def stretched(params: Tensors, step: int) -> Tensors:
        generator = torch.Generator().manual_seed(step)
        sides = torch.linalg.qr(torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)).Q
        drawn = (sides[0] * torch.logspace(0, -2.7, 8, dtype=torch.float64)) @ sides[1]
        return {name: drawn.to(w.dtype) for name, w in params.items()}

    ends = []
    for dtype in (torch.float32, torch.float64):
        start = {"square": torch.zeros(8, 8, dtype=dtype)}
        rule = Soap(Packing(start, [Block.whole("square", (8, 8), View.MATRIX)]))
        ends.append(rule_run(rule, start, TEN, 2, stretched)["square"].to(torch.float64))
    assert float((ends[0] - ends[1]).abs().max()) < 1e-5 * TEN["learning_rate"]


def test_the_first_step_sets_up_bases_and_moves_nothing() -> None:
    rule = Soap(packing(weights()))
    start = Run.start(rule, weights())
    first = start.train(rule, TEN, 1)
    assert difference(first.params, start.params) == 0.0
    assert all((first.state[f"exp_avg_sq/{name}"] == 0).all() for name in start.params)
    assert difference(frozen_basis(first), frozen_basis(start)) > 0.1
    assert difference(first.train(rule, TEN, 1).params, start.params) > 1e-3


def test_the_first_update_of_an_unrotated_rule_is_adams_sign_step() -> None:
    rule = Soap(packing(weights()), max_precondition_dim=0)
    hyper = {**TEN, "weight_decay": 0.0, "aux_weight_decay": 0.0}
    run = Run.start(rule, weights()).train(rule, hyper, 1)
    assert not frozen_basis(run)
    after = run.train(rule, hyper, 1)
    # From the second gradient alone: (1 - b1) g / sqrt((1 - b2) g^2), times sqrt(1 - b2) / (1 - b1).
    sizes = {name: (after.params[name] - run.params[name]).abs() for name in run.params}
    torch.testing.assert_close(sizes["matrix float64"], torch.full_like(sizes["matrix float64"], 1e-2))
    torch.testing.assert_close(sizes["auxiliary float64"], torch.full_like(sizes["auxiliary float64"], 5e-3))


def test_a_new_frequency_takes_effect_at_once() -> None:
    rule = Soap(packing(weights()))
    run, changed = changes_of_basis(rule, Run.start(rule, weights()), TEN, 12)
    assert changed == [1, 11]
    run, changed = changes_of_basis(rule, run, {**TEN, "precondition_frequency": 2}, 6)
    assert changed == [13, 15, 17]
    _, changed = changes_of_basis(rule, run, {**TEN, "precondition_frequency": 5}, 10)
    assert changed == [21, 26]


def test_groups_keep_their_own_frequency() -> None:
    names = ("mlp.0", "mlp.1")
    rules = [Soap(packing(weights(names=[name]))) for name in names]
    runs = [Run.start(rule, weights(names=[name])) for rule, name in zip(rules, names, strict=True)]
    hypers = [{**TEN, "precondition_frequency": frequency} for frequency in (3, 10)]
    changes = [changes_of_basis(*group, 12)[1] for group in zip(rules, runs, hypers, strict=True)]
    assert changes == [[1, 4, 7, 10], [1, 11]]


def test_the_library_keeps_the_frequency_and_the_factors_decay_it_started_with() -> None:
    parameter = torch.nn.Parameter(draw("mlp.0", 0))
    optimizer = library_soap(DoubleSoap, [parameter])
    for step in range(1, 41):
        parameter.grad = draw("mlp.0", step)
        optimizer.step()
        optimizer.param_groups[0].update(precondition_frequency=2, shampoo_beta=0.5)
    assert optimizer.refreshes == 3
    assert optimizer.state[parameter]["shampoo_beta"] == 0.95


def test_a_new_decay_of_the_factors_takes_effect_at_once() -> None:
    rule = Soap(packing(weights()))
    run = Run.start(rule, weights()).train(rule, TEN, 3)
    stays = run.train(rule, {**TEN, "shampoo_beta": 1.0}, 1)
    factors = [name for name in run.state if name.startswith("factor/")]
    assert all(torch.equal(stays.state[name], run.state[name]) for name in factors)
    assert difference(run.train(rule, {**TEN, "shampoo_beta": 0.5}, 1).params, stays.params) == 0.0


def test_bases_are_refreshed_at_every_step_of_the_warm_up() -> None:
    rule = Soap(packing(weights()), basis_warmup_steps=3)
    _, changed = changes_of_basis(rule, Run.start(rule, weights()), TEN, 12)
    assert changed == [1, 2, 3, 4, 11]


def test_slots_side_by_side_keep_their_own_frequency() -> None:
    rule = Soap(packing(weights()))
    hypers = [{**TEN, "precondition_frequency": f} for f in (2, 3, 10)]
    slots = solos = [Run.start(rule, weights()) for _ in hypers]
    for _ in range(8):
        before = slots
        slots = train_slots(rule, slots, hypers, noisy_bowl)
        solos = [solo.train(rule, hyper, 1) for solo, hyper in zip(solos, hypers, strict=True)]
        for slot, solo, hyper, old in zip(slots, solos, hypers, before, strict=True):
            assert difference(slot.params, solo.params) <= 1e-12
            if rule.phase(slot.steps, hyper) is Phase.PLAIN:
                assert difference(frozen_basis(slot), frozen_basis(old)) == 0.0


def test_a_phase_beyond_what_a_step_needs_changes_nothing() -> None:
    rule = Soap(packing(weights()))
    run = Run.start(rule, weights()).train(rule, TEN, 4)
    plain = run.train(rule, TEN, 1)
    for phase in (Phase.REFRESH, Phase.START):
        with mock.patch.object(Soap, "phase", lambda self, step, hyper, phase=phase: phase):
            more = run.train(rule, TEN, 1)
        assert difference({**more.params, **more.state}, {**plain.params, **plain.state}) == 0.0


def test_dead_blocks_stay_put_beside_live_ones() -> None:
    def half_dead(params: Tensors, step: int) -> Tensors:
        grads = noisy_bowl(params, step)
        grads["mlp.0"] = torch.zeros_like(grads["mlp.0"])
        grads["sc"][24:] = 0
        return grads

    params = weights(torch.float32)
    hyper = {**SOAP, "weight_decay": 0.0, "eps": 1e-15}
    end = rule_run(Soap(packing(params)), params, hyper, 20, half_dead)
    assert torch.equal(end["mlp.0"], params["mlp.0"])
    assert torch.equal(end["sc"][24:], params["sc"][24:])
    assert all(w.isfinite().all() for w in end.values())
    assert difference({"mlp.1": end["mlp.1"]}, {"mlp.1": params["mlp.1"]}) > 1e-2


def test_matrices_of_a_per_type_block_share_their_factors() -> None:
    shape = {"sc": torch.empty(60, dtype=torch.float64)}
    per_type = Soap(Packing(shape, [Block.whole("sc", (4, 3, 5), View.PER_TYPE)]))
    state = Run.start(per_type, {"sc": draw("mlp.0", 0).new_zeros(60)}).train(per_type, SOAP, 1, constant(2.0)).state
    assert state["factor/float64/4"].shape == (1, 4, 4)
    assert state["factor/float64/5"].shape == (1, 5, 5)
    # Three matrices of twos, averaged at 1 - 0.9: 0.1 * 3 * 5 * 2^2.
    torch.testing.assert_close(state["factor/float64/4"], torch.full((1, 4, 4), 6.0, dtype=torch.float64))


def test_factors_are_grouped_by_dimension_over_all_shapes() -> None:
    rule = Soap(packing(weights()))
    state = rule.init(rule.packing.pack(weights()))
    dims = [size for block in BLOCKS if block.is_matrix for size in block.matrices[1:]]
    assert {int(k.split("/")[-1]): v.shape[0] for k, v in state.items() if k.startswith("basis/")} == {
        size: dims.count(size) for size in dims
    }


def test_a_float64_basis_is_exact_where_the_library_rounds_to_float32() -> None:
    rule = Soap(packing(weights()))
    run = Run.start(rule, weights()).train(rule, TEN, 12)
    errors = [float((q.mT @ q - torch.eye(q.shape[-1])).abs().max()) for q in frozen_basis(run).values()]
    assert max(errors) < 1e-13
    parameter = torch.nn.Parameter(draw("mlp.0", 0))
    optimizer = library_soap(pytorch_optimizer.SOAP, [parameter])
    for step in range(1, 13):
        parameter.grad = draw("mlp.0", step)
        optimizer.step()
    rounded = optimizer.state[parameter]["Q"][1]
    assert float((rounded.T @ rounded - torch.eye(8)).abs().max()) > 1e-8


def test_the_host_knows_what_a_step_needs() -> None:
    rule = Soap(packing(weights()), basis_warmup_steps=2)
    phases = [rule.phase(step, {"precondition_frequency": 4.0}) for step in range(1, 10)]
    assert phases == [Phase.START, *[Phase.REFRESH] * 2, Phase.PLAIN, Phase.REFRESH, *[Phase.PLAIN] * 3, Phase.REFRESH]
