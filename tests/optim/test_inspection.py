from __future__ import annotations

from typing import Any

import pytest
import torch
from nequip.data import AtomicDataDict

from tests.optim.models import ALLEGRO_TWO_LAYERS, NEQUIP_FOUR_LAYERS, model_of
from tunebench.optim.inspection import inspect_blocks, matrix_reach, touched_by_gradient
from tunebench.optim.matrix_view import FctpView, matrix_view
from tunebench.workloads.data import PreparedData
from tunebench.workloads.frames import prepared_frames

TYPES = ("H", "C", "O")
Batch = dict[str, Any]


@pytest.fixture(scope="module")
def batch(prepared_ethanol: PreparedData) -> Batch:
    """Two frames of ethanol: three species."""
    assert prepared_ethanol.type_names == TYPES
    frames = prepared_frames(prepared_ethanol, "train", 3.0)
    return AtomicDataDict.batched_from_list([frames[0], frames[1]])


def ethanol_model(family: str, **arguments: Any) -> torch.nn.Module:
    return model_of(family, TYPES, **arguments)


def test_with_parity_a_quarter_of_a_four_layer_nequip_never_gets_a_gradient(batch: Batch) -> None:
    model = ethanol_model("nequip", **NEQUIP_FOUR_LAYERS, parity=True)
    rows = inspect_blocks(matrix_view(model), touched_by_gradient(model, [batch]))
    assert 100 * sum(row.share * (1 - row.live_share) for row in rows) == pytest.approx(23.2, abs=0.05)
    # No unnatural parity reaches the last layer's scalars: whole paths, and gates and weights that only serve them.
    assert sum(row.live_share == 0 for row in rows) == 8
    partly = {(row.tensor.removeprefix("model.func."), row.path) for row in rows if 0 < row.live_share < 1}
    assert partly == {
        ("layer2_convnet.conv.edge_mlp.mlp.4.weight", ""),
        ("layer2_convnet.conv.linear_2.weight", "0e -> 0e"),
        ("layer2_convnet.conv.sc.weight", "0e x 0e -> 0e"),
    }


def test_a_split_head_shows_which_of_its_paths_are_dead(batch: Batch) -> None:
    model = ethanol_model("nequip", l_max=2, parity=True, num_layers=3, num_features=4)
    rows = inspect_blocks(matrix_view(model, split_heads=True), touched_by_gradient(model, [batch]))
    heads = [row for row in rows if ".layer1_convnet.conv.edge_mlp.mlp.2" in row.tensor]
    assert {row.live_share for row in heads} == {0.0, 1.0}
    assert {row.path.split()[-1] for row in heads if row.live_share == 0} == {"1e", "2o"}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_without_parity_every_element_of_nequip_lives(batch: Batch, dtype: str) -> None:
    model = ethanol_model("nequip", l_max=2, num_layers=4, num_features=8, dtype=dtype)
    assert all(bool(mask.all()) for mask in touched_by_gradient(model, [batch]).values())


def test_every_element_of_allegro_lives(batch: Batch) -> None:
    model = ethanol_model("allegro", l_max=2, parity=True)
    assert all(bool(mask.all()) for mask in touched_by_gradient(model, [batch]).values())


def test_training_steps_leave_dead_elements_where_they_were(batch: Batch) -> None:
    model = ethanol_model("nequip", parity=True, num_layers=3, num_features=4, dtype="float64")
    touched = touched_by_gradient(model, [batch])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-15)
    for _ in range(2):
        optimizer.zero_grad()
        predicted = model(dict(batch))
        loss = (predicted["total_energy"] - batch["total_energy"]).square().mean()
        (loss + (predicted["forces"] - batch["forces"]).square().mean()).backward()
        optimizer.step()
    assert not all(bool(mask.all()) for mask in touched.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach() != before[name], touched[name])


def test_the_gradient_of_a_product_has_the_rank_of_the_number_of_species(batch: Batch) -> None:
    model = ethanol_model("nequip", l_max=2, num_layers=3, num_features=16, dtype="float64")
    predicted = model(dict(batch))
    (predicted["total_energy"].sum() + predicted["forces"].square().sum()).backward()
    products = [b for b in matrix_view(model, fctp_view=FctpView.PER_TYPE) if b.parameter.endswith("sc.weight")]
    assert len(products) == 4
    for block in products:
        gradient = model.get_parameter(block.parameter).grad.flatten()[block.index()]
        strengths = torch.linalg.svdvals(gradient.flatten(1))
        assert block.shape[1] == 16
        assert int((strengths > 1e-10 * strengths[0]).sum()) == len(TYPES)


def test_looking_for_gradients_leaves_the_model_as_it_was(batch: Batch) -> None:
    model = ethanol_model("nequip").eval()
    keys = set(batch)
    touched_by_gradient(model, [batch])
    assert not model.training
    assert set(batch) == keys
    assert all(parameter.grad is None for parameter in model.parameters())


def test_without_a_batch_nothing_is_called_dead_or_alive() -> None:
    rows = inspect_blocks(matrix_view(ethanol_model("nequip")))
    assert {row.live_share for row in rows} == {None}
    assert sum(row.share for row in rows) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(
    ("family", "arguments", "reach"),
    [
        (
            "nequip",
            {**NEQUIP_FOUR_LAYERS, "parity": True},
            {
                "fctp_view flat": 27.2,
                "fctp_view per_type": 99.98,
                "fctp_view merged": 99.98,
                "tensors with two axes": 15.3,
                "nequip.model.MuonParamGroups": 27.2,
            },
        ),
        (
            "allegro",
            ALLEGRO_TWO_LAYERS,
            {
                "fctp_view merged": 94.5,
                "tensors with two axes": 100.0,
                "nequip.model.MuonParamGroups": 0.0,
                "allegro.model.MuonParamGroups": 94.5,
            },
        ),
    ],
)
def test_views_and_the_libraries_own_groups_reach_what_the_documentation_says(
    family: str, arguments: dict[str, Any], reach: dict[str, float], batch: Batch
) -> None:
    model = model_of(family, (*TYPES, "N"), **arguments)
    found = {row.chosen_by: row for row in matrix_reach(model, touched_by_gradient(model, [batch]))}
    for chosen_by, percent in reach.items():
        assert 100 * found[chosen_by].share == pytest.approx(percent, abs=0.06)
    if family == "nequip":
        assert found["fctp_view merged"].share_of_live > 0.9995
        assert found["fctp_view merged"].share_of_live < found["fctp_view merged"].share
