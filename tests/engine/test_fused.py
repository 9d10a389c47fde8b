from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config
from torch.func import grad, vmap

from tests.engine.test_functional import batches, build, perturbed
from tests.forked import PROCESSES
from tunebench.engine import fused
from tunebench.engine.divided import Divided
from tunebench.engine.functional import FunctionalModel, functional_model
from tunebench.engine.fused import Disagreement, Evaluate, Fused, LossGradient, Unfused, agrees, fuse, quickest, unfuse
from tunebench.engine.loss import LossWeights, weighted_loss
from tunebench.optim.matrix_view import trainable_parameters

WEIGHTS = LossWeights(energy_per_atom=0.4, forces=0.6, stress=0.0)
SLOTS = 3


@dataclass(frozen=True)
class Slots:
    """Slots that differ in weights, energy scales and shifts, batch and label mask."""

    function: FunctionalModel
    model: Any
    weights: list[dict[str, torch.Tensor]]
    constants: list[dict[str, torch.Tensor]]
    batches: list[dict[str, torch.Tensor]]

    def stacked(self, keys: tuple[str, ...]) -> tuple[dict[str, torch.Tensor], ...]:
        each = [{key: batch[key] for key in keys} for batch in self.batches]
        return tuple(
            {key: torch.stack([one[key] for one in many]) for key in many[0]}
            for many in (self.weights, self.constants, each)
        )

    def eager(self, slot: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Loss, gradients and outputs of NequIP's own model, with autograd."""
        self.model.load_state_dict({**self.weights[slot], **self.constants[slot]}, strict=False)
        self.model.zero_grad()
        batch = self.batches[slot]
        output = self.model({key: value.clone() for key, value in batch.items()})
        loss = weighted_loss(output, batch, WEIGHTS)
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in trainable_parameters(self.model).items()}
        return loss.detach(), gradients, {key: output[key].detach() for key in self.function.outputs}


@pytest.fixture(scope="module", params=["nequip", "allegro"])
def slots(request, prepared_ethanol) -> Slots:
    return make_slots(prepared_ethanol, request.param, "float64")


def make_slots(data, family: str, dtype: str, **arguments) -> Slots:
    model = build(data, family, dtype=dtype, **arguments)
    each = batches(data, count=SLOTS)
    for slot, batch in enumerate(each):
        batch["forces"][batch["batch"] == slot] = float("nan")
    function = functional_model(model, each[0])
    weights, constants = [], []
    for slot in range(SLOTS):
        perturbed(model, slot)
        weights.append({name: parameter.detach().clone() for name, parameter in trainable_parameters(model).items()})
        constants.append({name: function.held[name] * (1.0 + 0.1 * slot) for name in function.slot_constants})
    return Slots(function, model, weights, constants, each)


def assert_same(found: torch.Tensor, expected: torch.Tensor, rtol: float) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * float(expected.abs().max()))


def test_every_slot_has_the_loss_and_gradient_of_its_own_model_batch_and_mask(slots):
    function = LossGradient(slots.function, WEIGHTS)
    inputs = slots.stacked(function.batch_keys)
    for form in (function, unfuse(function, inputs)):
        losses, gradients = form(*inputs)
        for slot in range(SLOTS):
            loss, expected, _ = slots.eager(slot)
            assert_same(losses[slot], loss, 1e-12)
            for name, gradient in expected.items():
                assert_same(gradients[name][slot], gradient, 1e-9)


@pytest.mark.parametrize("per_slot", [False, True])
def test_every_slot_predicts_on_one_batch_for_all_or_on_its_own(slots, per_slot):
    function = Evaluate(slots.function, batch_per_slot=per_slot)
    weights, constants, stacked = slots.stacked(function.batch_keys)
    shared = {key: slots.batches[0][key] for key in function.batch_keys}
    inputs = (weights, constants, stacked if per_slot else shared)
    for form in (function, unfuse(function, inputs)):
        outputs = form(*inputs)
        for slot in range(SLOTS):
            chosen = replace(slots, batches=slots.batches if per_slot else [slots.batches[0]] * SLOTS)
            _, _, expected = chosen.eager(slot)
            for key, value in expected.items():
                assert_same(outputs[key][slot], value, 1e-12)


def test_a_diverged_slot_leaves_the_others_bit_for_bit_alone(slots):
    function = LossGradient(slots.function, WEIGHTS)
    weights, constants, batch = slots.stacked(function.batch_keys)
    form = unfuse(function, (weights, constants, batch))
    broken = {name: value.clone() for name, value in weights.items()}
    for value in broken.values():
        value[1] = float("nan")
    losses, gradients = form(weights, constants, batch)
    found_losses, found = form(broken, constants, batch)
    assert not torch.equal(found_losses[1], losses[1])
    for slot in (0, 2):
        assert torch.equal(found_losses[slot], losses[slot])
        assert all(torch.equal(found[name][slot], gradients[name][slot]) for name in gradients)


@pytest.mark.parametrize(("family", "arguments"), [("nequip", {"num_layers": 1}), ("allegro", {})])
def test_the_compiled_gradient_is_the_eager_one_and_its_cache_replaces_trace_and_compilation(
    prepared_ethanol, tmp_path, monkeypatch, family, arguments
):
    slots = make_slots(prepared_ethanol, family, "float32", **arguments)
    function = LossGradient(slots.function, WEIGHTS)
    inputs = slots.stacked(function.batch_keys)
    compiled = fuse(function, inputs, tmp_path)
    assert isinstance(compiled, Fused)
    assert compiled.difference < 1e-5
    losses, gradients = compiled(*inputs)
    for slot in range(SLOTS):
        loss, expected, _ = slots.eager(slot)
        assert_same(losses[slot], loss, 1e-5)
        for name, gradient in expected.items():
            assert_same(gradients[name][slot], gradient, 1e-4)

    forbid(monkeypatch, "make_fx", "standalone_compile")
    again = fuse(LossGradient(slots.function, WEIGHTS), inputs, tmp_path)
    assert isinstance(again, Fused)
    assert torch.equal(again(*inputs)[0], losses)


def forbid(monkeypatch, *names: str) -> None:
    for name in names:
        monkeypatch.setattr(fused, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))


def test_a_gradient_compiled_in_parts_is_the_plain_one_and_its_cache_replaces_the_processes(
    prepared_ethanol, tmp_path, monkeypatch
):
    monkeypatch.setattr(fused, "_number_of_parts", lambda *_: 2)
    slots = make_slots(prepared_ethanol, "nequip", "float32", num_layers=1)
    function = LossGradient(slots.function, WEIGHTS)
    inputs = slots.stacked(function.batch_keys)
    compiled = fuse(function, inputs, tmp_path)
    assert isinstance(compiled, Fused)
    assert isinstance(compiled.compiled, Divided)
    assert compiled.difference < 1e-5

    forbid(monkeypatch, "make_fx", "standalone_compile", "compile_at_once")
    again = fuse(LossGradient(slots.function, WEIGHTS), inputs, tmp_path)
    assert isinstance(again, Fused)
    assert isinstance(again.compiled, Divided)
    assert torch.equal(again(*inputs)[0], compiled(*inputs)[0])


def test_parts_that_cannot_be_compiled_leave_a_whole(monkeypatch, tmp_path, caplog):
    def out_of_processes(graphs):
        raise ChildProcessError("exit code -9, no output")

    monkeypatch.setattr(fused, "_number_of_parts", lambda *_: 3)
    monkeypatch.setattr(fused, "compile_at_once", out_of_processes)
    with caplog.at_level(logging.WARNING, logger="tunebench"):
        form = fuse(Quadratic(), quadratic_inputs(), tmp_path)
    assert isinstance(form, Fused)
    assert own_lines(caplog) == ["Quadratic: not compiled in 3 parts, ChildProcessError: exit code -9, no output"]


def test_parts_that_compute_something_else_leave_a_whole_which_is_kept(monkeypatch, tmp_path, caplog):
    class Wrong(Divided):
        def __call__(self, *inputs):
            return [output * 1.001 for output in super().__call__(*inputs)]

    monkeypatch.setattr(fused, "_number_of_parts", lambda *_: 2)
    monkeypatch.setattr(fused, "Divided", Wrong)
    with caplog.at_level(logging.WARNING, logger="tunebench"):
        form = fuse(Quadratic(), quadratic_inputs(), tmp_path)
        forbid(monkeypatch, "standalone_compile", "compile_at_once")
        again = fuse(Quadratic(), quadratic_inputs(), tmp_path)
    assert isinstance(form, Fused)
    assert isinstance(again, Fused)
    (line,) = own_lines(caplog)
    assert "not compiled in 2 parts, Disagreement: relative difference 1.0e-03" in line


def test_a_device_without_room_is_not_asked_twice(monkeypatch, tmp_path):
    def no_room(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fused, "_number_of_parts", lambda *_: 2)
    monkeypatch.setattr(fused, "agrees", no_room)
    forbid(monkeypatch, "standalone_compile")
    form = fuse(Quadratic(), quadratic_inputs(), tmp_path)
    assert isinstance(form, Unfused)
    assert form.reason == "not compiled in 2 parts, OutOfMemoryError: CUDA out of memory"
    assert list(tmp_path.glob("*.inductor"))  # for a start with more room


@dataclass(frozen=True)
class Quadratic:
    """Slots of a small least-squares problem: compiled in a moment."""

    scale: float = 1.0

    @property
    def description(self) -> str:
        return f"quadratic {self.scale}"

    def __call__(self, weights, constants, batch):
        def loss(weights, constants, batch):
            rows = weights["table"][batch["rows"]]
            return (self.scale * rows - constants["target"]).square().sum() + weights["bias"].square().sum()

        return vmap(loss)(weights, constants, batch), vmap(grad(loss))(weights, constants, batch)


def quadratic_inputs(slots: int = 3, rows: int = 4) -> tuple[dict[str, torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(0)
    draw: Callable[..., torch.Tensor] = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float32)  # noqa: E731
    weights = {"table": draw(slots, 5, 2), "bias": draw(slots, 2)}
    batch = {"rows": torch.randint(5, (slots, rows), generator=generator, dtype=torch.int64)}
    return weights, {"target": draw(slots, rows, 2)}, batch


def test_the_order_of_keys_does_not_matter(tmp_path):
    weights, constants, batch = quadratic_inputs()
    form = fuse(Quadratic(), (weights, constants, batch), tmp_path)
    turned = dict(reversed(weights.items()))
    assert isinstance(form, Fused)
    _, expected = form(weights, constants, batch)
    _, found = form(turned, constants, batch)
    assert all(torch.equal(found[name], expected[name]) for name in weights)


def test_a_graph_is_kept_per_function_shape_and_data_type(tmp_path):
    def files() -> int:
        return len(list(tmp_path.glob("*.graph")))

    weights, constants, batch = quadratic_inputs()
    unfuse(Quadratic(), (weights, constants, batch), tmp_path)
    unfuse(Quadratic(), (weights, constants, batch), tmp_path)
    assert files() == 1
    unfuse(Quadratic(scale=2.0), (weights, constants, batch), tmp_path)
    unfuse(Quadratic(), quadratic_inputs(slots=2), tmp_path)
    double = {name: value.to(torch.float64) for name, value in weights.items()}
    unfuse(Quadratic(), (double, constants, batch), tmp_path)
    assert files() == 4


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"", lambda content: content[::-1]])
@pytest.mark.parametrize("kind", ["graph", "inductor"])
def test_a_damaged_file_is_made_anew_and_said(tmp_path, caplog, kind, damage):
    inputs = quadratic_inputs()
    first = fuse(Quadratic(), inputs, tmp_path)
    (file,) = tmp_path.glob(f"*.{kind}")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING, logger="tunebench"):
        again = fuse(Quadratic(), inputs, tmp_path)
    assert f".{kind}: made anew" in caplog.text
    assert isinstance(again, Fused)
    assert agrees(again, first, inputs, 0.0) == 0.0
    caplog.clear()
    assert isinstance(fuse(Quadratic(), inputs, tmp_path), Fused)
    assert not own_lines(caplog)


def own_lines(caplog) -> list[str]:
    """What tunebench logged; torch logs too, to handlers of its own."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("tunebench")]


def fuse_in_a_process(cache: Path) -> tuple[str, list[float]]:
    inputs = quadratic_inputs()
    form = fuse(Quadratic(), inputs, cache)
    return type(form).__name__, form(*inputs)[0].tolist()


def test_processes_that_race_for_one_cache_all_get_the_compiled_function(tmp_path):
    with ProcessPoolExecutor(2, mp_context=PROCESSES) as pool:
        first, second = pool.map(fuse_in_a_process, [tmp_path] * 2)
    assert first == second == ("Fused", fuse_in_a_process(tmp_path)[1])
    assert not list(tmp_path.glob(".*"))


def test_without_a_compiler_the_plain_form_is_returned_with_the_reason_in_one_line(tmp_path, caplog):
    inputs = quadratic_inputs()
    no_compiler = inductor_config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with caplog.at_level(logging.WARNING, logger="tunebench"), no_compiler:
        form = fuse(Quadratic(), inputs, tmp_path)
    assert isinstance(form, Unfused)
    assert form.reason.startswith("not compiled, ")
    assert own_lines(caplog) == [f"Quadratic: {form.reason}"]
    assert "\n" not in form.reason
    assert agrees(form, Quadratic(), inputs, 1e-6) < 1e-6


def test_a_compiled_form_that_differs_is_not_used(monkeypatch, caplog):
    real = fused.standalone_compile

    def wrong(*args, **kwargs):
        compiled = real(*args, **kwargs)
        return lambda *inputs: [output * 1.001 for output in compiled(*inputs)]

    monkeypatch.setattr(fused, "standalone_compile", wrong)
    with caplog.at_level(logging.WARNING, logger="tunebench"):
        form = fuse(Quadratic(), quadratic_inputs())
    assert isinstance(form, Unfused)
    assert "relative difference 1.0e-03" in form.reason
    assert len(own_lines(caplog)) == 1


def test_a_difference_in_one_slot_is_found_however_large_the_others_are():
    expected = torch.tensor([[1e6, 2e6], [1.0, 2.0]], dtype=torch.float64)
    wrong = expected + torch.tensor([[0.0, 0.0], [0.0, 0.02]], dtype=torch.float64)
    with pytest.raises(Disagreement, match=r"1\.0e-02"):
        agrees(lambda: wrong, lambda: expected, (), 1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_finite_in_one_form_only_is_a_difference(value):
    finite = torch.ones(2, 3, dtype=torch.float64)
    broken = finite.clone()
    broken[1, 1] = value
    assert agrees(lambda: broken, lambda: broken.clone(), (), 0.0) == 0.0
    for one, other in ((finite, broken), (broken, finite)):
        with pytest.raises(Disagreement):
            agrees(lambda one=one: one, lambda other=other: other, (), 1e9)


@pytest.mark.parametrize("slow", [Fused, Unfused])
def test_the_faster_form_is_used_and_which_one_it_is_is_kept(slow, monkeypatch, tmp_path):
    timed = []

    def seconds(form, inputs):
        timed.append(type(form))
        return 0.02 if isinstance(form, slow) else 0.01

    monkeypatch.setattr(fused, "_seconds", seconds)
    for _ in range(2):
        found = quickest(Quadratic(), quadratic_inputs(), tmp_path)
        assert not isinstance(found, slow)
        assert timed == [Fused, Unfused]
        if slow is Fused:
            assert found.reason == "not compiled, which takes 20.00 ms where the plain graph takes 10.00 ms"


def test_the_time_of_a_form_is_that_of_its_calls():
    calls = []

    def form(*inputs):
        calls.append(inputs)
        time.sleep(0.02)

    assert 0.02 <= fused._seconds(form, quadratic_inputs()) < 0.2
    assert len(calls) > 1
