"""The torch optimizers: resumed, copied, moved, changed while running, and refused where they make no sense."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_optimizer
import schedulefree
import torch

from benchmarks.optimizer_cost import make_model
from tests.optim.models import model_of
from tests.optim.test_configuration import build
from tunebench import optim
from tunebench.optim import SOAP, AdamW, AdamWScheduleFree, Muon, SOAPMuon
from tunebench.optim.optimizer import RuleOptimizer
from tunebench.study.search_space import shipped_optimizers

OPTIMIZERS = pytest.mark.parametrize("name", shipped_optimizers())
FAMILIES = pytest.mark.parametrize("family", ["nequip", "allegro"])
VIEWED = pytest.mark.parametrize("name", ["lamb", "muon", "soap", "soap_muon"])
Parameters = list[torch.nn.Parameter]


def tiny(name: str, family: str) -> tuple[Parameters, RuleOptimizer]:
    """Weights of a tiny model and their optimizer, which refreshes often where it has bases."""
    model = model_of(family)
    changes = {"precondition_frequency": 2} if name.startswith("soap") else {}
    return list(model.parameters()), build(name, model, **changes)


def give_gradients(parameters: Parameters, step: int) -> None:
    """Gradients that depend on the step and on the weights."""
    draw = torch.Generator().manual_seed(step)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.grad = 0.1 * parameter.detach() + noise.to(parameter)


def train(parameters: Parameters, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        give_gradients(parameters, step)
        optimizer.step()


def snapshot(parameters: Parameters) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """A state as a checkpoint brings it back without running code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("done", [0, 1, 5])
@OPTIMIZERS
@FAMILIES
def test_a_state_read_back_without_running_code_goes_on_bit_for_bit(name: str, family: str, done: int) -> None:
    parameters, optimizer = tiny(name, family)
    train(parameters, optimizer, range(done))
    saved, weights = through_a_file(optimizer.state_dict()), snapshot(parameters)
    train(parameters, optimizer, range(done, 9))

    others, resumed = tiny(name, family)
    with torch.no_grad():
        for parameter, weight in zip(others, weights, strict=True):
            parameter.copy_(weight)
    resumed.load_state_dict(saved)
    train(others, resumed, range(done, 9))
    assert same(snapshot(others), snapshot(parameters))


@OPTIMIZERS
def test_an_optimizer_that_took_a_state_leaves_the_state_alone(name: str) -> None:
    parameters, optimizer = tiny(name, "nequip")
    train(parameters, optimizer, range(3))
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved["state"])
    others, resumed = tiny(name, "nequip")
    resumed.load_state_dict(saved)
    train(others, resumed, range(3, 6))
    assert saved["state"]["group 0"]["step"] == optimizer.state["group 0"]["step"] == 3  # type: ignore[index]
    tensors = saved["state"]["group 0"]["tensors"]
    assert all(torch.equal(tensors[key], value) for key, value in before["group 0"]["tensors"].items())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"]
)
@OPTIMIZERS
def test_a_copy_goes_on_as_the_original_and_apart_from_it(name: str, copied: Callable[[Any], Any]) -> None:
    parameters, optimizer = tiny(name, "nequip")
    train(parameters, optimizer, range(3))
    at_copy = snapshot(parameters)
    others, twin = copied((parameters, optimizer))
    train(parameters, optimizer, range(3, 8))
    assert same(snapshot(others), at_copy)
    train(others, twin, range(3, 8))
    assert same(snapshot(others), snapshot(parameters))


@OPTIMIZERS
def test_a_closure_computes_its_gradients_with_autograd(name: str) -> None:
    parameters, optimizer = tiny(name, "nequip")
    others, by_hand = tiny(name, "nequip")
    slopes = [torch.sin(parameter.detach()) for parameter in parameters]

    def closure() -> float:
        optimizer.zero_grad()
        loss = torch.stack([(p * s).sum() for p, s in zip(parameters, slopes, strict=True)]).sum()
        loss.backward()
        return float(loss.detach())

    for _ in range(4):
        before = [float((p.detach() * s).sum()) for p, s in zip(parameters, slopes, strict=True)]
        assert optimizer.step(closure) == pytest.approx(sum(before), rel=1e-5)
        for other, slope in zip(others, slopes, strict=True):
            other.grad = slope
        by_hand.step()
    assert same(snapshot(parameters), snapshot(others))


@OPTIMIZERS
@FAMILIES
def test_a_parameter_without_a_gradient_stays_as_it_is(name: str, family: str) -> None:
    parameters, optimizer = tiny(name, family)
    before = snapshot(parameters)
    frozen = len(parameters) // 2
    for step in range(7):
        give_gradients(parameters, step)
        parameters[frozen].grad = None
        optimizer.step()
    assert [torch.equal(p, b) for p, b in zip(parameters, before, strict=True)] == [
        index == frozen for index in range(len(parameters))
    ]


ADAM = {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.03, "eps": 1e-10}
RANGER = {"k": 2, "alpha": 0.4}

LIBRARIES: dict[str, tuple[Any, Any, float]] = {
    "adam": (lambda p: optim.Adam(p, **ADAM), lambda p: torch.optim.Adam(p, **ADAM), 1e-12),
    "adamw": (lambda p: optim.AdamW(p, **ADAM), lambda p: torch.optim.AdamW(p, **ADAM), 1e-12),
    "radam": (
        lambda p: optim.RAdam(p, **ADAM),
        lambda p: torch.optim.RAdam(p, **ADAM, decoupled_weight_decay=True),
        1e-12,
    ),
    "sgd": (
        lambda p: optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
        1e-12,
    ),
    "lamb": (
        lambda p: optim.LAMB(p, **ADAM, clamp=10.0),
        lambda p: pytorch_optimizer.Lamb(p, **ADAM, adam_debias=True),
        1e-12,
    ),
    "ranger": (
        lambda p: optim.Ranger(p, **ADAM, **RANGER),
        lambda p: pytorch_optimizer.Ranger(p, **ADAM, **RANGER, use_gc=False, degenerated_to_sgd=True),
        1e-12,
    ),
    "schedule_free": (
        lambda p: AdamWScheduleFree(p, **ADAM),
        lambda p: schedulefree.AdamWScheduleFree(p, **ADAM),
        1e-12,
    ),
    # The library takes its bases from float32, whatever the weights are.
    "soap": (
        lambda p: SOAP(p, **ADAM, precondition_frequency=4),
        lambda p: pytorch_optimizer.SOAP(p, **ADAM, precondition_frequency=4),
        1e-3,
    ),
}


@pytest.mark.parametrize(("ours", "theirs", "tolerance"), LIBRARIES.values(), ids=LIBRARIES.keys())
def test_settings_mean_what_they_mean_in_the_reference_library(ours: Any, theirs: Any, tolerance: float) -> None:
    # Square, so that the first gradient has full rank and SOAP's first bases are unique.
    start = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = [[torch.nn.Parameter(start.clone())] for _ in range(2)]
    for parameters, kind in zip(weights, (ours, theirs), strict=True):
        optimizer = kind(parameters)
        if hasattr(optimizer, "train"):
            optimizer.train()
        for step in range(9):
            draw = torch.Generator().manual_seed(step)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            optimizer.step()
    left, right = (parameters[0].detach() for parameters in weights)
    assert float((left - right).norm() / (right - start).norm()) < tolerance


@OPTIMIZERS
def test_a_step_without_any_gradient_changes_nothing(name: str) -> None:
    parameters, optimizer = tiny(name, "nequip")
    before = snapshot(parameters)
    optimizer.step()
    assert same(snapshot(parameters), before)
    assert not optimizer.state


@OPTIMIZERS
def test_a_new_learning_rate_acts_in_the_next_step(name: str) -> None:
    parameters, optimizer = tiny(name, "nequip")
    train(parameters, optimizer, range(3))
    others, changed = copy.deepcopy((parameters, optimizer))
    changed.param_groups[0]["lr"] *= 2.0
    train(parameters, optimizer, range(3, 4))
    train(others, changed, range(3, 4))
    moved = [torch.equal(p, o) for p, o in zip(parameters, others, strict=True)]
    assert not any(moved)


def refreshes(parameters: Parameters, optimizer: SOAP, steps: range) -> list[int]:
    """How often the bases of each group changed."""
    counts = [0] * len(optimizer.param_groups)
    for step in steps:
        before = [bases(optimizer, index) for index in range(len(counts))]
        train(parameters, optimizer, range(step, step + 1))
        for index, old in enumerate(before):
            counts[index] += not same(bases(optimizer, index), old)
    return counts


def bases(optimizer: SOAP, group: int) -> list[torch.Tensor]:
    tensors = optimizer.state[f"group {group}"]["tensors"]  # type: ignore[index]
    return [tensor.clone() for name, tensor in tensors.items() if name.startswith("basis/")]


@pytest.mark.parametrize("kind", [SOAP, SOAPMuon])
def test_a_new_precondition_frequency_acts_at_once(kind: type[SOAP]) -> None:
    parameters = two_matrices()
    optimizer = kind(parameters, precondition_frequency=10)
    train(parameters, optimizer, range(1))
    assert refreshes(parameters, optimizer, range(1, 21)) == [2]
    optimizer.param_groups[0]["precondition_frequency"] = 2
    assert refreshes(parameters, optimizer, range(21, 41)) == [10]


def test_a_state_goes_on_under_the_frequency_that_is_set_after_it_was_loaded() -> None:
    parameters = two_matrices()
    optimizer = SOAP(parameters, precondition_frequency=10)
    train(parameters, optimizer, range(6))
    others = two_matrices()
    resumed = SOAP(others)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    resumed.param_groups[0]["precondition_frequency"] = 1
    assert refreshes(others, resumed, range(6, 16)) == [10]


def test_every_group_has_its_own_frequency() -> None:
    first, second = two_matrices()
    groups = [{"params": [first], "precondition_frequency": 2}, {"params": [second], "precondition_frequency": 10}]
    optimizer = SOAP(groups)
    train([first, second], optimizer, range(1))
    assert refreshes([first, second], optimizer, range(1, 41)) == [20, 4]


def two_matrices() -> Parameters:
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(5, 3, generator=draw, dtype=torch.float32)) for _ in range(2)]


@VIEWED
def test_a_state_of_another_view_is_refused_in_one_line(name: str) -> None:
    model = model_of("nequip")
    optimizer = build(name, model, fctp_view="merged")
    train(list(model.parameters()), optimizer, range(2))
    other = build(name, model_of("nequip"), fctp_view="flat")
    with pytest.raises(
        ValueError, match=r"^group 0: found a state of other blocks or names, allowed: the group's own$"
    ):
        other.load_state_dict(through_a_file(optimizer.state_dict()))


@OPTIMIZERS
def test_a_group_can_be_added_while_running_and_resumes_with_the_rest(name: str) -> None:
    def extended(steps: int) -> tuple[Parameters, RuleOptimizer]:
        model, extra = model_of("nequip"), two_matrices()
        optimizer = build(name, model)
        parameters = list(model.parameters())
        train(parameters, optimizer, range(steps))
        optimizer.add_param_group({"params": extra, "lr": 0.5})
        return [*parameters, *extra], optimizer

    parameters, optimizer = extended(2)
    train(parameters, optimizer, range(2, 5))
    saved, weights = through_a_file(optimizer.state_dict()), snapshot(parameters)
    assert optimizer.state["group 1"]["step"] == 3  # type: ignore[index]
    train(parameters, optimizer, range(5, 8))

    others, resumed = extended(0)
    with torch.no_grad():
        for parameter, weight in zip(others, weights, strict=True):
            parameter.copy_(weight)
    resumed.load_state_dict(saved)
    train(others, resumed, range(5, 8))
    assert same(snapshot(others), snapshot(parameters))


@OPTIMIZERS
def test_weights_that_became_float64_before_the_first_step_are_trained_in_float64(name: str) -> None:
    model = model_of("nequip")
    optimizer = build(name, model)
    model.double()
    train(list(model.parameters()), optimizer, range(4))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    floats = [t for t in optimizer.state["group 0"]["tensors"].values() if t.is_floating_point() and t.ndim]  # type: ignore[index]
    assert {tensor.dtype for tensor in floats} == {torch.float64}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@OPTIMIZERS
def test_weights_and_state_may_move_to_the_gpu_while_training(name: str) -> None:
    model = model_of("nequip")
    optimizer = build(name, model)
    parameters = list(model.parameters())
    train(parameters, optimizer, range(3))
    model.to("cuda")
    for step in range(3, 6):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter) * step
        optimizer.step()
    assert all(bool(torch.isfinite(parameter).all()) for parameter in parameters)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["SOAP", "SOAPMuon"])
def test_captured_steps_with_many_branches_are_those_without_capture(name: str) -> None:
    """In float64: what round-off makes of directions without a gradient is far below eps, in float32 it is not."""
    ends = []
    for capture in (False, True):
        model = make_model("nequip-large", torch.device("cuda")).double()
        parameters = list(model.parameters())
        optimizer = getattr(optim, name)(optim.matrix_groups(model), lr=1e-3, precondition_frequency=2, capture=capture)
        train(parameters, optimizer, range(12))
        ends.append(snapshot(parameters))
    for plain, captured in zip(*ends, strict=True):
        torch.testing.assert_close(captured, plain, rtol=1e-6, atol=1e-9)


def test_schedule_free_weights_come_back_bit_for_bit() -> None:
    parameters, optimizer = tiny("schedule_free", "nequip")
    assert isinstance(optimizer, AdamWScheduleFree)
    train(parameters, optimizer, range(4))
    training = snapshot(parameters)
    optimizer.eval()
    averaged = snapshot(parameters)
    optimizer.eval()
    assert same(snapshot(parameters), averaged)
    assert not any(torch.equal(left, right) for left, right in zip(training, averaged, strict=True))
    optimizer.train()
    optimizer.train()
    assert same(snapshot(parameters), training)


def test_schedule_free_refuses_a_bare_step_on_averaged_weights_and_a_closure_leads_back() -> None:
    parameters, optimizer = tiny("schedule_free", "nequip")
    others, uninterrupted = tiny("schedule_free", "nequip")
    assert isinstance(optimizer, AdamWScheduleFree)
    for each, weights in ((optimizer, parameters), (uninterrupted, others)):
        train(weights, each, range(3))
    optimizer.eval()
    with pytest.raises(ValueError, match=r"^step: found averaged weights, allowed: training weights; call train\(\)"):
        optimizer.step()
    optimizer.step(lambda: give_gradients(parameters, 3) or 0.0)  # type: ignore[func-returns-value]
    train(others, uninterrupted, range(3, 4))
    assert same(snapshot(parameters), snapshot(others))


def test_a_state_saved_with_averaged_weights_goes_on_from_the_training_weights() -> None:
    parameters, optimizer = tiny("schedule_free", "nequip")
    assert isinstance(optimizer, AdamWScheduleFree)
    train(parameters, optimizer, range(3))
    optimizer.eval()
    saved, weights = through_a_file(optimizer.state_dict()), snapshot(parameters)
    others, resumed = tiny("schedule_free", "nequip")
    assert isinstance(resumed, AdamWScheduleFree)
    with torch.no_grad():
        for parameter, weight in zip(others, weights, strict=True):
            parameter.copy_(weight)
    resumed.load_state_dict(saved)
    for each, own in ((optimizer, parameters), (resumed, others)):
        each.train()
        train(own, each, range(3, 6))
    assert same(snapshot(others), snapshot(parameters))


@pytest.mark.parametrize("kind", [getattr(optim, name) for name in optim.__all__ if not name.endswith("_groups")])
def test_unknown_settings_are_refused(kind: type[RuleOptimizer]) -> None:
    with pytest.raises(TypeError, match="learning_rate"):
        kind(two_matrices(), learning_rate=0.1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^group: found learning_rate, allowed: params, names, "):
        kind([{"params": two_matrices(), "learning_rate": 0.1}])  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"^lr: found -1.0, allowed: a finite number of 0 or more$"):
        kind([{"params": two_matrices(), "lr": -1.0}])  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("kind", "settings", "line"),
    [
        (AdamW, {"lr": float("nan")}, "lr: found nan, allowed: a finite number of 0 or more"),
        (AdamW, {"betas": (0.9, 1.0)}, "betas: found 1.0, allowed: from 0 to below 1"),
        (AdamW, {"eps": -1e-9}, "eps: found -1e-09, allowed: a finite number of 0 or more"),
        (AdamWScheduleFree, {"betas": (0.0, 0.9)}, "betas: found 0.0 first, allowed: above 0, or no weights"),
        (optim.SGD, {"nesterov": True}, "nesterov: found true without momentum, allowed: momentum above 0"),
        (optim.Ranger, {"k": 0}, "k: found 0, allowed: a whole number of 1 or more"),
        (Muon, {"scale": "kimi"}, "scale: found 'kimi', allowed: match_rms_adamw, keller"),
        (SOAP, {"precondition_frequency": 2.5}, "precondition_frequency: found 2.5, allowed: a whole number"),
        (SOAP, {"sides": "three"}, "sides: found 'three', allowed: two, one"),
        (SOAPMuon, {"recipe": "report"}, "recipe: found 'report', allowed: paper, nanogpt, olmo, track3"),
        (SOAPMuon, {"rho": 0.3}, "rho of recipe paper: found 0.3, allowed: 0.0, 0.5"),
        (SOAPMuon, {"recipe": "olmo", "rho": 0.5}, "rho of recipe olmo: found 0.5, allowed: 0.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_one_line(
    kind: type[RuleOptimizer], settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        kind(two_matrices(), **settings)  # type: ignore[call-arg]
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_an_unknown_view_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^fctp_view: found 'types', allowed: flat, per_type, merged$"):
        optim.matrix_groups(model_of("nequip"), fctp_view="types")
