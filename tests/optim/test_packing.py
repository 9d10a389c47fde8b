from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.optim.models import SPLINE, model_of
from tunebench.optim.blocks import Block, View
from tunebench.optim.matrix_view import FctpView, matrix_view, trainable_parameters
from tunebench.optim.packing import Packing, Tensors

TREES = [("nequip", {"num_layers": 3, "parity": True}), ("allegro", {"radial_chemical_embed": SPLINE})]
EVERY_TREE = pytest.mark.parametrize(("family", "arguments"), TREES)
EVERY_VIEW = pytest.mark.parametrize("fctp_view", FctpView)


def numbered(parameters: dict[str, Any], seed: int = 0) -> Tensors:
    """Tensors shaped as the parameters whose elements are all different."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [p.numel() for p in parameters.values()]
    numbers = torch.randperm(sum(sizes), generator=generator).split(sizes)
    pairs = zip(parameters.items(), numbers, strict=True)
    return {name: part.to(p.dtype).reshape(p.shape) for (name, p), part in pairs}


def packed_model(family: str, arguments: dict[str, Any], **views: Any) -> tuple[Packing, dict[str, Any]]:
    model = model_of(family, **arguments)
    parameters = trainable_parameters(model)
    return Packing(parameters, matrix_view(model, **views)), parameters


@EVERY_TREE
@EVERY_VIEW
@pytest.mark.parametrize("split_heads", [False, True])
def test_unpacking_undoes_packing(
    family: str, arguments: dict[str, Any], fctp_view: FctpView, split_heads: bool
) -> None:
    packing, parameters = packed_model(family, arguments, fctp_view=fctp_view, split_heads=split_heads)
    tensors = numbered(parameters)
    packed = packing.pack(tensors)
    assert sum(vector.numel() for vector in packed.values()) == sum(p.numel() for p in parameters.values())
    back = packing.unpack(packed)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert all(back[name].dtype is tensors[name].dtype for name in tensors)


@EVERY_TREE
@EVERY_VIEW
def test_a_bucket_holds_its_blocks_one_after_the_other_and_none_is_taller_than_wide(
    family: str, arguments: dict[str, Any], fctp_view: FctpView
) -> None:
    packing, parameters = packed_model(family, arguments, fctp_view=fctp_view, split_heads=True)
    tensors = numbered(parameters)
    packed = packing.pack(tensors)
    for segment in packing.segments:
        found = [block for bucket in segment.buckets for block in bucket.of(packed[segment.name])]
        maps = [each for bucket in segment.buckets for each in bucket.maps()]
        for block, values, (rows, cols) in zip(segment.blocks, found, maps, strict=True):
            stored = tensors[block.parameter].flatten()[block.index()]
            assert stored.shape[1:] == (rows, cols)
            assert torch.equal(values, stored.mT if rows > cols else stored)
            assert values.shape[1] <= values.shape[2]


@EVERY_TREE
def test_buckets_cover_their_segment_in_order_and_no_two_have_one_shape(family: str, arguments: dict[str, Any]) -> None:
    packing, _ = packed_model(family, arguments)
    for segment in packing.segments:
        assert [bucket.start for bucket in segment.buckets] == [0, *(bucket.stop for bucket in segment.buckets[:-1])]
        assert segment.buckets[-1].stop == segment.numel
        shapes = [(bucket.batch, bucket.rows, bucket.cols) for bucket in segment.buckets]
        assert len(set(shapes)) == len(shapes)


@EVERY_TREE
def test_slots_are_packed_as_each_would_be_alone(family: str, arguments: dict[str, Any]) -> None:
    packing, parameters = packed_model(family, arguments, split_heads=True)
    slots = [numbered(parameters, seed) for seed in range(3)]
    stacked = {name: torch.stack([slot[name] for slot in slots]) for name in parameters}
    packed = torch.func.vmap(packing.pack)(stacked)
    for number, slot in enumerate(slots):
        alone = packing.pack(slot)
        assert all(torch.equal(packed[name][number], alone[name]) for name in alone)
    back = torch.func.vmap(packing.unpack)(packed)
    assert all(torch.equal(back[name], stacked[name]) for name in stacked)


@EVERY_TREE
def test_neither_the_order_of_parameters_nor_that_of_blocks_matters(family: str, arguments: dict[str, Any]) -> None:
    packing, parameters = packed_model(family, arguments, split_heads=True)
    shuffle = random.Random(0).sample
    names, blocks = shuffle(list(parameters), len(parameters)), shuffle(packing.blocks, len(packing.blocks))
    other = Packing({name: parameters[name] for name in names}, blocks)
    assert other.segments == packing.segments
    tensors = numbered(parameters)
    one, two = packing.pack(tensors), other.pack({name: tensors[name] for name in names})
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_sums_and_spreads_go_by_block() -> None:
    packing, parameters = packed_model("nequip", {"parity": True}, split_heads=True)
    packed = packing.pack(numbered(parameters))
    for segment in packing.segments:
        values = packed[segment.name].double()
        sums = segment.block_sums(values)
        pieces = values.split([block.numel for block in segment.blocks])
        assert torch.equal(sums, torch.stack([piece.sum() for piece in pieces]))
        spread = segment.spread(sums).split([block.numel for block in segment.blocks])
        assert all(bool((piece == total).all()) for piece, total in zip(spread, sums, strict=True))


def test_elementwise_packing_has_one_segment_per_dtype_and_looks_at_no_shape() -> None:
    parameters = trainable_parameters(model_of("allegro", radial_chemical_embed=SPLINE))
    packing = Packing.elementwise(parameters)
    assert [segment.dtype for segment in packing.segments] == [torch.float32, torch.float64]
    assert not any(segment.is_matrix for segment in packing.segments)
    tensors = numbered(parameters)
    back = packing.unpack(packing.pack(tensors))
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


MATRIX = {"weight": torch.zeros(4, 6, dtype=torch.float32)}
WHOLE = Block.whole("weight", (4, 6), View.MATRIX)


def test_an_element_in_two_blocks_is_refused_by_name() -> None:
    again = Block("weight", "column", 2, (4, 1), (6, 1), View.VECTOR)
    with pytest.raises(ValueError, match=r"^weight: found 4 elements in no block or in several, allowed: each in exa"):
        Packing(MATRIX, [WHOLE, again])


def test_an_element_in_no_block_is_refused_by_name() -> None:
    left = Block("weight", "columns 0:5", 0, (4, 5), (6, 1), View.MATRIX)
    with pytest.raises(ValueError, match=r"^weight: found 4 elements in no block or in several, allowed: each in exa"):
        Packing(MATRIX, [left])
    with pytest.raises(ValueError, match=r"^weight: found 24 elements in no block"):
        Packing(MATRIX, [])


def test_a_block_beyond_its_parameter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^weight: found a block that ends at element 24, beyond its end"):
        Packing(MATRIX, [replace(WHOLE, offset=1)])


def test_a_block_of_a_parameter_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^block of bias: found no such parameter, allowed: weight$"):
        Packing(MATRIX, [WHOLE, Block.whole("bias", (6,))])


def test_a_block_with_the_wrong_number_of_axes_for_its_view_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^weight: found shape \(24,\), allowed for matrix: 2 axes$"):
        Block.whole("weight", (24,), View.MATRIX)
