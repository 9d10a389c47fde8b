"""Rewrites of traced graphs with concrete shapes: fewer nodes, and only such that `vmap` and Inductor treat well.

Every node of such a graph carries its example value, ``node.meta["val"]``. All rewrites keep values; they may change
strides, so views are written as `reshape`, which does not depend on them.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
prims = torch.ops.prims

_Rewrite = Callable[[Graph, Any], Any]


def simplify(module: GraphModule) -> GraphModule:
    """Remove what does nothing, write overwritten bases as padding and views as reshapes, in place.

    Args:
        module: a functional graph, traced with concrete shapes.
    """
    module.graph.eliminate_dead_code()
    _rewrite(module, _REWRITES)
    return module


def _rewrite(module: GraphModule, rewrites: Mapping[Any, _Rewrite]) -> int:
    """Replace nodes by what the rewrite of their target makes of them, if anything; returns how many were replaced."""
    graph, replaced = module.graph, 0
    for node in list(graph.nodes):
        rewrite = rewrites.get(node.target) if node.op == "call_function" else None
        if rewrite is None:
            continue
        with graph.inserting_before(node):
            new = rewrite(graph, node)
        if new is not None and new is not node:
            node.replace_all_uses_with(new)
            graph.erase_node(node)
            replaced += 1
    graph.eliminate_dead_code()
    module.recompile()
    return replaced


def own_memory_for_scatter_bases(module: GraphModule) -> int:
    """Give every scatter whose base is an expanded tensor a base of its own; returns how many were mended.

    Inductor (torch 2.11 to 2.13) folds an expanded constant into a buffer with stride 0 over the slots, and lets all
    slots scatter into one. Gradients then come out wrong without an error.
    """
    mended = 0
    for node in list(module.graph.nodes):
        if node.target not in _SCATTERS or not _is_expanded(node.args[0]):
            continue
        with module.graph.inserting_before(node):
            node.update_arg(0, _own_memory(module.graph, node.args[0]))
        mended += 1
    module.recompile()
    return mended


def small_products_as_sums(module: GraphModule) -> int:
    """Write products of many tiny matrices as sums of elementwise products; returns how many were rewritten.

    A tensor product multiplies a (5, 5) by a (5, 32) matrix on every edge. Such products move far more than they
    compute: a library's kernel pads them to tiles, while Inductor unrolls the sum into the operations around it. To be
    applied before compiling only; uncompiled, the factors' products would be written out.
    """
    return _rewrite(module, dict.fromkeys(_PRODUCTS, _small_product))


def _small_product(graph: Graph, node: Any) -> Any:
    if not _is_small(node):
        return None
    left, right = node.args
    rows = _new(graph, _value(left).unsqueeze(-1), aten.unsqueeze.default, left, -1)
    columns = _new(graph, _value(right).unsqueeze(-3), aten.unsqueeze.default, right, -3)
    terms = _new(graph, _value(rows) * _value(columns), aten.mul.Tensor, rows, columns)
    return _call(graph, node, aten.sum.dim_IntList, terms, [-2])


def _is_small(node: Any) -> bool:
    """Whether the sum is short and there are many more matrices than their size, or many more rows than columns."""
    left, right = (_value(argument) for argument in node.args)
    if left.shape[-1] > _SHORT_SUM:
        return False
    if node.target is aten.mm.default:
        return left.shape[0] > _MANY and right.shape[1] <= _FEW_COLUMNS
    return left.shape[0] > _MANY


def long_sums_in_parts(module: GraphModule) -> int:
    """Write products of matrices that sum over thousands of rows as sums of several; returns how many were rewritten.

    The gradient of a weight on edges sums over all edges of a batch. On CUDA (H200, float32) a batched product rounds
    such a sum more than the product of a single trial does, and fills less of the device than products of its parts do.
    Only sums whose parts can be viewed without a copy are rewritten, which a prime number of rows rules out.
    """
    return _rewrite(module, {aten.bmm.default: _long_product})


def _long_product(graph: Graph, node: Any) -> Any:
    parts = _number_of_parts(node)
    if parts == 1:
        return None
    left, right = node.args
    turned = _in_parts(graph, _transposed(graph, left), parts)
    slots, *shape = _value(node).shape
    value = _value(node).new_empty((slots * parts, *shape))
    product = _new(graph, value, aten.bmm.default, _transposed(graph, turned), _in_parts(graph, right, parts))
    terms = _new(graph, value.reshape(slots, parts, *shape), aten.reshape.default, product, [slots, parts, *shape])
    return _call(graph, node, aten.sum.dim_IntList, terms, [1])


def _number_of_parts(node: Any) -> int:
    """In how many parts of equal length, nearest to `_PART`, a product's sum is taken; 1 for one that stays whole."""
    left, right = (_value(argument) for argument in node.args)
    length = left.shape[-1]
    if length < _LONG_SUM or not all(_is_divisible(value) for value in (left.transpose(1, 2), right)):
        return 1
    possible = [parts for parts in range(2, length // 2 + 1) if length % parts == 0 and parts * _PART <= 4 * length]
    return min(possible, key=lambda parts: abs(math.log(length / parts / _PART)), default=1)


def _is_divisible(value: torch.Tensor) -> bool:
    """Whether the rows of a stack of matrices, one after the other, are the rows of further matrices of the stack."""
    slots, rows, columns = value.stride()
    return columns == 1 and slots == value.shape[1] * rows


def _transposed(graph: Graph, node: Any) -> Any:
    """A stack of matrices, each transposed."""
    return _new(graph, _value(node).permute(0, 2, 1), aten.permute.default, node, [0, 2, 1])


def _in_parts(graph: Graph, node: Any, parts: int) -> Any:
    """Rows of a stack of matrices as those of a stack that has several times as many."""
    slots, rows, columns = _value(node).shape
    shape = [slots * parts, rows // parts, columns]
    return _new(graph, _value(node).reshape(shape), aten.reshape.default, node, shape)


def constants_as_inputs(module: GraphModule) -> tuple[torch.Tensor, ...]:
    """Turn tensors that a graph holds into further inputs, and return them.

    Inductor's kept artefacts ask for every tensor of the module as an input when they are loaded (torch 2.13).
    """
    graph = module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    constants: dict[str, Node] = {}
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        if name not in constants:
            with graph.inserting_after(last):
                last = constants[name] = graph.placeholder(f"constant_{len(constants)}")
            last.meta.update(node.meta)
        node.replace_all_uses_with(constants[name])
        graph.erase_node(node)
    module.recompile()
    held = tuple(getattr(module, name).detach() for name in constants)
    for name in constants:
        delattr(module, name)
    return held


def padded_sums_as_concatenations(module: GraphModule) -> int:
    """Write sums of tensors that are padded with zeros to lie side by side as concatenations; returns how many.

    The gradient of a tensor that was read slice by slice is such a sum, of as many terms as there are slices.
    """
    return _rewrite(module, {aten.add.Tensor: _padded_sum})


def _padded_sum(graph: Graph, node: Any) -> Any:
    if not _is_plain_sum(node) or _is_term(node):
        return None
    beside = _beside(_terms(node))
    return None if beside is None else _concatenated(graph, node, *beside)


def _is_plain_sum(node: Any) -> bool:
    """Whether a node adds two tensors up, and neither broadcasts, casts nor scales."""
    if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(term, Node) for term in node.args):
        return False
    one, other = (_value(term) for term in node.args)
    return one.shape == other.shape and one.dtype == other.dtype


def _is_term(node: Any) -> bool:
    """Whether a sum is read by nothing but another sum."""
    return _is_plain_sum(node) and len(node.users) == 1 and _is_plain_sum(next(iter(node.users)))


def _terms(node: Any) -> list[Any]:
    """What a sum of sums adds up, from left to right."""
    return [term for part in node.args for term in (_terms(part) if _is_term(part) else [part])]


def _beside(terms: list[Any]) -> tuple[int, dict[tuple[int, int], list[Any]]] | None:
    """The dimension of padded terms and what lies where along it; None where that is one place, or two overlap."""
    dims: set[int] = set()
    places: dict[tuple[int, int], list[Any]] = {}
    for term in terms:
        if (place := _place(term)) is None:
            return None
        dim, start, end = place
        dims.add(dim)
        places.setdefault((start, end), []).append(term.args[0])
    ordered = sorted(places)
    overlap = any(before[1] > after[0] for before, after in itertools.pairwise(ordered))
    if overlap or len(dims) > 1 or len(places) < 2:
        return None
    return dims.pop(), {place: places[place] for place in ordered}


def _place(term: Any) -> tuple[int, int, int] | None:
    """Dimension, start and end of what is padded with zeros along one dimension."""
    if term.target is not aten.constant_pad_nd.default or _argument(term, 2, 0) != 0:
        return None
    around = term.args[1]
    padded = [index for index in range(len(around) // 2) if around[2 * index] or around[2 * index + 1]]
    if len(padded) != 1 or min(around) < 0:
        return None
    dim = _value(term).ndim - 1 - padded[0]
    return dim, around[2 * padded[0]], _value(term).shape[dim] - around[2 * padded[0] + 1]


def _concatenated(graph: Graph, like: Any, dim: int, places: dict[tuple[int, int], list[Any]]) -> Any:
    """The terms of each place summed up, side by side, with zeros between them."""
    size = _value(like).shape[dim]
    parts: list[Any] = []
    reached = 0
    for (start, end), terms in places.items():
        parts += _gap(graph, like, dim, start - reached)
        parts.append(functools.reduce(lambda one, other: _call(graph, one, aten.add.Tensor, one, other), terms))
        reached = end
    parts += _gap(graph, like, dim, size - reached)
    return _call(graph, like, aten.cat.default, parts, dim)


def _gap(graph: Graph, like: Any, dim: int, length: int) -> list[Any]:
    """Zeros of a length along one dimension, none for 0."""
    return [_filled(graph, _value(like).narrow(dim, 0, length), 0.0)] if length else []


def _is_expanded(node: Any) -> bool:
    """Whether a tensor, or one that it is a view of, repeats elements or is a constant."""
    while node.target in VIEWS and 0 not in _value(node).stride():
        node = node.args[0]
    return 0 in _value(node).stride() or node.target in REPEATS


def _own_memory(graph: Graph, base: Any) -> Any:
    value, root = _value(base), base
    while root.target in VIEWS or root.target in REPEATS:
        root = root.args[0]
    own = torch.empty_like(value, memory_format=torch.contiguous_format)
    if root.target is aten.full.default:
        return _filled(graph, own, root.args[1])
    return _new(graph, own, aten.clone.default, base, memory_format=torch.contiguous_format)


def _value(node: Any) -> torch.Tensor:
    value: torch.Tensor = node.meta["val"]
    return value


def _argument(node: Node, position: int, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else default


def _new(graph: Graph, value: torch.Tensor, target: Any, *args: Any, **kwargs: Any) -> Any:
    """A new call that returns what is like an example value."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = value
    return node


def _call(graph: Graph, like: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    """A new call whose value has shape and dtype of an existing node's."""
    return _new(graph, _value(like), target, *args, **kwargs)


def _filled(graph: Graph, value: torch.Tensor, fill: Any) -> Any:
    """A tensor like an example value with one number everywhere."""
    kind = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
    return _new(graph, value, aten.full.default, list(value.shape), fill, **kind)


def _input(graph: Graph, node: Any) -> Any:
    source: Any = node.args[0]
    return source


def _unless_reshaped(graph: Graph, node: Any) -> Any:
    """The input itself where its shape and dtype are those of the result."""
    source, found = node.args[0], _value(node)
    if isinstance(source, Node) and _value(source).shape == found.shape and _value(source).dtype == found.dtype:
        return source
    return None


def _reshape(graph: Graph, node: Any) -> Any:
    source: Any = node.args[0]
    shape = list(_value(node).shape)
    while source.target is aten.reshape.default:  # a reshape of a reshape
        source = source.args[0]
    if list(_value(source).shape) == shape:
        return source
    return _call(graph, node, aten.reshape.default, source, shape)


def _permute(graph: Graph, node: Any) -> Any:
    order: Any = node.args[1]
    return _input(graph, node) if list(order) == list(range(len(order))) else None


def _copy(graph: Graph, node: Any) -> Any:
    """The source, cast and broadcast: a copy reads nothing of what it overwrites, which may be uninitialised."""
    source: Any = node.args[1]
    target = _value(node)
    if _value(source).dtype != target.dtype:
        source = _new(graph, _value(source).to(target.dtype), aten._to_copy.default, source, dtype=target.dtype)
    if _value(source).shape != target.shape:
        source = _call(graph, node, aten.expand.default, source, list(target.shape))
    return source


def _bounds(node: Node, first: int) -> tuple[int, int, int, int]:
    """Dimension, start, end and step of a slice whose arguments begin at `first`, all counted from the front."""
    shape = _value(node.args[0]).shape
    dim = _argument(node, first, 0) % len(shape)
    start, end = _argument(node, first + 1, None), _argument(node, first + 2, None)
    begin, stop, _ = slice(start, end).indices(shape[dim])
    return dim, begin, max(begin, stop), _argument(node, first + 3, 1)


def _slice(graph: Graph, node: Any) -> Any:
    dim, start, end, step = _bounds(node, 1)
    source: Any = node.args[0]
    if (start, end, step) == (0, _value(source).shape[dim], 1):
        return source
    return _call(graph, node, aten.slice.Tensor, source, dim, start, end, step)


def _slice_scatter(graph: Graph, node: Any) -> Any:
    """The source where it covers everything, a padded source where the base is zero.

    `vmap` would write slots' slices with an index for every element.
    """
    dim, start, end, step = _bounds(node, 2)
    base, source = node.args[0], node.args[1]
    size = _value(base).shape[dim]
    if step != 1:
        return None
    if (start, end) == (0, size):
        return _copy(graph, node)
    if not _is_zero(base):
        parts = [_part(graph, base, dim, 0, start), source, _part(graph, base, dim, end, size)]
        return _call(graph, node, aten.cat.default, [part for part in parts if part is not None], dim)
    behind = _value(base).ndim - 1 - dim
    return _call(graph, node, aten.constant_pad_nd.default, source, [*[0, 0] * behind, start, size - end], 0.0)


def _part(graph: Graph, base: Any, dim: int, start: int, end: int) -> Any:
    if start == end:
        return None
    return _new(graph, _value(base).narrow(dim, start, end - start), aten.slice.Tensor, base, dim, start, end)


def _select_scatter(graph: Graph, node: Any) -> Any:
    base, source, dim, index = node.args[:4]
    shape = _value(base).shape
    if not _is_zero(base):
        return None
    place: int = dim % len(shape)
    start: int = index % shape[place]
    row = _new(graph, _value(source).unsqueeze(place), aten.unsqueeze.default, source, place)
    around = [*[0, 0] * (len(shape) - 1 - place), start, shape[place] - start - 1]
    return _call(graph, node, aten.constant_pad_nd.default, row, around, 0.0)


def _is_zero(node: Any) -> bool:
    fills = (aten.full.default, aten.full_like.default, aten.new_full.default)
    zeros = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
    return node.target in zeros or (node.target in fills and node.args[-1] == 0)


def _full_like(graph: Graph, node: Any) -> Any:
    return _filled(graph, _value(node), node.args[1])


def _index_select(graph: Graph, node: Any) -> Any:
    """Advanced indexing: under `vmap`, the gradient of index_select is a loop over slots."""
    source: Any = node.args[0]
    dim: int = node.args[1] % _value(source).ndim
    return _call(graph, node, aten.index.Tensor, source, [*[None] * dim, node.args[2]])


def _convert(graph: Graph, node: Any) -> Any:
    """A cast; torch's prims run as Python where they are not compiled."""
    return _unless_reshaped(graph, node) or _call(graph, node, aten._to_copy.default, node.args[0], dtype=node.args[1])


def _iota(graph: Graph, node: Any) -> Any:
    length, settings = node.args[0], node.kwargs
    start, step = settings["start"], settings["step"]
    kind = {"dtype": settings["dtype"], "device": settings["device"]}
    return _call(graph, node, aten.arange.start_step, start, start + length * step, step, **kind)


_REWRITES: dict[Any, _Rewrite] = {
    aten.alias.default: _input,
    aten.detach.default: _input,
    aten.clone.default: _input,
    aten.lift_fresh_copy.default: _input,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.reshape.default: _reshape,
    aten.permute.default: _permute,
    aten.expand.default: _unless_reshaped,
    aten._to_copy.default: _unless_reshaped,
    aten.squeeze.dims: _reshape,
    aten.squeeze.dim: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.copy.default: _copy,
    aten.slice.Tensor: _slice,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
    aten.full_like.default: _full_like,
    aten.index_select.default: _index_select,
    prims.convert_element_type.default: _convert,
    prims.iota.default: _iota,
}

VIEWS = frozenset(
    {
        aten.alias.default,
        aten.detach.default,
        aten.permute.default,
        aten.reshape.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unsqueeze.default,
        aten.view.default,
        aten._unsafe_view.default,
    }
)
_PRODUCTS = frozenset({aten.bmm.default, aten.mm.default})
_SHORT_SUM = 5  # spherical harmonics of degree 2
_FEW_COLUMNS = 32
_MANY = 2048
_LONG_SUM = 1024
_PART = 256
REPEATS = frozenset({aten.expand.default, prims.broadcast_in_dim.default})
_SCATTERS = frozenset(
    {
        aten._unsafe_index_put.default,
        aten._unsafe_masked_index_put_accumulate.default,
        aten.as_strided_scatter.default,
        aten.diagonal_scatter.default,
        aten.index_add.default,
        aten.index_copy.default,
        aten.index_fill.int_Scalar,
        aten.index_fill.int_Tensor,
        aten.index_put.default,
        aten.index_reduce.default,
        aten.masked_scatter.default,
        aten.put.default,
        aten.scatter.reduce,
        aten.scatter.src,
        aten.scatter.value,
        aten.scatter.value_reduce,
        aten.scatter_add.default,
        aten.scatter_reduce.two,
        aten.select_scatter.default,
        aten.slice_scatter.default,
    }
)
