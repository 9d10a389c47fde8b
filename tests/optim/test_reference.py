from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import pytorch_optimizer
import schedulefree
import torch
from allegro.model.param_groups import MuonParamGroups as allegro_groups
from hydra.utils import get_class, instantiate
from nequip.model.param_groups import MuonParamGroups as nequip_groups

from tunebench.optim.reference import Lamb, matrix_groups, optimizer_config, realised_groups
from tunebench.study.search_space import SearchSpace, available_optimizers
from tunebench.study.spec import Model
from tunebench.workloads.models import build_model, model_config
from tunebench.workloads.statistics import TrainingStatistics

OPTIMIZERS = pytest.mark.parametrize("name", available_optimizers())
FAMILIES = pytest.mark.parametrize("family", ["nequip", "allegro"])
Weights = dict[str, torch.nn.Parameter]

STATISTICS = TrainingStatistics(
    per_type_energy_shifts=(0.0, -1.0),
    degenerate=False,
    force_rms=1.0,
    avg_num_neighbors=10.0,
    labelled_frames=1,
    note="",
)

MATRICES = {
    "nequip": [
        "layer0_convnet.conv.edge_mlp.mlp.0.weight",
        "layer0_convnet.conv.edge_mlp.mlp.2.weight",
        "layer1_convnet.conv.edge_mlp.mlp.0.weight",
        "layer1_convnet.conv.edge_mlp.mlp.2.weight",
    ],
    "allegro": [
        "allegro.first_layer_env_embed_projection.mlp.0.weight",
        "allegro.latents.0.mlp.0.weight",
        "allegro.latents.0.mlp.2.weight",
        "allegro.latents.1.mlp.0.weight",
        "allegro.latents.1.mlp.2.weight",
        "radial_chemical_embed.type_embed.basis_linear.mlp.0.weight",
        "scalar_embed_mlp.mlp_module.mlp.0.weight",
        "scalar_embed_mlp.mlp_module.mlp.2.weight",
        "tensor_embed.env_embed_linear.mlp.0.weight",
    ],
}


def tiny(family: str, preset: str = "tiny") -> torch.nn.Module:
    """A preset of a family for water."""
    return build_model(model_config(Model(family=family, preset=preset), ("H", "O"), STATISTICS, seed=0))


def build(name: str, model: torch.nn.Module, **changes: Any) -> torch.optim.Optimizer:
    """The optimizer as NequIP's training module builds it from its section, with the defaults of its search space."""
    config = optimizer_config(name, {**SearchSpace.load(name).defaults(), **changes})
    groups = config.pop("param_groups", None)
    parameters = model.parameters() if groups is None else instantiate(groups, model=model)
    return get_class(config.pop("_target_"))(params=parameters, **config)


class Toy(torch.nn.Module):
    """float64 weights in the shapes of the models: hidden matrices, a flat tensor product, a readout, a large norm."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        shapes = {"hidden": (8, 12), "wide": (12, 5), "readout": (12, 1), "flat": (40,), "shift": (3,)}
        self.mlp = torch.nn.ParameterDict(
            {k: torch.randn(s, generator=draw, dtype=torch.float64) for k, s in shapes.items()}
        )
        self.mlp["large"] = 30.0 * torch.randn(6, 6, generator=draw, dtype=torch.float64)

    def groups(self) -> list[dict[str, Any]]:
        """The matrices by hand, as Muon should be given them."""
        matrices = [self.mlp[name] for name in ("hidden", "wide", "large")]
        rest = [self.mlp[name] for name in ("readout", "flat", "shift")]
        return [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}]


def toy_groups(model: Toy) -> list[dict[str, Any]]:
    """Muon's groups of the toy, whose names are not those of a model."""
    return model.groups()


def trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[torch.Tensor]:
    """Weights after steps on gradients that depend on the step alone."""
    draw = torch.Generator().manual_seed(1)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(steps):
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


ADAM = {"lr": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.03, "eps": 1e-10}
HYPER = {"learning_rate": 0.02, "beta1": 0.8, "beta2": 0.9, "weight_decay": 0.03, "eps": 1e-10}
MUON = {"learning_rate": 0.02, "momentum": 0.9, "weight_decay": 0.03, "aux_beta1": 0.8, "aux_beta2": 0.9, "eps": 1e-10}
Direct = Callable[[Toy], torch.optim.Optimizer]

DIRECT: list[tuple[str, dict[str, Any], Direct]] = [
    ("adam", HYPER, lambda toy: torch.optim.Adam(toy.parameters(), **ADAM)),
    ("adamw", HYPER, lambda toy: torch.optim.AdamW(toy.parameters(), **ADAM)),
    ("radam", HYPER, lambda toy: torch.optim.RAdam(toy.parameters(), **ADAM, decoupled_weight_decay=True)),
    (
        "sgd",
        {"learning_rate": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.03},
        lambda toy: torch.optim.SGD(toy.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.03),
    ),
    (
        "sgd",
        {"learning_rate": 0.02, "momentum": 0.0, "nesterov": True, "weight_decay": 0.03},
        lambda toy: torch.optim.SGD(toy.parameters(), lr=0.02, weight_decay=0.03),
    ),
    ("lamb", {**HYPER, "clamp": 10.0}, lambda toy: pytorch_optimizer.Lamb(toy.parameters(), **ADAM)),
    (
        "ranger",
        {**HYPER, "lookahead_k": 2, "lookahead_alpha": 0.4},
        lambda toy: pytorch_optimizer.Ranger(toy.parameters(), **ADAM, k=2, alpha=0.4, use_gc=False),
    ),
    ("schedule_free", HYPER, lambda toy: schedulefree.AdamWScheduleFree(toy.parameters(), **ADAM)),
    (
        "soap",
        {**HYPER, "precondition_frequency": 2, "max_precondition_dim": 10_000},
        lambda toy: pytorch_optimizer.SOAP(toy.parameters(), **ADAM, precondition_frequency=2),
    ),
    (
        "muon",
        MUON,
        lambda toy: pytorch_optimizer.Muon(
            toy.groups(),
            lr=0.02,
            momentum=0.9,
            weight_decay=0.03,
            use_adjusted_lr=True,
            adamw_lr=0.02,
            adamw_betas=(0.8, 0.9),
            adamw_wd=0.03,
            adamw_eps=1e-10,
        ),
    ),
]


def from_section(name: str, hyper: dict[str, Any], toy: Toy) -> torch.optim.Optimizer:
    """The optimizer of a study's hyperparameters on the toy."""
    config = optimizer_config(name, hyper)
    groups: Iterable[Any] = toy_groups(toy) if config.pop("param_groups", None) else toy.parameters()
    return get_class(config.pop("_target_"))(params=groups, **config)


@pytest.mark.parametrize(("name", "hyper", "direct"), DIRECT)
def test_steps_are_those_of_the_library_used_directly(name: str, hyper: dict[str, Any], direct: Direct) -> None:
    ours, theirs = Toy(), Toy()
    start = [parameter.detach().clone() for parameter in ours.parameters()]
    optimizer, reference = from_section(name, hyper, ours), direct(theirs)
    for left, right, first in zip(trained(ours, optimizer), trained(theirs, reference), start, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0)
        assert not torch.equal(left, first)


def test_every_available_optimizer_is_compared_with_its_library() -> None:
    assert {name for name, _, _ in DIRECT} == set(available_optimizers())


def test_muon_orthogonalises_as_torch_does() -> None:
    ours, theirs = Toy(), Toy()
    left = trained(ours, from_section("muon", MUON | {"weight_decay": 0.0}, ours), steps=1)
    matrices = theirs.groups()[0]["params"]
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    trained(theirs, torch.optim.Muon(matrices, **settings), steps=1)
    before = dict(Toy().mlp.items())
    for name in ("hidden", "wide", "large"):
        step, expected = (toy.mlp[name].detach() - before[name].detach() for toy in (ours, theirs))
        # Newton-Schulz runs in bfloat16, with slightly different scalings: directions agree, bits do not
        assert torch.cosine_similarity(step.flatten(), expected.flatten(), dim=0) > 0.999
        assert step.norm() == pytest.approx(float(expected.norm()), rel=0.02)
    assert len(left) == 6


@OPTIMIZERS
@FAMILIES
def test_the_section_builds_the_optimizer_that_its_search_space_names(name: str, family: str) -> None:
    optimizer = build(name, tiny(family))
    assert isinstance(optimizer, get_class(SearchSpace.load(name).implementation))


@OPTIMIZERS
@FAMILIES
def test_hyperparameters_arrive_in_every_parameter_group(name: str, family: str) -> None:
    hyper = SearchSpace.load(name).defaults()
    changed = {"learning_rate": 0.0123, "weight_decay": 0.0456} | ({"eps": 3e-11} if "eps" in hyper else {})
    changed |= {beta: 0.77 for beta in ("beta1", "aux_beta1") if beta in hyper}
    changed |= {beta: 0.88 for beta in ("beta2", "aux_beta2") if beta in hyper}
    for group in build(name, tiny(family), **changed).param_groups:
        assert (group["lr"], group["weight_decay"]) == (0.0123, 0.0456)
        if group.get("use_muon") or name == "sgd":
            assert group["momentum"] == hyper["momentum"]
        else:
            assert (tuple(group["betas"]), group["eps"]) == ((0.77, 0.88), 3e-11)


@OPTIMIZERS
def test_the_section_is_plain_data(name: str) -> None:
    def plain(value: object) -> bool:
        if isinstance(value, dict):
            return all(isinstance(key, str) and plain(item) for key, item in value.items())
        if isinstance(value, list | tuple):
            return all(map(plain, value))
        return value is None or type(value) in (bool, int, float, str)

    config = optimizer_config(name, SearchSpace.load(name).defaults())
    assert plain(config)
    assert "params" not in config


@OPTIMIZERS
def test_every_hyperparameter_of_the_search_space_has_an_effect(name: str) -> None:
    space = SearchSpace.load(name)
    defaults = space.defaults()
    for parameter, description in space.parameters.items():
        others = [value for value in map(description.value_at, (0.0, 1.0)) if value != defaults[parameter]]
        assert optimizer_config(name, defaults | {parameter: others[0]}) != optimizer_config(name, defaults), parameter


@OPTIMIZERS
def test_a_missing_hyperparameter_is_an_error(name: str) -> None:
    hyper = SearchSpace.load(name).defaults()
    del hyper["learning_rate"]
    with pytest.raises(KeyError, match="learning_rate"):
        optimizer_config(name, hyper)


def test_an_optimizer_without_an_update_rule_is_an_error() -> None:
    with pytest.raises(KeyError, match="soap_muon"):
        optimizer_config("soap_muon", SearchSpace.load("soap_muon").defaults())


@OPTIMIZERS
@FAMILIES
def test_zero_gradients_leave_every_weight_finite(name: str, family: str) -> None:
    model = tiny(family)
    optimizer = build(name, model)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(12):  # beyond a refresh of SOAP's preconditioner
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@OPTIMIZERS
@FAMILIES
def test_every_weight_moves(name: str, family: str) -> None:
    model = tiny(family)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    trained(model, build(name, model), steps=7)  # beyond a synchronisation of Lookahead
    assert [key for key, parameter in model.named_parameters() if torch.equal(parameter, before[key])] == []


def test_ranger_moves_a_readout_that_gradient_centralisation_would_freeze() -> None:
    ours, frozen = Toy(), Toy()
    start = ours.mlp["readout"].detach().clone()
    hyper = {**HYPER, "weight_decay": 0.0, "lookahead_k": 6, "lookahead_alpha": 0.5}
    trained(ours, from_section("ranger", hyper, ours))
    trained(frozen, pytorch_optimizer.Ranger(frozen.parameters(), **(ADAM | {"weight_decay": 0.0})))
    assert torch.equal(frozen.mlp["readout"], start)
    assert bool((ours.mlp["readout"] != start).all())


def lamb_ratio(clamp: float | None, scale: float) -> tuple[float, float, Lamb]:
    """(trust ratio, norm of the weights) of one LAMB step on a matrix with entries of size `scale`."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(scale * torch.randn(20, 20, generator=draw, dtype=torch.float64))
    weight.grad = torch.randn(20, 20, generator=draw, dtype=torch.float64)
    norm = float(weight.detach().norm())
    optimizer = Lamb([weight], clamp=clamp, **(ADAM | {"weight_decay": 0.0}))
    optimizer.step()
    return float(optimizer.state[weight]["trust_ratio"]), norm, optimizer


def test_lambs_clamp_cuts_the_norm_of_large_weights_and_none_leaves_it() -> None:
    clamped, norm, _ = lamb_ratio(10.0, scale=1.0)
    free, _, _ = lamb_ratio(None, scale=1.0)
    assert norm > 15.0
    assert free / clamped == pytest.approx(norm / 10.0, rel=1e-12)
    # the first update is (1 - beta1) sign(g) / sqrt(1 - beta2), of known norm
    assert free == pytest.approx(norm / (20.0 * 0.2 / math.sqrt(0.1)), rel=1e-6)


def test_lambs_clamp_leaves_small_weights_alone() -> None:
    assert lamb_ratio(10.0, scale=0.01)[0] == lamb_ratio(None, scale=0.01)[0]


def test_lamb_without_a_clamp_differs_from_the_library() -> None:
    ours, theirs = Toy(), Toy()
    trained(ours, from_section("lamb", {**HYPER, "clamp": None}, ours))
    trained(theirs, pytorch_optimizer.Lamb(theirs.parameters(), **ADAM))
    assert not torch.allclose(ours.mlp["large"], theirs.mlp["large"], rtol=1e-3)
    torch.testing.assert_close(ours.mlp["shift"], theirs.mlp["shift"], rtol=0, atol=0)


def test_the_library_keeps_its_own_clamp() -> None:
    Lamb([torch.nn.Parameter(torch.ones(1, dtype=torch.float64))], clamp=None)
    assert pytorch_optimizer.Lamb.clamp == 10.0


@FAMILIES
def test_muon_gets_the_matrices_of_hidden_mlps_and_nothing_else(family: str) -> None:
    model = tiny(family)
    matrices, rest = matrix_groups(model)
    assert (matrices["use_muon"], rest["use_muon"]) == (True, False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    picked = [names[id(parameter)].removeprefix("model.func.") for parameter in matrices["params"]]
    assert sorted(picked) == sorted(MATRICES[family])
    assert len(picked) + len(rest["params"]) == len(names)
    assert all(parameter.ndim == 2 and min(parameter.shape) > 1 for parameter in matrices["params"])


@pytest.mark.parametrize("preset", ["tiny", "small"])
@pytest.mark.parametrize(("family", "theirs"), [("nequip", nequip_groups), ("allegro", allegro_groups)])
def test_muon_gets_the_dense_matrices_that_the_models_own_packages_give_it(
    family: str, theirs: Callable[..., list[dict[str, Any]]], preset: str
) -> None:
    model = tiny(family, preset)
    grouped = theirs(model, muon={}, adam={})[0]["params"]
    dense = {id(parameter) for parameter in grouped if parameter.ndim == 2}  # nequip adds e3nn's flat weights
    assert {id(parameter) for parameter in matrix_groups(model)[0]["params"]} == dense


def test_muon_refuses_a_model_without_a_hidden_matrix() -> None:
    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = torch.nn.ParameterList([torch.zeros(4, dtype=torch.float32)])
            self.readout_mlp = torch.nn.ParameterList([torch.zeros(4, 1, dtype=torch.float32)])

    with pytest.raises(
        ValueError, match=r"^muon: found no matrix of a hidden MLP in this model, allowed: at least one$"
    ):
        matrix_groups(Flat())


@OPTIMIZERS
@FAMILIES
def test_realised_groups_cover_every_weight_once(name: str, family: str) -> None:
    model = tiny(family)
    rows = realised_groups(name, build(name, model))
    assert sum(row["share"] for row in rows) == pytest.approx(1.0, abs=1e-12)
    assert sum(row["tensors"] for row in rows) == len(list(model.parameters()))
    assert sum(row["parameters"] for row in rows) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "rules"),
    [("adamw", {"adamw"}), ("lamb", {"lamb"}), ("muon", {"muon", "adamw"}), ("soap", {"soap", "adam"})],
)
@FAMILIES
def test_realised_groups_name_the_rule_that_treats_the_weights(name: str, rules: set[str], family: str) -> None:
    assert {row["rule"] for row in realised_groups(name, build(name, tiny(family)))} == rules


@FAMILIES
def test_soaps_realised_share_is_what_its_state_rotates(family: str) -> None:
    model = tiny(family)
    optimizer = build("soap", model)
    trained(model, optimizer, steps=1)
    rotated = sum(p.numel() for p in model.parameters() if any(len(basis) > 0 for basis in optimizer.state[p]["Q"]))
    (row,) = [row for row in realised_groups("soap", optimizer) if row["rule"] == "soap"]
    assert 0 < rotated == row["parameters"]


def test_soap_leaves_axes_that_are_too_long_to_adam() -> None:
    toy = Toy()
    hyper = {**HYPER, "precondition_frequency": 2, "max_precondition_dim": 4}
    rows = {row["rule"]: row["parameters"] for row in realised_groups("soap", from_section("soap", hyper, toy))}
    assert rows == {"soap": 12, "adam": 8 * 12 + 12 * 5 + 36 + 40 + 3}  # only the readout's short axis is left


def test_realised_groups_hold_the_settings_of_their_group() -> None:
    rows = {row["rule"]: row["settings"] for row in realised_groups("muon", from_section("muon", MUON, Toy()))}
    assert rows["muon"]["momentum"] == 0.9
    assert tuple(rows["adamw"]["betas"]) == (0.8, 0.9)
    assert rows["muon"]["lr"] == rows["adamw"]["lr"] == 0.02


def test_schedule_free_refuses_a_step_in_its_averaged_state() -> None:
    toy = Toy()
    optimizer = from_section("schedule_free", HYPER, toy)
    trained(toy, optimizer)
    training = [parameter.detach().clone() for parameter in toy.parameters()]
    optimizer.eval()
    averaged = [parameter.detach().clone() for parameter in toy.parameters()]
    assert not any(torch.equal(left, right) for left, right in zip(training, averaged, strict=True))
    with pytest.raises(Exception, match="train mode"):
        optimizer.step()
    optimizer.train()
    for parameter, before in zip(toy.parameters(), training, strict=True):
        torch.testing.assert_close(parameter.detach(), before, rtol=1e-12, atol=1e-12)
