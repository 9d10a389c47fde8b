from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunebench.engine.padding import (
    GHOST_ATOMS,
    BatchShape,
    FrameSizes,
    batch_shape,
    filled,
    fits,
    padding_plan,
    smallest_shape,
)


def sizes_of(atoms, edges) -> FrameSizes:
    return FrameSizes(atoms=np.array(atoms, dtype=np.int64), edges=np.array(edges, dtype=np.int64))


@st.composite
def splits(draw) -> FrameSizes:
    frames = draw(st.integers(1, 12))
    atoms = draw(st.lists(st.integers(1, 60), min_size=frames, max_size=frames))
    edges = draw(st.lists(st.integers(0, 900), min_size=frames, max_size=frames))
    return sizes_of(atoms, edges)


@given(sizes=splits(), data=st.data())
def test_the_guaranteed_shape_holds_any_batch_of_distinct_frames_and_is_the_smallest(sizes: FrameSizes, data):
    batch_size = data.draw(st.integers(1, len(sizes)))
    shape = batch_shape(sizes, batch_size)
    batch = data.draw(st.permutations(range(len(sizes))))[:batch_size]
    assert fits(sizes, [batch], shape).all()
    most = np.argsort(sizes.atoms)[-batch_size:]
    assert shape.atoms == sizes.atoms[most].sum() + GHOST_ATOMS
    assert not fits(sizes, most, BatchShape(frames=shape.frames, atoms=shape.atoms - 1, edges=shape.edges))


@given(sizes=splits(), data=st.data())
def test_whole_orders_are_checked_at_once_as_batch_by_batch(sizes: FrameSizes, data):
    batch_size = data.draw(st.integers(1, 4))
    index = st.integers(0, len(sizes))  # the last one stands for no frame
    order = data.draw(st.lists(st.lists(index, min_size=batch_size, max_size=batch_size), min_size=1, max_size=6))
    shape = BatchShape(
        frames=batch_size + 1, atoms=data.draw(st.integers(3, 200)), edges=data.draw(st.integers(1, 2500))
    )
    expected = []
    for batch in order:
        atoms = sum(1 if frame == len(sizes) else int(sizes.atoms[frame]) for frame in batch)
        edges = sum(0 if frame == len(sizes) else int(sizes.edges[frame]) for frame in batch)
        expected.append(atoms <= shape.atoms - 2 and edges <= shape.edges)
    assert fits(sizes, order, shape).tolist() == expected
    assert fits(sizes, order, smallest_shape(sizes, np.array(order, dtype=np.int64))).all()


def test_frames_of_one_size_need_one_shape_that_wastes_only_the_ghost_atoms():
    plan = padding_plan(sizes_of([9] * 100, [72] * 100), batch_size=5)
    assert plan.usual == plan.guaranteed == BatchShape(frames=6, atoms=47, edges=360)
    assert plan.guaranteed_waste.atoms == pytest.approx(2 / 47)
    assert plan.guaranteed_waste.edges == pytest.approx(0.0, abs=1e-12)
    assert plan.misfits == 0.0


@pytest.mark.parametrize("large", [2, 100, 500])
def test_mixed_sizes_get_a_tighter_shape_that_holds_nearly_every_batch(large: int):
    atoms = np.full(1000, 10, dtype=np.int64)
    atoms[:large] = 80
    sizes = FrameSizes(atoms=atoms, edges=atoms * 12)
    plan = padding_plan(sizes, batch_size=8)
    assert plan.usual.atoms <= plan.guaranteed.atoms
    assert plan.usual.edges <= plan.guaranteed.edges
    assert (plan.usual.atoms < plan.guaranteed.atoms) == (large < 500)
    order = np.stack([np.random.default_rng(seed).permutation(1000).reshape(-1, 8) for seed in range(40)])
    misfits = 1 - fits(sizes, order, plan.usual).mean()
    assert misfits < 0.005
    assert plan.misfits < 0.003
    for shape, waste in ((plan.guaranteed, plan.guaranteed_waste), (plan.usual, plan.usual_waste)):
        held, _ = sizes.of_batches(order)
        assert waste.atoms == pytest.approx(1 - held.mean() / shape.atoms, abs=0.02)


def test_little_waste_or_a_small_saving_is_not_worth_a_second_shape():
    rng = np.random.default_rng(0)
    narrow = sizes_of([21] * 500, rng.integers(290, 310, 500))
    assert padding_plan(narrow, batch_size=5).usual == batch_shape(narrow, 5)
    assert padding_plan(narrow, batch_size=5, allowed_waste=0.0).usual == batch_shape(narrow, 5)
    wide = sizes_of([21] * 500, rng.integers(200, 400, 500))
    assert padding_plan(wide, batch_size=5).usual.edges < 0.95 * batch_shape(wide, 5).edges
    assert padding_plan(wide, batch_size=5, allowed_waste=0.5).usual == batch_shape(wide, 5)


@pytest.mark.parametrize("edges", [[71] * 100, [64] * 100, [1] * 50 + [400] * 50, [0] * 100])
def test_numbers_of_edges_are_multiples_where_that_is_asked(edges: list[int]):
    sizes = sizes_of([9] * 100, edges)
    plain, rounded = padding_plan(sizes, 4), padding_plan(sizes, 4, edges_in=32)
    for before, after in ((plain.guaranteed, rounded.guaranteed), (plain.usual, rounded.usual)):
        assert after.edges % 32 == 0
        assert 0 <= after.edges - before.edges < 32
        assert (after.frames, after.atoms) == (before.frames, before.atoms)


def test_a_split_always_gets_the_same_shapes():
    sizes = sizes_of(np.arange(1, 101), np.arange(1, 101) ** 2)
    assert padding_plan(sizes, 4) == padding_plan(sizes, 4)


def test_lone_atoms_leave_one_padding_edge():
    assert batch_shape(sizes_of([1, 1], [0, 0]), 2) == BatchShape(frames=3, atoms=4, edges=1)


def test_impossible_sizes_are_refused():
    sizes = sizes_of([3, 4], [6, 12])
    with pytest.raises(ValueError, match=r"batch_size: found 3, allowed: 1 to the number of frames, 2"):
        batch_shape(sizes, 3)
    with pytest.raises(ValueError, match=r"batch_size: found 0, allowed: 1 to"):
        padding_plan(sizes, 0)
    with pytest.raises(ValueError, match=r"indices: found batches of 1 frames, allowed: 2"):
        fits(sizes, [[0], [1]], batch_shape(sizes, 2))
    with pytest.raises(ValueError, match=r"edges: found shape \(1,\), allowed: that of the atoms, \(2,\)"):
        sizes_of([3, 4], [6])
    with pytest.raises(ValueError, match=r"found no frame or an empty one"):
        sizes_of([3, 0], [6, 0])


@given(sizes=splits(), others=splits(), data=st.data())
def test_a_split_is_filled_into_anothers_shape_in_order_and_as_far_as_it_goes(
    sizes: FrameSizes, others: FrameSizes, data
):
    batch_size = data.draw(st.integers(1, len(others)))
    shape = batch_shape(others, batch_size)
    alone = np.append(np.arange(len(sizes))[:, None], np.full((len(sizes), batch_size - 1), len(sizes)), axis=1)
    order = filled(sizes, shape)
    assert (order is not None) == bool(fits(sizes, alone, shape).all())
    if order is None:
        return
    assert fits(sizes, order, shape).all()
    assert order[order < len(sizes)].tolist() == list(range(len(sizes)))
    for batch, following in itertools.pairwise(order):
        if len(sizes) in batch:  # there is a place left, and no room for the next frame
            longer = batch.copy()
            longer[list(batch).index(len(sizes))] = following[0]
            assert not fits(sizes, longer, shape)
