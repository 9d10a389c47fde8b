"""What holds for every update rule, see `CASES` in conftest.py."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping

import pytest
import torch

from tests.optim.rules.conftest import (
    BLOCKS,
    CASES,
    Case,
    Run,
    Settings,
    constant,
    difference,
    noise,
    noisy_bowl,
    packing,
    rule_run,
    tensors,
    train_slots,
    weights,
)
from tunebench.optim.packing import Packing, Tensors
from tunebench.optim.rule import Phase, UpdateRule

ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def built(case: Case, params: Tensors) -> UpdateRule:
    return case.build(packing(params))


def slot_settings(case: Case) -> list[Settings]:
    """Three slots that differ in every hyperparameter a slot may differ in."""
    changes = {"learning_rate": 3.0, "weight_decay": 2.0, "beta1": 0.9, "beta2": 0.95, "momentum": 0.9, "eps": 10.0}
    return [{name: value * changes.get(name, 1.0) ** power for name, value in case.hyper.items()} for power in range(3)]


@ALL
def test_slots_side_by_side_equal_solo_runs(case: Case) -> None:
    rule = built(case, weights())
    hypers = slot_settings(case)
    # Slots are in different steps, as when trials join a cohort one after the other.
    slots = [Run.start(rule, weights()).train(rule, hyper, late) for hyper, late in zip(hypers, (0, 3, 7), strict=True)]
    solos = list(slots)
    for _ in range(8):
        slots = train_slots(rule, slots, hypers, noisy_bowl)
        solos = [solo.train(rule, hyper, 1) for solo, hyper in zip(solos, hypers, strict=True)]
        for slot, solo in zip(slots, solos, strict=True):
            assert difference(slot.params, solo.params) <= (0.0 if case.elementwise else case.slots)
    assert difference(slots[0].params, slots[1].params) > 1e-3


@ALL
def test_resumes_bit_for_bit_at_every_step(case: Case) -> None:
    rule = built(case, weights())
    whole = Run.start(rule, weights()).train(rule, case.hyper, 10)
    for stop in range(10):
        part = Run.start(rule, weights()).train(rule, case.hyper, stop)
        file = io.BytesIO()
        torch.save({"params": part.params, "state": part.state}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        resumed = Run(loaded["params"], loaded["state"], stop).train(rule, case.hyper, 10 - stop)
        assert difference(resumed.params, whole.params) == 0.0
        assert difference(resumed.state, whole.state) == 0.0


@ALL
def test_order_of_parameters_and_blocks_does_not_matter(case: Case) -> None:
    params = weights()
    turned = dict(reversed(params.items()))
    expected = rule_run(case.build(Packing(params, BLOCKS)), params, case.hyper, 6)
    found = rule_run(case.build(Packing(turned, BLOCKS[::-1])), turned, case.hyper, 6)
    assert difference(found, expected) == 0.0


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_zero_gradients_move_nothing_and_leave_no_nan(case: Case, dtype: torch.dtype) -> None:
    rule = built(case, weights(dtype))
    smallest = {name: 1e-15 for name in case.hyper if name.endswith("eps")}
    still = {name: 0.0 for name in case.hyper if name.endswith("weight_decay")}
    hyper = {**case.hyper, **smallest, **still}
    start = Run.start(rule, weights(dtype))
    asleep = start.train(rule, hyper, 6, constant(0.0))
    assert difference(asleep.params, start.params) == 0.0
    awake = asleep.train(rule, hyper, 6)
    assert all(w.isfinite().all() for w in awake.params.values())
    assert difference(awake.params, start.params) > 1e-3


@ALL
def test_a_slot_with_nan_gradients_spares_its_neighbours(case: Case) -> None:
    rule = built(case, weights())
    slots = [Run.start(rule, weights())] * 3
    healthy = [Run.start(rule, weights())] * 3
    for number in range(1, 7):
        numbers = iter(range(3))

        def poisoned(params: Tensors, step: int, slot: Iterator[int] = numbers, number: int = number) -> Tensors:
            bad = next(slot) == 1 and number > 2
            return {name: g * torch.nan if bad else g for name, g in noisy_bowl(params, step).items()}

        slots = train_slots(rule, slots, [case.hyper] * 3, poisoned)
        healthy = train_slots(rule, healthy, [case.hyper] * 3, noisy_bowl)
    for slot in (0, 2):
        assert difference(slots[slot].params, healthy[slot].params) == 0.0
    assert any(w.isnan().any() for w in slots[1].params.values())


@ALL
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gradients_that_are_not_finite_raise_nothing(case: Case, value: float) -> None:
    rule = built(case, weights())
    run = Run.start(rule, weights()).train(rule, case.hyper, 6).train(rule, case.hyper, 6, constant(value))
    assert not all(w.isfinite().all() for w in run.params.values())


@ALL
@pytest.mark.parametrize("scale", [1e30, 1e-20])
def test_huge_and_tiny_gradients_leave_no_nan(case: Case, scale: float) -> None:
    rule = built(case, weights(torch.float32))
    run = Run.start(rule, weights(torch.float32)).train(rule, case.hyper, 6).train(rule, case.hyper, 6, noise(scale))
    assert all(w.isfinite().all() for w in run.params.values())


@ALL
def test_a_float64_parameter_inside_a_float32_model_keeps_its_precision(case: Case) -> None:
    double = ("mlp.1", "scales")
    single = tuple(name for name in weights() if name not in double)
    mixed = weights(torch.float32, single) | weights(torch.float64, double)
    found = rule_run(built(case, mixed), mixed, case.hyper, 8)
    for names, dtype in ((single, torch.float32), (double, torch.float64)):
        alone = weights(dtype, names)
        expected = rule_run(built(case, alone), alone, case.hyper, 8)
        assert all(found[name].dtype == dtype for name in names)
        assert difference({name: found[name] for name in names}, expected) == 0.0


@ALL
def test_the_default_dtype_changes_nothing(case: Case) -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        with default_dtype(dtype):
            params = weights(torch.float32)
            rule = built(case, params)
            solo = Run.start(rule, params).train(rule, case.hyper, 5)
            slot = train_slots(rule, [solo, solo], [case.hyper] * 2, noisy_bowl)[1]
        results.append({**slot.params, **slot.state})
        assert all(slot.state[name].dtype == solo.state[name].dtype for name in solo.state)
        assert all(weight.dtype == torch.float32 for weight in slot.params.values())
    assert difference(results[1], results[0]) == 0.0


@ALL
def test_a_new_learning_rate_acts_in_the_next_step(case: Case) -> None:
    rule = built(case, weights())
    plain = {**case.hyper, **{name: 0.0 for name in case.hyper if name.endswith("weight_decay")}}
    before = Run.start(rule, weights()).train(rule, plain, 6)

    def moved(factor: float) -> Tensors:
        after = before.train(rule, {**plain, "learning_rate": factor * plain["learning_rate"]}, 1)
        # Schedule-free also moves the trained weights towards its iterate z, and only z at the learning rate.
        keys = [f"z/{name}" for name in before.params]
        old, new = (before.state, after.state) if keys[0] in before.state else (before.params, after.params)
        names = keys if keys[0] in before.state else list(before.params)
        return {name: new[name] - old[name] for name in names}

    once = moved(1.0)
    if case.linear:
        assert difference(moved(3.0), {name: 3.0 * change for name, change in once.items()}) < 1e-9
    assert all((change == 0).all() for change in moved(0.0).values())
    assert all((change != 0).any() for change in once.values())


@pytest.mark.parametrize("case", [c for c in CASES.values() if c.eps], ids=[n for n, c in CASES.items() if c.eps])
def test_rescaling_the_loss_does_not_matter_with_a_small_epsilon(case: Case) -> None:
    rule = built(case, weights())
    params = weights()
    changes = {}
    for eps in (1e-12, 1e-8):
        hyper = {**case.hyper, **case.rescaled, **dict.fromkeys(case.eps, eps)}
        # Gradients of 1e-3 are what blocks of high degree see; the loss is then given in other units.
        ends = [rule_run(rule, params, hyper, 12, noise(scale)) for scale in (1e-3, 1e-7)]
        paths = [{name: end[name] - params[name] for name in params} for end in ends]
        changes[eps] = difference(paths[1], paths[0])
    assert changes[1e-12] < case.rescaling
    assert changes[1e-8] > 0.1


@ALL
def test_changes_nothing_in_place_and_keeps_the_layout_of_its_state(case: Case) -> None:
    rule = built(case, weights())
    run = Run.start(rule, weights()).train(rule, case.hyper, 3)
    before = {name: tensor.clone() for name, tensor in {**run.params, **run.state}.items()}
    after = run.train(rule, case.hyper, 1)
    assert difference({**run.params, **run.state}, before) == 0.0
    initial = Run.start(rule, weights()).state
    for name, tensor in initial.items():
        assert after.state[name].shape == tensor.shape
        assert after.state[name].dtype == tensor.dtype
    assert after.state.keys() == initial.keys()


@ALL
@pytest.mark.parametrize("phase", list(Phase))
def test_never_waits_for_a_value(case: Case, phase: Phase) -> None:
    # Tensors on the meta device have no values: whatever branches on one, or copies it to the host, raises.
    rule = built(case, weights())
    params = {name: w.to("meta") for name, w in rule.packing.pack(weights()).items()}
    hyper = {name: value.to("meta") for name, value in tensors(case.hyper).items()}
    step = torch.zeros((), dtype=torch.int64, device="meta")
    new, _ = rule.update(dict(params), rule.init(params), params, hyper, step, phase)
    assert {name: w.shape for name, w in new.items()} == {name: w.shape for name, w in params.items()}


class Recorded(Mapping[str, torch.Tensor]):
    """Hyperparameters that remember which of them were read."""

    def __init__(self, values: Tensors) -> None:
        self._values = values
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@ALL
def test_reads_the_hyperparameters_it_declares(case: Case) -> None:
    rule = built(case, weights())
    assert set(case.hyper) == set(rule.hyperparameters)
    hyper = Recorded(tensors(case.hyper))
    packed = rule.packing.pack(weights())
    rule.update(packed, rule.init(packed), packed, hyper, torch.tensor(1, dtype=torch.int64), Phase.START)
    assert hyper.read == set(rule.hyperparameters)
