"""A small model with every kind of block, drivers for rules and references, and the table of all rules."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from tunebench.optim.blocks import Block, View
from tunebench.optim.factors import Sides
from tunebench.optim.packing import Packing, Tensors
from tunebench.optim.rule import Phase, UpdateRule
from tunebench.optim.rules.adam import Adam
from tunebench.optim.rules.lamb import Lamb
from tunebench.optim.rules.muon import Muon, Scale
from tunebench.optim.rules.radam import RAdam
from tunebench.optim.rules.ranger import Ranger
from tunebench.optim.rules.schedule_free import ScheduleFree
from tunebench.optim.rules.sgd import Sgd
from tunebench.optim.rules.soap import Basis, Soap
from tunebench.optim.rules.soap_muon import Recipe, SoapMuon

Settings = Mapping[str, float]
Gradient = Callable[[Tensors, int], Tensors]

SHAPES = {
    "mlp.0": (5, 8),
    "mlp.1": (8, 5),
    "linear": (4 * 6 + 6 * 4 + 5 * 8 + 8,),
    "sc": (3 * 2 * 4 + 4 * 3 * 5,),
    "readout": (6, 1),
    "scales": (3,),
}
"""Dense matrices wide and tall, flat e3nn weights, a readout and a table."""

BLOCKS = [
    Block.whole("mlp.0", (5, 8), View.MATRIX),
    Block.whole("mlp.1", (8, 5), View.MATRIX),
    Block.slice("linear", "0e -> 0e", 0, (4, 6), View.MATRIX),
    Block.slice("linear", "1o -> 1o", 24, (6, 4), View.MATRIX),
    Block.slice("linear", "1e -> 1e", 48, (5, 8), View.MATRIX),
    Block.slice("linear", "2e -> 2e", 88, (8, 1), View.MATRIX),
    Block.slice("sc", "0e", 0, (3, 2, 4), View.MERGED),
    Block.slice("sc", "1o", 24, (4, 3, 5), View.PER_TYPE),
    Block.whole("readout", (6, 1)),
    Block.whole("scales", (3,)),
]


def draw(name: str, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal numbers in the shape of a parameter, fixed by its name and a seed."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + zlib.crc32(name.encode()))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(dtype)


def weights(dtype: torch.dtype = torch.float64, names: Sequence[str] = tuple(SHAPES)) -> Tensors:
    """Initial weights."""
    return {name: draw(name, 0, dtype) for name in names}


def packing(params: Tensors) -> Packing:
    """The packing of these parameters by `BLOCKS`."""
    return Packing(params, [block for block in BLOCKS if block.parameter in params])


def noisy_bowl(params: Tensors, step: int) -> Tensors:
    """Gradient of a quadratic loss around targets that are drawn anew in every step: feedback and noise."""
    return {name: 0.3 * (w - draw(name, -1, w.dtype)) + 0.5 * draw(name, step, w.dtype) for name, w in params.items()}


def noise(scale: float) -> Gradient:
    """Gradients that do not depend on the weights."""
    return lambda params, step: {name: scale * draw(name, step, w.dtype) for name, w in params.items()}


def constant(value: float) -> Gradient:
    """Gradients that equal one value everywhere."""
    return lambda params, step: {name: torch.full_like(w, value) for name, w in params.items()}


def tensors(hyper: Settings) -> Tensors:
    """Hyperparameters as rules take them."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in hyper.items()}


@dataclass(frozen=True)
class Run:
    """Weights and state after some steps of a rule."""

    params: Tensors
    state: Tensors
    steps: int = 0

    @classmethod
    def start(cls, rule: UpdateRule, params: Tensors) -> Run:
        """Before the first step."""
        packed = rule.packing.pack(params)
        return cls(packed, rule.init(packed))

    def train(self, rule: UpdateRule, hyper: Settings, steps: int, gradient: Gradient = noisy_bowl) -> Run:
        """So many steps later."""
        params, state = self.params, self.state
        for step in range(self.steps + 1, self.steps + steps + 1):
            grads = rule.packing.pack(gradient(rule.packing.unpack(params), step))
            number = torch.tensor(step, dtype=torch.int64)
            params, state = rule.update(grads, state, params, tensors(hyper), number, rule.phase(step, hyper))
        return Run(params, state, self.steps + steps)


def train_slots(rule: UpdateRule, runs: Sequence[Run], hypers: Sequence[Settings], gradient: Gradient) -> list[Run]:
    """One step of every run side by side, each with its own hyperparameters and step number."""
    numbers = [run.steps + 1 for run in runs]
    grads = [
        rule.packing.pack(gradient(rule.packing.unpack(run.params), n)) for run, n in zip(runs, numbers, strict=True)
    ]
    phases = [rule.phase(number, hyper) for number, hyper in zip(numbers, hypers, strict=True)]
    latest = max(phases, key=list(Phase).index)

    def update(
        grads: Tensors, state: Tensors, params: Tensors, hyper: Tensors, step: torch.Tensor
    ) -> tuple[Tensors, Tensors]:
        return rule.update(grads, state, params, hyper, step, latest)

    params, state = torch.func.vmap(update)(
        stacked(grads),
        stacked([run.state for run in runs]),
        stacked([run.params for run in runs]),
        stacked([tensors(hyper) for hyper in hypers]),
        torch.tensor(numbers, dtype=torch.int64),
    )
    return [
        Run({k: v[slot] for k, v in params.items()}, {k: v[slot] for k, v in state.items()}, numbers[slot])
        for slot in range(len(runs))
    ]


def stacked(rows: Sequence[Tensors]) -> Tensors:
    """Dictionaries of tensors as one, with a leading slot axis."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def difference(found: Tensors, expected: Tensors) -> float:
    """Largest difference of any element, relative to the largest element of its tensor."""
    assert found.keys() == expected.keys()
    ratios = [(found[k] - expected[k]).abs().max() / expected[k].abs().max().clamp(min=1e-300) for k in expected]
    return max(math.inf if ratio.isnan() else float(ratio) for ratio in ratios)


Views = list[tuple[str, torch.Tensor]]


def whole(params: Tensors) -> Views:
    """Every parameter as it is: its name and the positions of its elements."""
    return [(name, torch.arange(w.numel(), dtype=torch.int64).reshape(w.shape)) for name, w in params.items()]


def by_block(blocks: Sequence[Block] = BLOCKS) -> Views:
    """One tensor per block."""
    return [(block.parameter, block.index()) for block in blocks]


def by_matrix(blocks: Sequence[Block] = BLOCKS) -> Views:
    """One (out, in) tensor per matrix, as torch.nn.Linear has it, and a flat one per vector block."""
    views: Views = []
    for block in blocks:
        pieces = block.index().mT.unbind() if block.is_matrix else [block.index().reshape(-1)]
        views += [(block.parameter, piece) for piece in pieces]
    return views


class Stepper(Protocol):
    """What a reference needs: a step on the `grad` of its parameters."""

    def step(self) -> object: ...


def reference_run(
    build: Callable[[list[torch.nn.Parameter]], Stepper],
    params: Tensors,
    views: Views,
    steps: int,
    *,
    gradient: Gradient = noisy_bowl,
    finish: Callable[[], object] | None = None,
) -> Tensors:
    """Weights after so many steps of a library's optimizer on views of the parameters (and `finish`, if given)."""
    flat = {name: w.reshape(-1).clone() for name, w in params.items()}
    tensors = [torch.nn.Parameter(flat[name][index].clone()) for name, index in views]
    optimizer = build(tensors)
    for step in range(1, steps + 1):
        grads = gradient({name: w.reshape(params[name].shape) for name, w in flat.items()}, step)
        for (name, index), tensor in zip(views, tensors, strict=True):
            tensor.grad = grads[name].reshape(-1)[index]
        optimizer.step()
        if finish is not None and step == steps:
            finish()
        for (name, index), tensor in zip(views, tensors, strict=True):
            flat[name][index] = tensor.detach()
    return {name: w.reshape(params[name].shape) for name, w in flat.items()}


def rule_run(
    rule: UpdateRule, params: Tensors, hyper: Settings, steps: int, gradient: Gradient = noisy_bowl
) -> Tensors:
    """Weights after so many steps of a rule of ours, by parameter."""
    return rule.packing.unpack(Run.start(rule, params).train(rule, hyper, steps, gradient).params)


def regression_losses(step: Callable[[Tensors, int], Tensors]) -> list[float]:
    """Losses of a float32 network of two layers that learns a sine while `step` turns gradients into new weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.linspace(-2, 2, 64, dtype=torch.float32).unsqueeze(1) ** torch.arange(1, 6, dtype=torch.float32) / 4
    y = torch.sin(2 * x[:, :1] * 4)
    params = {n: torch.randn(s, generator=generator, dtype=torch.float32) for n, s in REGRESSION_SHAPES.items()}
    losses = []
    for number in range(1, 101):
        params = {name: w.detach().requires_grad_() for name, w in params.items()}
        hidden = torch.tanh(x @ params["mlp.0"])
        loss = ((hidden @ params["mlp.1"] @ params["readout"] / math.sqrt(8) - y) ** 2).mean()
        torch.autograd.backward(loss)
        losses.append(float(loss.detach()))
        params = step(params, number)
    return losses


REGRESSION_SHAPES = {"mlp.0": (5, 8), "mlp.1": (8, 6), "readout": (6, 1)}
REGRESSION_BLOCKS = [
    Block.whole("mlp.0", (5, 8), View.MATRIX),
    Block.whole("mlp.1", (8, 6), View.MATRIX),
    Block.whole("readout", (6, 1)),
]


def losses_of_rule(build: Callable[[Packing], UpdateRule], hyper: Settings) -> list[float]:
    """Regression losses under a rule of ours."""
    rule = build(
        Packing({n: torch.empty(s, dtype=torch.float32) for n, s in REGRESSION_SHAPES.items()}, REGRESSION_BLOCKS)
    )
    state: Tensors = {}

    def step(params: Tensors, number: int) -> Tensors:
        nonlocal state
        grads = rule.packing.pack({name: w.grad for name, w in params.items() if w.grad is not None})
        packed = rule.packing.pack({name: w.detach() for name, w in params.items()})
        state = state or rule.init(packed)
        count = torch.tensor(number, dtype=torch.int64)
        packed, state = rule.update(grads, state, packed, tensors(hyper), count, rule.phase(number, hyper))
        return rule.packing.unpack(packed)

    return regression_losses(step)


def losses_of_reference(build: Callable[[list[torch.nn.Parameter]], Stepper]) -> list[float]:
    """Regression losses under a library's optimizer."""
    views = {name: torch.nn.Parameter(torch.empty(s, dtype=torch.float32)) for name, s in REGRESSION_SHAPES.items()}
    optimizer: list[Stepper] = []

    def step(params: Tensors, number: int) -> Tensors:
        for name, view in views.items():
            view.data = params[name].detach().clone()
            view.grad = params[name].grad
        if not optimizer:
            optimizer.append(build(list(views.values())))
        optimizer[0].step()
        return {name: view.detach() for name, view in views.items()}

    return regression_losses(step)


@dataclass(frozen=True)
class Case:
    """One rule in the conformance suite.

    Attributes:
        build: the rule for a packing.
        hyper: hyperparameters.
        elementwise: slots must equal solo runs bit for bit; else to `slots`, since products and sums may be batched
            otherwise.
        eps: names of hyperparameters that must be small for a rescaled loss not to change the trajectory; empty for
            rules whose trajectory does depend on it.
        rescaled: hyperparameters for the test with a rescaled loss, where they differ.
        slots: allowed relative difference between slots and solo runs.
        rescaling: allowed relative difference of the path under a rescaled loss and a small epsilon.
        linear: whether a step is proportional to the learning rate.
    """

    build: Callable[[Packing], UpdateRule]
    hyper: Settings
    elementwise: bool
    eps: tuple[str, ...] = ()
    rescaled: Settings = field(default_factory=dict)
    slots: float = 1e-12
    rescaling: float = 0.02
    linear: bool = True


ADAM = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.99, "eps": 1e-12, "weight_decay": 1e-2}
MUON = {
    "learning_rate": 1e-2,
    "momentum": 0.95,
    "weight_decay": 1e-2,
    "aux_learning_rate_ratio": 0.5,
    "aux_beta1": 0.9,
    "aux_beta2": 0.95,
    "aux_eps": 1e-12,
    "aux_weight_decay": 1e-3,
}
SGD = {"learning_rate": 1e-2, "momentum": 0.9, "weight_decay": 1e-2}
SOAP = {
    "learning_rate": 1e-2,
    "weight_decay": 1e-2,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-12,
    "shampoo_beta": 0.9,
    "precondition_frequency": 3.0,
    "aux_learning_rate_ratio": 0.5,
    "aux_beta1": 0.9,
    "aux_beta2": 0.99,
    "aux_eps": 1e-12,
    "aux_weight_decay": 1e-3,
}
LOOKAHEAD = {"lookahead_k": 4.0, "lookahead_alpha": 0.5}

CASES: dict[str, Case] = {
    "sgd": Case(lambda packing: Sgd(packing), SGD, elementwise=True),
    "sgd nesterov": Case(lambda packing: Sgd(packing, nesterov=True), SGD, elementwise=True),
    "adam": Case(lambda packing: Adam(packing, decoupled=False), ADAM, True, ("eps",), {"weight_decay": 0.0}),
    "adamw": Case(lambda packing: Adam(packing), ADAM, elementwise=True, eps=("eps",)),
    "radam": Case(lambda packing: RAdam(packing), ADAM, elementwise=True),
    "lamb": Case(lambda packing: Lamb(packing), ADAM | {"clamp": math.inf}, elementwise=False, eps=("eps",)),
    "lamb clamped": Case(lambda packing: Lamb(packing), ADAM | {"clamp": 2.0}, elementwise=False, eps=("eps",)),
    "ranger": Case(lambda packing: Ranger(packing), ADAM | LOOKAHEAD, elementwise=True),
    "ranger centralised": Case(lambda packing: Ranger(packing, centralise=True), ADAM | LOOKAHEAD, elementwise=False),
    "schedule_free": Case(lambda packing: ScheduleFree(packing), ADAM, elementwise=True, eps=("eps",)),
    "schedule_free warm-up": Case(
        lambda packing: ScheduleFree(packing, warmup_steps=5, r=1.0), ADAM, elementwise=True, eps=("eps",)
    ),
    "muon": Case(lambda packing: Muon(packing), MUON, elementwise=False, eps=("aux_eps",)),
    "muon keller": Case(
        lambda packing: Muon(packing, nesterov=False, scale=Scale.KELLER), MUON, elementwise=False, eps=("aux_eps",)
    ),
    "soap": Case(lambda packing: Soap(packing), SOAP, elementwise=False, eps=("eps", "aux_eps")),
    "soap current, one-sided": Case(
        lambda packing: Soap(packing, sides=Sides.ONE, basis=Basis.CURRENT, basis_warmup_steps=2),
        SOAP,
        elementwise=False,
        eps=("eps", "aux_eps"),
    ),
    "soap_muon": Case(lambda packing: SoapMuon(packing), SOAP, elementwise=False),
    "soap_muon rho 0.5": Case(lambda packing: SoapMuon(packing, rho=0.5), SOAP, elementwise=False),
    "soap_muon nanogpt": Case(lambda packing: SoapMuon(packing, recipe=Recipe.NANOGPT), SOAP, elementwise=False),
    "soap_muon olmo": Case(lambda packing: SoapMuon(packing, recipe=Recipe.OLMO), SOAP, elementwise=False),
}
"""Every rule passes test_conformance.py in these settings."""
