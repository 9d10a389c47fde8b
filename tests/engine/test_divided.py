from __future__ import annotations

import io
import weakref

import pytest
import torch
from torch._inductor.standalone_compile import CompiledArtifact
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from tests.engine.test_fused import WEIGHTS, make_slots
from tests.engine.test_rewrites import draw
from tunebench.engine.compile_part import compile_at_once
from tunebench.engine.divided import Divided, Division, divide
from tunebench.engine.fused import LossGradient, joint_graph
from tunebench.engine.rewrites import constants_as_inputs


def traced(function, *inputs: torch.Tensor) -> GraphModule:
    return make_fx(lambda *tensors: list(function(*tensors)), tracing_mode="fake")(*inputs)


def calls(graph: GraphModule) -> list[str]:
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


def same(found, expected) -> bool:
    return all(
        torch.equal(one, other) and one.stride() == other.stride() for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("family", ["nequip", "allegro"])
def test_the_parts_of_a_loss_gradient_compute_its_bits(prepared_ethanol, family):
    slots = make_slots(prepared_ethanol, family, "float32")
    function = LossGradient(slots.function, WEIGHTS)
    example = slots.stacked(function.batch_keys)
    module, layout = joint_graph(function, example)
    inputs = [*layout.inputs(example), *constants_as_inputs(module)]
    expected = module(*inputs)
    whole = len(calls(module))
    for count in (1, 2, 3, 5):
        division, graphs = divide(module, inputs, count)
        assert len(division.parts) == len(graphs) == count
        assert same(Divided(division, graphs)(*inputs), expected)
        assert max(len(calls(graph)) for graph in graphs) < 2 * whole / count
    assert calls(divide(module, inputs, 1)[1][0]) == calls(module)


def views_and_sums(x, y):
    product = x @ y
    turned = product.t().reshape(-1)
    shifted = torch.sin(product) + torch.full([4, 6], 2.0, dtype=torch.float32)
    largest, where = torch.topk(shifted, 2)
    return turned.reshape(6, 4) * 2, largest + 1, where, x, shifted.t() + turned.reshape(6, 4)


def test_views_and_constants_are_taken_anew_and_tuples_stay_in_one_part():
    inputs = draw(4, 3), draw(3, 6, seed=1)
    module = traced(views_and_sums, *inputs)
    tensors = {node.name for node in module.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)}
    free = {node.name for node in module.graph.nodes if str(node.target) in ("aten.t.default", "aten.full.default")}
    for count in range(1, 6):
        division, graphs = divide(module, inputs, count)
        assert same(Divided(division, graphs)(*inputs), module(*inputs))
        assert division.outputs[3] == division.inputs[0]
        for part in division.parts:
            assert set(part.outputs) <= tensors
            assert not free.intersection(part.inputs)


def test_a_division_can_be_kept_as_plain_data():
    inputs = draw(4, 3), draw(3, 6, seed=1)
    division, _ = divide(traced(views_and_sums, *inputs), inputs, 3)
    kept = io.BytesIO()
    torch.save(division.to_plain(), kept)
    kept.seek(0)
    assert Division.from_plain(torch.load(kept, weights_only=True)) == division


def test_a_part_is_given_the_strides_it_was_compiled_for():
    inputs = (draw(4, 6),)
    division, (first, second) = divide(traced(lambda x: [torch.sin(x).cos().tan().exp()], *inputs), inputs, 2)
    strides = []

    def otherwise_laid_out(*tensors):
        return [value.t().contiguous().t() for value in first(*tensors)]

    def noted(*tensors):
        strides.extend(value.stride() for value in tensors)
        return second(*tensors)

    assert same(Divided(division, [otherwise_laid_out, noted])(*inputs), Divided(division, [first, second])(*inputs))
    assert strides == [(6, 1)]


def test_values_are_let_go_after_their_last_reader():
    inputs = (draw(4, 6),)
    division, graphs = divide(traced(lambda x: [torch.sin(x).cos().tan().exp().sum()], *inputs), inputs, 3)
    made: list[weakref.ref[torch.Tensor]] = []

    def watched(graph):
        def run(*tensors):
            outputs = graph(*tensors)
            alive.append(sum(value() is not None for value in made))
            made.extend(weakref.ref(value) for value in outputs)
            return outputs

        return run

    alive: list[int] = []
    Divided(division, [watched(graph) for graph in graphs])(*inputs)
    assert alive == [0, 1, 1]


def test_graphs_are_compiled_by_processes_of_their_own(tmp_path):
    inputs = draw(4, 3), draw(3, 6, seed=1)
    module = traced(views_and_sums, *inputs)
    division, graphs = divide(module, inputs, 2)
    parts = []
    for place, artefact in enumerate(compile_at_once(graphs)):
        file = tmp_path / str(place)
        file.write_bytes(artefact)
        parts.append(CompiledArtifact.load(path=str(file)))
    found, expected = Divided(division, parts)(*inputs), module(*inputs)
    assert len(found) == len(expected)
    assert all(torch.allclose(one, other, rtol=1e-6) for one, other in zip(found, expected, strict=True))


def test_a_process_that_cannot_compile_says_why(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    inputs = (draw(4, 3),)
    _, graphs = divide(traced(lambda x: [torch.sin(x).sum(dim=1)], *inputs), inputs, 1)
    with pytest.raises(ChildProcessError, match=r"exit code 1, .*no-such-compiler"):
        compile_at_once(graphs)
