from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tunebench.engine.graph_store import _QUICK, GraphSource


def everything(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """What each quick call does, of float32 (4, 4) tensors."""
    aten, rows = torch.ops.aten, torch.arange(4, dtype=torch.int64).repeat(4, 1)
    batch = aten.expand.default(x, [2, 4, 4])
    return [
        aten.add.Tensor(x, y, alpha=2),
        aten.bmm.default(batch, batch),
        aten.cat.default([x, y], 1),
        aten.constant_pad_nd.default(x, [1, 2], 0.5),
        aten.div.Tensor(x, y),
        aten.gather.default(x, 1, rows),
        aten.mm.default(x, y),
        aten.mul.Tensor(x, 3.0),
        aten.neg.default(x),
        aten.permute.default(x, [1, 0]),
        aten.pow.Tensor_Scalar(x, 3),
        aten.reshape.default(x, [16]),
        aten.scatter_add.default(x, 1, rows, y),
        aten.select.int(x, 0, 2),
        aten.sigmoid.default(x),
        aten.sub.Tensor(x, y),
        aten.sum.dim_IntList(x, [0], True, dtype=torch.float64),
        aten.where.self(x > y, x, y),
    ]


def test_quick_calls_do_what_the_traced_operations_do() -> None:
    inputs = torch.randn(2, 4, 4, dtype=torch.float32, generator=torch.Generator().manual_seed(1)).unbind()
    graph = make_fx(everything, pre_dispatch=True)(*inputs)
    assert {name for name in _QUICK if f"torch.ops.aten.{name}(" not in graph.code} == set()
    expected = graph(*inputs)
    for found, wanted in zip(GraphSource.of(graph)(*inputs), expected, strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
