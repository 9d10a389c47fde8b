from __future__ import annotations

import pytest
import torch
from torch._inductor import standalone_compile
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from tunebench.engine.rewrites import (
    constants_as_inputs,
    long_sums_in_parts,
    own_memory_for_scatter_bases,
    padded_sums_as_concatenations,
    simplify,
    small_products_as_sums,
)

aten = torch.ops.aten
SLOTS, ROWS, FEATURES, EDGES = 3, 5, 4, 7


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def traced(function, *inputs: torch.Tensor) -> GraphModule:
    return make_fx(lambda *tensors: [function(*tensors)], tracing_mode="fake")(*inputs)


def targets(module: GraphModule) -> set[str]:
    return {str(node.target) for node in module.graph.nodes if node.op == "call_function"}


def zeros(*shape: int) -> torch.Tensor:
    return aten.full.default(list(shape), 0.0, dtype=torch.float32)


def counted(length: int) -> torch.Tensor:
    kind = {"dtype": torch.int64, "device": torch.device("cpu"), "requires_grad": False}
    return torch.ops.prims.iota(length, start=1, step=2, **kind)


converted = torch.ops.prims.convert_element_type

REWRITTEN = {
    "views that change nothing": (lambda x: aten.alias(x.view(5, 4).permute(0, 1).expand(5, 4)) + 1, {"add.Tensor"}),
    "a view of a view": (lambda x: x.view(20).view(2, 10).view(4, 5), {"reshape.default"}),
    "a view and back": (lambda x: x.view(20).view(5, 4) * 2, {"mul.Tensor"}),
    "a slice of everything": (lambda x: x[:, 0 : 2**60] * 2, {"mul.Tensor"}),
    "a copy over a broadcast": (lambda x: aten.copy(aten.empty([5, 4], dtype=torch.float64), x[:1]), None),
    "overwriting everything": (lambda x: aten.slice_scatter(zeros(5, 4), x, 1, 0, 4) * 2, {"mul.Tensor"}),
    "a slice of zeros": (lambda x: aten.slice_scatter(zeros(5, 9), x, 1, 2, 6), {"constant_pad_nd.default"}),
    "a slice of something": (lambda x: aten.slice_scatter(x, x[:, :2] + 1, -1, 1, 3), None),
    "a slice at a negative place": (lambda x: aten.slice_scatter(x, x[:2] + 1, 0, -2), None),
    "every second row": (lambda x: aten.slice_scatter(x, x[:3] + 1, 0, 0, 5, 2), None),
    "a row of zeros": (lambda x: aten.select_scatter(zeros(3, 5, 4), x, 0, -1), None),
    "a row of something": (lambda x: aten.select_scatter(x, x[0] + 1, 0, 2), None),
    "constants": (lambda x: x + aten.full_like(x, 2.0) + counted(4), None),
    "casts": (lambda x: converted(converted(x, torch.float32), torch.float64), {"_to_copy.default"}),
    "rows by index": (lambda x: aten.index_select(x, 1, torch.tensor([3, 0, 0], dtype=torch.int64)), None),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_a_simplified_graph_computes_the_same_with_fewer_kinds_of_nodes(name):
    function, kinds = REWRITTEN[name]
    x = draw(5, 4)
    module = make_fx(lambda x: [function(x)], tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    (expected,) = module(x)
    simplify(module)
    (found,) = module(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    if kinds is not None:
        assert targets(module) == {f"aten.{kind}" for kind in kinds}


INDEX = torch.randint(ROWS, (SLOTS, EDGES), generator=torch.Generator().manual_seed(1), dtype=torch.int64)
SLOT = torch.arange(SLOTS, dtype=torch.int64).unsqueeze(1)
SOURCE = draw(SLOTS, EDGES, FEATURES, seed=2)
WIDE = INDEX.unsqueeze(-1).expand(-1, -1, FEATURES).contiguous()

BASES = {
    "an expanded constant": lambda x: zeros(1, ROWS, FEATURES).expand(SLOTS, ROWS, FEATURES),
    "a view of one": lambda x: zeros(1, ROWS * FEATURES).expand(SLOTS, -1).reshape(SLOTS, ROWS, FEATURES),
    "a transposed one": lambda x: zeros(1, FEATURES, ROWS).expand(SLOTS, -1, -1).permute(0, 2, 1),
    "an expanded input": lambda x: x.expand(SLOTS, ROWS, FEATURES),
    "an expanded result": lambda x: x.sin().expand(SLOTS, ROWS, FEATURES),
}
SCATTERS = {
    "index_put": lambda base, slot, index, wide, source: aten.index_put(base, [slot, index], source, True),
    "index_add": lambda base, slot, index, wide, source: aten.index_add(base, 1, index[0], source),
    "index_copy": lambda base, slot, index, wide, source: aten.index_copy(base, 1, index[0, :1], source[:, :1]),
    "scatter_add": lambda base, slot, index, wide, source: aten.scatter_add(base, 1, wide, source),
    "diagonal": lambda base, slot, index, wide, source: aten.diagonal_scatter(base, source[:, :4, 0], 0, 1, 2),
}


@pytest.mark.parametrize("scatter", SCATTERS)
def test_compiled_scatters_into_expanded_bases_keep_the_slots_apart(scatter):
    """Inductor (torch 2.13) lets all slots add into one for some of these; see the next test."""
    inputs = (draw(1, ROWS, FEATURES), SLOT, INDEX, WIDE, SOURCE)

    def every_base(x, *arguments):
        return torch.stack([SCATTERS[scatter](base(x), *arguments) for base in BASES.values()])

    module = traced(every_base, *inputs)
    (expected,) = module(*inputs)
    assert own_memory_for_scatter_bases(module) == len(BASES)
    (found,) = standalone_compile(module, list(inputs), dynamic_shapes="from_example_inputs")(*inputs)
    torch.testing.assert_close(found, expected)


def test_bases_with_their_own_memory_are_left_alone():
    inputs = (draw(SLOTS, ROWS, FEATURES), SLOT, INDEX, WIDE, SOURCE)
    module = traced(lambda x, *arguments: SCATTERS["index_put"](x * 2, *arguments), *inputs)
    assert own_memory_for_scatter_bases(module) == 0


def test_tensors_that_a_graph_holds_become_inputs():
    held = draw(5, 4, seed=3)
    module = make_fx(lambda x: [x * held + held], tracing_mode="fake", _allow_non_fake_inputs=True)(draw(5, 4))
    (expected,) = module(draw(5, 4))
    constants = constants_as_inputs(module)
    assert not any(node.op == "get_attr" for node in module.graph.nodes)
    assert len(constants) == 1
    assert torch.equal(module(draw(5, 4), *constants)[0], expected)


SMALL = {
    "tiny matrices on every edge": ((3000, 5, 4), (3000, 4, 7)),
    "a row on every edge": ((3000, 1, 3), (3000, 3, 7)),
    "a long table times a small matrix": ((3000, 5), (5, 9)),
}
LARGE = {
    "long sums": ((3000, 2, 32), (3000, 32, 3)),
    "few matrices": ((32, 137, 4), (32, 4, 64)),
    "a wide result": ((3000, 5), (5, 64)),
}


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_only_short_sums_over_many_matrices_are_written_out_and_keep_their_value(name):
    left, right = (draw(*shape) for shape in (SMALL | LARGE)[name])
    module = simplify(traced(torch.matmul, left, right))
    expected = torch.matmul(left, right)
    assert small_products_as_sums(module) == (name in SMALL)
    assert ("aten.sum.dim_IntList" in targets(module)) == (name in SMALL)
    (found,) = module(left, right)
    torch.testing.assert_close(found, expected)


LONG = {
    "the gradient of a weight on edges": (2392, slice(None), 8),
    "columns of a wider table": (2392, slice(0, 6), 8),
    "few divisors": (2 * 1201, slice(None), 2),
}
WHOLE = {
    "a prime number of edges": (2399, slice(None)),
    "atoms": (137, slice(None)),
}


@pytest.mark.parametrize("name", [*LONG, *WHOLE])
def test_long_sums_over_rows_are_taken_in_parts_and_keep_their_value(name):
    rows, columns, *parts = (LONG | WHOLE)[name]
    left, right = draw(SLOTS, rows, FEATURES), draw(SLOTS, rows, 9, seed=1)

    def gradient(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left.transpose(1, 2) @ right[:, :, columns]

    module = simplify(traced(gradient, left, right))
    assert long_sums_in_parts(module) == len(parts)
    stacks = [product.shape[0] for product in _results(module, aten.bmm.default)]
    assert stacks == [SLOTS * (parts[0] if parts else 1)]
    (found,) = module(left, right)
    torch.testing.assert_close(found, gradient(left, right), rtol=1e-5, atol=1e-4)
    in_double = gradient(left.double(), right.double())
    assert (found - in_double).norm() < 1e-6 * in_double.norm()


def test_sums_whose_parts_would_have_to_be_copied_stay_whole():
    left, right = draw(SLOTS, FEATURES, 2392), draw(SLOTS, 2392, 9)
    module = simplify(traced(torch.matmul, left, right))
    assert not long_sums_in_parts(module)
    assert torch.equal(module(left, right)[0], left @ right)


PADDED = {
    "side by side": ([(0, 2), (2, 5), (5, 9)], 1),
    "with gaps": ([(1, 2), (4, 8)], 1),
    "two in one place": ([(0, 4), (4, 9), (0, 4)], 1),
    "in any order": ([(5, 9), (0, 5)], 1),
    "overlapping": ([(0, 5), (4, 9)], 0),
    "one place": ([(0, 5), (0, 5)], 0),
}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_sums_of_padded_slices_become_concatenations_of_the_same_bits(name, dim):
    places, rewritten = PADDED[name]
    shape = [9, 9, 9]

    def total(*parts: torch.Tensor) -> torch.Tensor:
        behind = [0, 0] * (2 - dim)
        padded = [
            torch.constant_pad_nd(part, [*behind, start, 9 - end])
            for part, (start, end) in zip(parts, places, strict=True)
        ]
        return sum(padded[1:], start=padded[0]) * 2.0

    sizes = [[end - start if axis == dim else size for axis, size in enumerate(shape)] for start, end in places]
    parts = [draw(*size, seed=seed) for seed, size in enumerate(sizes)]
    module = simplify(traced(total, *parts))
    assert padded_sums_as_concatenations(module) == rewritten
    assert ("aten.cat.default" in targets(module)) == bool(rewritten)
    assert ("aten.constant_pad_nd.default" in targets(module)) != bool(rewritten)
    assert torch.equal(module(*parts)[0], total(*parts))


def test_a_padded_term_beside_another_kind_of_term_stays_a_sum():
    part, whole = draw(3, 4), draw(3, 9)
    module = simplify(traced(lambda part, whole: torch.constant_pad_nd(part, [0, 5]) + whole, part, whole))
    assert not padded_sums_as_concatenations(module)


def test_a_sum_that_others_read_too_is_one_of_its_own():
    def both(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        pair = torch.constant_pad_nd(left, [0, 5]) + torch.constant_pad_nd(right, [4, 0])
        return (pair + torch.constant_pad_nd(right, [4, 0])) * pair

    left, right = draw(3, 4), draw(3, 5)
    module = simplify(traced(both, left, right))
    assert padded_sums_as_concatenations(module) == 1
    assert torch.equal(module(left, right)[0], both(left, right))


def _results(module: GraphModule, target: object) -> list[torch.Tensor]:
    return [node.meta["val"] for node in module.graph.nodes if node.target is target]
