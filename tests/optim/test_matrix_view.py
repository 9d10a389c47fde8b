from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from nequip.model import ModelFromCheckpoint, ModelFromPackage

from tests.engine.conftest import MakeTask, Reports, make_task  # noqa: F401  # the fixture of a short trial
from tests.forked import nequip_command
from tests.optim.models import ALLEGRO_TWO_LAYERS, NEQUIP_FOUR_LAYERS, SPLINE, model_of
from tunebench.engine.checkpoints import FINAL, checkpoint_folder
from tunebench.engine.lightning import run_trial
from tunebench.optim.blocks import Block, View
from tunebench.optim.matrix_view import FctpView, matrix_view, trainable_parameters
from tunebench.optim.packing import Packing
from tunebench.study.record import Stage

LENNARD_JONES = {
    "_target_": "nequip.nn.pair_potential.LennardJones",
    "lj_sigma": 1.0,
    "lj_epsilon": 0.1,
    "lj_delta": 0.0,
    "lj_sigma_trainable": True,
    "lj_epsilon_trainable": True,
}
TRAINABLE = {
    "per_type_energy_scales_trainable": True,
    "per_type_energy_shifts_trainable": True,
    "pair_potential": LENNARD_JONES,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "nequip, l 1": ("nequip", {}),
    "nequip, l 1, parity": ("nequip", {"parity": True, "num_layers": 3}),
    "nequip, l 2, parity": ("nequip", {"parity": True, "l_max": 2, "num_layers": 4, "num_features": 4}),
    "nequip, features by l": ("nequip", {"l_max": 2, "num_features": [8, 4, 2], "num_layers": 3}),
    "nequip, small type embedding": ("nequip", {"type_embed_num_features": 5, "num_layers": 3}),
    "nequip, one-dimensional type embedding": ("nequip", {"type_embed_num_features": 1}),
    "nequip, readout network": ("nequip", {"readout_mlp_hidden_layers_depth": 2}),
    "nequip, all trainable": ("nequip", {"bessel_trainable": True, **TRAINABLE}),
    "nequip, float64": ("nequip", {"dtype": "float64"}),
    "allegro": ("allegro", {}),
    "allegro, coupled": ("allegro", {"tp_path_channel_coupling": True, "l_max": 2, "parity": True}),
    "allegro, one layer": ("allegro", {"num_layers": 1}),
    "allegro, spline": ("allegro", {"radial_chemical_embed": SPLINE}),
    "allegro, linear networks": ("allegro", {"allegro_mlp_nonlinearity": None}),
    "allegro, one weight for all irreps": ("allegro", {"weight_individual_irreps": False}),
    "allegro, all trainable": ("allegro", TRAINABLE),
}
EVERY_MODEL = pytest.mark.parametrize(("family", "arguments"), MODELS.values(), ids=list(MODELS))
EVERY_VIEW = pytest.mark.parametrize("fctp_view", FctpView)


def blocks_of(model: torch.nn.Module, parameter: str, **views: Any) -> list[Block]:
    return [block for block in matrix_view(model, **views) if block.parameter.endswith(parameter)]


def matrices(blocks: tuple[Block, ...]) -> list[Block]:
    return [block for block in blocks if block.is_matrix]


@EVERY_MODEL
@EVERY_VIEW
@pytest.mark.parametrize("split_heads", [False, True])
def test_every_trainable_element_is_in_exactly_one_block(
    family: str, arguments: dict[str, Any], fctp_view: FctpView, split_heads: bool
) -> None:
    model = model_of(family, **arguments)
    seen = {name: torch.zeros(p.numel(), dtype=torch.int64) for name, p in model.named_parameters() if p.requires_grad}
    for block in matrix_view(model, fctp_view=fctp_view, split_heads=split_heads):
        index = block.index().flatten()
        seen[block.parameter].index_add_(0, index, torch.ones_like(index))
    assert seen
    assert all(bool((count == 1).all()) for count in seen.values())


@EVERY_MODEL
def test_a_matrix_has_at_least_two_rows_and_two_columns(family: str, arguments: dict[str, Any]) -> None:
    model = model_of(family, **arguments)
    for view in FctpView:
        for block in matrices(matrix_view(model, fctp_view=view, split_heads=True)):
            assert min(block.matrices[1:]) > 1


@EVERY_MODEL
def test_e3nns_own_views_are_the_blocks(family: str, arguments: dict[str, Any]) -> None:
    model = model_of(family, **arguments)
    owners = {f"{name}.weight": m for name, m in model.named_modules() if getattr(m, "internal_weights", False)}
    owners = {name: module for name, module in owners.items() if module.weight.numel()}
    assert bool(owners) == (family == "nequip")
    for name, module in owners.items():
        positions = torch.arange(module.weight.numel())
        theirs = list(module.weight_views(positions))
        merged = blocks_of(model, name, fctp_view=FctpView.MERGED)
        per_type = blocks_of(model, name, fctp_view=FctpView.PER_TYPE)
        for mine, view in zip(merged, theirs, strict=True):
            assert mine.shape == tuple(view.shape)
            assert torch.equal(mine.index().flatten(), view.flatten())
        for mine, view in zip(per_type, theirs, strict=True):
            if mine.view is View.PER_TYPE:
                assert all(torch.equal(mine.index()[v], view[:, v]) for v in range(view.shape[1]))


def test_merging_types_into_rows_is_the_map_from_features_times_types() -> None:
    product = next(m for m in model_of("nequip").modules() if type(m).__name__ == "FullyConnectedTensorProduct")
    (block,) = blocks_of(model_of("nequip"), "sc.weight", fctp_view=FctpView.MERGED)
    generator = torch.Generator().manual_seed(0)
    scalars, types = (torch.randn(6, 16, generator=generator, dtype=torch.float32) for _ in range(2))
    features = torch.zeros(6, product.irreps_in1.dim, dtype=torch.float32)
    features[:, product.irreps_in1.slices()[0]] = scalars
    together = torch.einsum("zu,zv->zuv", scalars, types).flatten(1)
    by_matrix = together @ product.weight.detach()[block.index()[0]]
    torch.testing.assert_close(product(features, types).detach() * 16.0, by_matrix, rtol=1e-4, atol=1e-4)


def test_a_block_of_a_convolutions_head_makes_the_weights_of_one_path_and_no_other() -> None:
    model = model_of("nequip", l_max=2, parity=True, num_layers=3)
    name, layer = next((n, m) for n, m in model.named_modules() if n.endswith("layer1_convnet.conv"))
    head = layer.edge_mlp.mlp[-1].weight
    inputs = torch.randn(5, layer.edge_mlp.dims[0], generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    product = layer.tp_scatter.tp
    blocks = blocks_of(model, f"{name}.edge_mlp.mlp.2.weight", split_heads=True)
    assert len(blocks) == len(product.instructions) > 5
    before = list(product.weight_views(layer.edge_mlp(inputs).detach()))
    for index, block in enumerate(blocks):
        after = product.weight_views(with_zeros(head, block, layer.edge_mlp, inputs))
        changed = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
        assert changed == [other == index for other in range(len(blocks))]


@pytest.mark.parametrize("which", ["env_embed_linear", "first_layer_env_embed_projection", "latents.0"])
def test_a_block_of_allegros_head_makes_the_weights_of_one_irrep_and_no_other(which: str) -> None:
    model = model_of("allegro", l_max=2)
    name, mlp = next((n, m) for n, m in model.named_modules() if n.endswith(which))
    last = list(mlp.parameters())[-1]
    blocks = [block for block in matrix_view(model, split_heads=True) if block.parameter.startswith(f"{name}.")]
    blocks = [block for block in blocks if block.path]
    assert [block.path for block in blocks] == ([] if which == "env_embed_linear" else ["scalars"]) + ["0e", "1o", "2e"]
    weighter = next(m for m in model.modules() if type(m).__name__ == "MakeWeightedChannels")
    inputs = torch.randn(5, mlp.dims[0], generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    harmonics = torch.ones(5, 9, dtype=torch.float32)
    for block in blocks:
        outputs = with_zeros(last, block, mlp, inputs)
        scalars, weights = outputs[:, : -weighter.weight_numel], outputs[:, -weighter.weight_numel :]
        weighted = weighter(harmonics, weights)
        zero = {path: not bool(weighted[..., part].any()) for path, part in (("0e", 0), ("1o", 1), ("2e", 4))}
        if scalars.numel():
            zero["scalars"] = not bool(scalars.any())
        assert [path for path, is_zero in zero.items() if is_zero] == [block.path]


def with_zeros(weight: torch.Tensor, block: Block, mlp: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """What a network gives where one block of its last weight is zero; the weight is put back."""
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[block.index().flatten()] = 0.0
        outputs: torch.Tensor = mlp(inputs)
        weight.copy_(kept)
    return outputs


@pytest.mark.parametrize(
    ("family", "arguments", "parameters", "share", "blocks", "shapes", "sliced"),
    [
        ("nequip", {**NEQUIP_FOUR_LAYERS, "parity": True}, 765_088, 99.98, 51, 15, 330),
        ("nequip", {**NEQUIP_FOUR_LAYERS, "parity": False}, 489_632, 99.97, 39, 11, 256),
        ("allegro", ALLEGRO_TWO_LAYERS, 126_176, 94.5, 11, 9, 11),
        ("allegro", {**ALLEGRO_TWO_LAYERS, "radial_chemical_embed": SPLINE}, 133_600, 88.9, 10, 8, 10),
    ],
)
def test_views_reach_what_the_documentation_says(
    family: str, arguments: dict[str, Any], parameters: int, share: float, blocks: int, shapes: int, sliced: int
) -> None:
    model = model_of(family, **arguments)
    found = matrices(matrix_view(model, fctp_view=FctpView.PER_TYPE))
    total = sum(p.numel() for p in model.parameters())
    assert total == parameters
    assert 100 * sum(block.numel for block in found) / total == pytest.approx(share, abs=0.05)
    assert len(found) == blocks
    assert len({block.shape for block in found}) == shapes
    assert sum(block.matrices[0] for block in found) == sliced


def test_flat_leaves_the_product_to_the_auxiliary_rule_and_the_others_do_not() -> None:
    model = model_of("nequip", num_layers=3)
    views = {view: {block.view for block in blocks_of(model, "sc.weight", fctp_view=view)} for view in FctpView}
    assert views == {
        FctpView.FLAT: {View.VECTOR},
        FctpView.PER_TYPE: {View.PER_TYPE},
        FctpView.MERGED: {View.MERGED},
    }


@EVERY_MODEL
def test_tables_readouts_and_coefficients_are_vectors(family: str, arguments: dict[str, Any]) -> None:
    for block in matrix_view(model_of(family, **arguments), split_heads=True):
        tables = ("embed_module", "_embed.weight", "readout", "scale_shift", "tps", "bessel_weights", "pair_potential")
        if any(table in block.parameter for table in tables):
            assert block.view is View.VECTOR


def test_a_product_of_matrices_is_one_block_for_each() -> None:
    model = model_of("allegro", allegro_mlp_nonlinearity=None)
    found = matrices(tuple(blocks_of(model, "latents.0.mlp.weights.0") + blocks_of(model, "latents.0.mlp.weights.1")))
    assert [block.shape for block in found] == [(24, 32), (32, 32)]


def test_allegros_spline_stays_float64_beside_float32_matrices() -> None:
    model = model_of("allegro", radial_chemical_embed=SPLINE)
    packing = Packing(trainable_parameters(model), matrix_view(model))
    assert [segment.name for segment in packing.segments] == [
        "matrix float32",
        "auxiliary float32",
        "auxiliary float64",
    ]
    (spline,) = packing.segments[2].blocks
    assert spline.parameter.endswith("spline.class_embed.weight")


def test_frozen_parameters_have_no_block() -> None:
    model = model_of("nequip")
    frozen = next(name for name, _ in model.named_parameters() if name.endswith("sc.weight"))
    model.get_parameter(frozen).requires_grad_(False)
    assert frozen not in {block.parameter for block in matrix_view(model)}
    assert frozen not in trainable_parameters(model)


def test_a_shared_parameter_is_covered_once() -> None:
    model = model_of("nequip")
    both = torch.nn.ModuleDict({"first": model, "again": model})
    blocks = matrix_view(both)
    assert len(blocks) == len(matrix_view(model))
    assert {block.parameter.split(".")[0] for block in blocks} == {"first"}


@pytest.mark.parametrize(
    ("layer", "name", "kind"),
    [
        (torch.nn.Linear(3, 4, dtype=torch.float32), "extra.weight", "Linear"),  # stores (out, in), unlike e3nn's
        (torch.nn.LayerNorm(3, dtype=torch.float32), "extra.weight", "LayerNorm"),
    ],
)
def test_an_unknown_tensor_is_refused_by_name(layer: torch.nn.Module, name: str, kind: str) -> None:
    model = model_of("nequip")
    model.extra = layer
    shape = str(tuple(layer.weight.shape)).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"^{name}: found a trainable tensor of shape {shape} in a {kind}, allowed: "):
        matrix_view(model)


def test_a_parametrised_weight_is_refused_because_its_parts_are_not_the_map() -> None:
    model = model_of("allegro")
    layer = next(m for m in model.modules() if type(m).__name__ == "ScalarLinearLayer")
    torch.nn.utils.parametrizations.spectral_norm(layer, "weight", dim=1)
    with pytest.raises(ValueError, match=r"parametrizations\.weight\.original: found .* in a ParametrizationList"):
        matrix_view(model)


@pytest.mark.parametrize("family", ["nequip", "allegro"])
def test_a_model_from_a_checkpoint_or_a_package_has_the_same_blocks(
    make_task: MakeTask,  # noqa: F811
    tmp_path: Path,
    family: str,
) -> None:
    task = make_task(family=family, stage=Stage.CONFIRM, steps=2, evaluation_steps=(2,))
    run_trial(task, Reports())
    checkpoint = checkpoint_folder(task.run, task.key.trial_id) / FINAL
    package = tmp_path / "model.nequip.zip"
    nequip_command("nequip-package", "build", str(checkpoint), str(package), folder=tmp_path)

    built = model_of(family, types=tuple(task.data.type_names))
    for loaded in (ModelFromCheckpoint(str(checkpoint)), ModelFromPackage(str(package))):
        for split_heads in (False, True):
            expected = Counter(without_prefix(block) for block in matrix_view(built, split_heads=split_heads))
            assert Counter(without_prefix(block) for block in matrix_view(loaded, split_heads=split_heads)) == expected


def without_prefix(block: Block) -> tuple[Any, ...]:
    name = block.parameter.removeprefix("sole_model.")
    return name, block.path, block.offset, block.shape, block.strides, block.view
