"""Realised groups say what each rule really treats, and an optimizer that treats other weights is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.optim.models import NEQUIP_FOUR_LAYERS, model_of
from tests.optim.test_configuration import build, trained
from tunebench.optim import SOAP, AdamW, Muon, SOAPMuon, matrix_groups
from tunebench.optim.matrix_view import FctpView, matrix_view
from tunebench.optim.realised import BrokenPromise, check_promise, realised_groups
from tunebench.study.search_space import SearchSpace, Treats, shipped_optimizers

OPTIMIZERS = pytest.mark.parametrize("name", shipped_optimizers())
FAMILIES = pytest.mark.parametrize("family", ["nequip", "allegro"])
VIEWS = pytest.mark.parametrize("view", list(FctpView))
Rows = list[dict[str, Any]]


def weights(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def by_rule(rows: Rows) -> dict[str, int]:
    """Parameters under each rule."""
    return {rule: sum(row["parameters"] for row in rows if row["rule"] == rule) for rule in {r["rule"] for r in rows}}


@OPTIMIZERS
@FAMILIES
def test_they_cover_every_weight_once(name: str, family: str) -> None:
    model = model_of(family)
    rows = realised_groups(build(name, model))
    assert sum(row["share"] for row in rows) == pytest.approx(1.0, abs=1e-12)
    assert sum(row["parameters"] for row in rows) == weights(model)
    assert all(row["blocks"] >= row["tensors"] >= 1 for row in rows)


@OPTIMIZERS
@FAMILIES
def test_every_shipped_optimizer_keeps_what_its_search_space_promises(name: str, family: str) -> None:
    model, space = model_of(family), SearchSpace.load(name)
    view = FctpView(str(space.defaults()["fctp_view"])) if space.treats is Treats.MATRICES else None
    check_promise(name, realised_groups(build(name, model)), model, view)


@pytest.mark.parametrize(
    ("name", "rules"),
    [
        ("adamw", {"adamw"}),
        ("lamb", {"lamb"}),
        ("muon", {"muon", "adamw"}),
        ("soap", {"soap", "adam"}),
        ("soap_muon", {"soap_muon", "adam"}),
    ],
)
@FAMILIES
def test_they_name_the_rule_that_treats_the_weights(name: str, rules: set[str], family: str) -> None:
    assert by_rule(realised_groups(build(name, model_of(family)))).keys() == rules


@VIEWS
@pytest.mark.parametrize("name", ["muon", "soap", "soap_muon"])
def test_the_own_rule_treats_the_blocks_of_the_view(name: str, view: FctpView) -> None:
    model = model_of("nequip")
    rows = [row for row in realised_groups(build(name, model, fctp_view=view.value)) if row["rule"] == name]
    promised = [block for block in matrix_view(model, fctp_view=view) if block.is_matrix]
    assert sum(row["blocks"] for row in rows) == len(promised)
    assert sum(row["parameters"] for row in rows) == sum(block.numel for block in promised)
    assert {row["view"] for row in rows} == {"matrix"} | ({view.value} - {"flat"})


def test_soaps_share_is_what_its_state_rotates() -> None:
    model = model_of("nequip", **NEQUIP_FOUR_LAYERS)
    optimizer = build("soap", model, fctp_view="merged", max_precondition_dim=200)
    trained(model, optimizer, steps=1)
    sides = {
        int(name.rpartition("/")[2]): stack.shape[0]
        for name, stack in optimizer.state["group 0"]["tensors"].items()  # type: ignore[index]
        if name.startswith("basis/")
    }
    rows = realised_groups(optimizer)
    assert max(sides) <= 200
    assert sum(sides.values()) == sum(row["blocks"] * row.get("rotated_sides", 0) for row in rows)


def test_soap_that_may_rotate_no_side_is_adam_and_is_called_so() -> None:
    model = model_of("nequip")
    assert by_rule(realised_groups(build("soap", model, max_precondition_dim=1))) == {"adam": weights(model)}
    assert "soap_muon" not in by_rule(realised_groups(build("soap_muon", model, max_precondition_dim=1)))


@pytest.mark.parametrize("sides", ["one", "two"])
def test_a_matrix_with_one_side_within_the_limit_is_soaps(sides: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 9, dtype=torch.float32))
    (row,) = realised_groups(SOAP([weight], max_precondition_dim=4, sides=sides))
    assert (row["rule"], row["rotated_sides"]) == ("soap", 1)


def test_parameter_groups_have_rows_and_settings_of_their_own() -> None:
    first, second = (torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.float32)) for _ in range(2))
    rows = realised_groups(Muon([{"params": [first], "lr": 0.1}, {"params": [second], "momentum": 0.5}]))
    assert [(row["settings"]["lr"], row["settings"]["momentum"]) for row in rows] == [(0.1, 0.95), (0.01, 0.5)]
    assert [row["share"] for row in rows] == [0.5, 0.5]


@OPTIMIZERS
def test_they_are_plain_data_without_the_blocks_themselves(name: str) -> None:
    rows = realised_groups(build(name, model_of("nequip")))
    assert json.loads(json.dumps(rows, allow_nan=False))[0]["rule"] == rows[0]["rule"]
    assert not any(key in row["settings"] for row in rows for key in ("params", "names", "blocks"))


def refusal(name: str, optimizer: Any, model: torch.nn.Module, view: FctpView | None = FctpView.MERGED) -> str:
    with pytest.raises(BrokenPromise) as caught:
        check_promise(name, realised_groups(optimizer), model, view)
    return str(caught.value)


def test_an_optimizer_that_sees_only_tensors_with_two_axes_is_refused_with_both_shares() -> None:
    model = model_of("nequip")
    line = refusal("soap", SOAP(model.parameters()), model, view=FctpView.PER_TYPE)
    assert line.startswith("soap: found soap on 5 matrix blocks (29.87 %")
    assert line.endswith(
        "allowed: 10 matrix and 1 per_type blocks (99.09 % of the weights), the matrices of fctp_view per_type"
    )
    assert "\n" not in line


def test_another_view_than_promised_is_refused_though_its_share_is_the_same() -> None:
    model = model_of("nequip")
    line = refusal("muon", Muon(matrix_groups(model, fctp_view="per_type")), model)
    assert "found muon on 10 matrix and 1 per_type blocks" in line
    assert "allowed: 10 matrix and 1 merged blocks" in line


def test_a_rule_that_treats_no_matrix_is_refused() -> None:
    model = model_of("allegro")
    flat = [torch.nn.Parameter(torch.zeros(5, dtype=torch.float32))]
    assert refusal("soap_muon", SOAPMuon(flat), model).startswith("soap_muon: found soap_muon on 0 blocks (0.00 %")
    assert refusal("soap", build("soap", model, max_precondition_dim=1), model).startswith(
        "soap: found soap on 0 blocks"
    )


def test_a_model_without_a_matrix_is_refused() -> None:
    table = torch.nn.Module()
    table.embed = torch.nn.Embedding(3, 4)
    assert (
        refusal("soap", SOAP(table.parameters()), table) == "soap: found no matrix in this model, allowed: at least one"
    )


def test_an_optimizer_of_all_weights_that_was_given_some_is_refused() -> None:
    model = model_of("nequip")
    optimizer = AdamW(list(model.parameters())[:3])
    line = refusal("adamw", optimizer, model, view=None)
    assert line.endswith(f"allowed: all {weights(model)} weights of the model")
