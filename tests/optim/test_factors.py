from __future__ import annotations

import pytest
import torch

from tunebench.optim.blocks import Block, View
from tunebench.optim.factors import Factors, Sides
from tunebench.optim.packing import Packing, Tensors

SHAPES = {"a": (3, 5), "b": (5, 3), "c": (3, 3), "d": (4, 2, 5), "e": (4, 2, 5), "f": (6,)}
VIEWS = {"a": View.MATRIX, "b": View.MATRIX, "c": View.MATRIX, "d": View.PER_TYPE, "e": View.MERGED, "f": View.VECTOR}


def drawn(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}


def packing() -> Packing:
    return Packing(drawn(), [Block.whole(name, shape, VIEWS[name]) for name, shape in SHAPES.items()])


def matrices(tensors: Tensors, name: str) -> list[torch.Tensor]:
    """The (in, out) matrices of a parameter under its view."""
    if VIEWS[name] is View.PER_TYPE:
        return list(tensors[name].unbind(1))
    return [tensors[name].reshape(-1, SHAPES[name][-1])]


def test_a_full_turn_is_the_identity_and_keeps_norms() -> None:
    pack = packing()
    factors = Factors(pack, 100, Sides.TWO)
    vectors = pack.pack(drawn())
    bases = {group: torch.linalg.qr(gram).Q for group, gram in factors.grams(pack.pack(drawn(1))).items()}
    segment = next(segment for segment in pack.segments if segment.is_matrix)
    turned = factors.rotate(segment, vectors[segment.name], bases)
    torch.testing.assert_close(factors.rotate_back(segment, turned, bases), vectors[segment.name])
    torch.testing.assert_close(turned.norm(), vectors[segment.name].norm())
    assert float((turned - vectors[segment.name]).abs().max()) > 0.1


def test_factors_are_the_grams_of_the_true_matrices() -> None:
    pack = packing()
    grams = Factors(pack, 100, Sides.TWO).grams(pack.pack(drawn()))
    assert {group: stack.shape[0] for group, stack in grams.items()} == {
        "float64/3": 4,
        "float64/4": 1,
        "float64/5": 4,
        "float64/8": 1,
    }
    for name in ("a", "b", "c", "d", "e"):
        blocks = matrices(drawn(), name)
        for gram in (torch.stack([x @ x.T for x in blocks]).sum(0), torch.stack([x.T @ x for x in blocks]).sum(0)):
            stack = grams[f"float64/{gram.shape[0]}"]
            assert min(float((found - gram).abs().max()) for found in stack) < 1e-12, name


def test_rotating_by_the_eigenvectors_makes_the_factors_diagonal() -> None:
    pack = packing()
    factors = Factors(pack, 100, Sides.TWO)
    segment = next(segment for segment in pack.segments if segment.is_matrix)
    vectors = pack.pack(drawn())
    bases = {group: torch.linalg.eigh(gram).eigenvectors for group, gram in factors.grams(vectors).items()}
    turned = factors.grams({segment.name: factors.rotate(segment, vectors[segment.name], bases)})
    for stack in turned.values():
        torch.testing.assert_close(stack, torch.diag_embed(torch.diagonal(stack, dim1=1, dim2=2)), rtol=0, atol=1e-12)


def test_permuting_follows_the_columns_of_the_bases() -> None:
    pack = packing()
    factors = Factors(pack, 100, Sides.TWO)
    segment = next(segment for segment in pack.segments if segment.is_matrix)
    vector = pack.pack(drawn())[segment.name]
    bases = {group: torch.linalg.qr(gram).Q for group, gram in factors.grams(pack.pack(drawn(1))).items()}
    generator = torch.Generator().manual_seed(3)
    orders = {group: torch.rand(q.shape[:2], generator=generator).argsort(-1) for group, q in bases.items()}
    permuted = {group: q.gather(-1, orders[group].unsqueeze(1).expand(q.shape)) for group, q in bases.items()}
    found = factors.permute(segment, factors.rotate(segment, vector, bases), orders)
    torch.testing.assert_close(found, factors.rotate(segment, vector, permuted))


def test_weights_of_half_precision_are_refused() -> None:
    half = {"a": torch.zeros(3, 5, dtype=torch.bfloat16)}
    pack = Packing(half, [Block.whole("a", (3, 5), View.MATRIX)])
    with pytest.raises(
        ValueError, match=r"matrix bfloat16: found torch\.bfloat16, allowed: torch\.float32, torch\.float64"
    ):
        Factors(pack, 100, Sides.TWO)


@pytest.mark.parametrize(
    ("largest", "sides", "groups"),
    [
        (4, Sides.TWO, {"float64/3": 4, "float64/4": 1}),
        (100, Sides.ONE, {"float64/3": 3, "float64/4": 1, "float64/5": 1}),
        (2, Sides.TWO, {}),
    ],
)
def test_only_the_axes_asked_for_are_rotated(largest: int, sides: Sides, groups: dict[str, int]) -> None:
    pack = packing()
    factors = Factors(pack, largest, sides)
    assert {group: shape[0] for group, (shape, _) in factors.groups.items()} == groups
    segment = next(segment for segment in pack.segments if segment.is_matrix)
    vector = pack.pack(drawn())[segment.name]
    turned = factors.rotate(segment, vector, factors.identities(vector.device))
    assert torch.equal(turned, vector)
