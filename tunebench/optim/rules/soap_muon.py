"""SOAP-Muon: SOAP's direction, orthogonalised. Four published recipes that share the name and little else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch

from tunebench.optim.branches import Beside
from tunebench.optim.newton_schulz import CUBIC, QUINTIC, Coefficients, orthogonalise
from tunebench.optim.packing import Bucket, Segment, Tensors
from tunebench.optim.rule import Hyper, scalar
from tunebench.optim.rules.adam import average, average_square
from tunebench.optim.rules.muon import Scale
from tunebench.optim.rules.soap import AdamStep, Soap, Vectors
from tunebench.optim.singular_values import square_root


class Recipe(StrEnum):
    """Which SOAP-Muon.

    PAPER: arXiv:2607.02499, algorithm 2. Rotate SOAP's direction back, orthogonalise it by five quintic Newton-Schulz
    steps (rho 0) or take the square root of its singular values (rho 0.5), scale it to unit RMS.

    NANOGPT: nikhilvyas/SOAP_MUON, language-model variant. Orthogonalise in the eigenbasis (five quintic and two cubic
    steps), take signed square roots of the elements, rotate back, scale to the Frobenius norm
    sqrt(min(in, out) max(1, out / in)).

    OLMO: nikhilvyas/SOAP_MUON, OLMo variant. Rotate back, orthogonalise (ten quintic and two cubic steps), unit RMS.

    TRACK3: the modded-nanogpt record of 2750 steps (KellerJordan/modded-nanogpt, pull request 321). See `SoapMuon`.
    """

    PAPER = "paper"
    NANOGPT = "nanogpt"
    OLMO = "olmo"
    TRACK3 = "track3"


_STEEP: Coefficients = (2.0, -1.5, 0.5)

_SCHEDULES: dict[Recipe, list[Coefficients]] = {
    Recipe.PAPER: [QUINTIC] * 5,
    Recipe.NANOGPT: [QUINTIC] * 5 + [CUBIC] * 2,
    Recipe.OLMO: [QUINTIC] * 10 + [CUBIC] * 2,
    Recipe.TRACK3: [_STEEP] * 12,
}

# The record's settings: what is left of outward motion, and the least norm of an update relative to the weight's.
_OUTWARD = 0.5
_LEAST_UPDATE = 0.3825

_Sized = Callable[..., torch.Tensor]
"""Gives the orthogonalised matrices of a `bucket` their size."""


@dataclass(frozen=True)
class SoapMuon(Soap):
    """SOAP whose direction is orthogonalised, matrix by matrix of the view; the rest follows plain SOAP.

    PAPER, NANOGPT and OLMO keep SOAP's skipped first step, its weight decay and its bias factor, which multiplies an
    update of fixed size: the first one is sqrt(1 - beta2) / (1 - beta1) learning rates long.

    TRACK3 keeps none of these. It whitens the Nesterov momentum by the running square of the rotated momentum itself
    (not of the gradient), orthogonalises it in twelve gentle steps, times sqrt(max(1, out / in)); halves what points
    outward along the weight (radial brake); enlarges updates below 0.3825 of the weight's norm (norm floor); and sets
    the new weight's norm to the old one plus the update's radial part (radius pin). `beta1` is the momentum; the record
    has no weight decay and refreshes at every step. Its rescaling of the whitened momentum to the norm it had before
    changes nothing ahead of Newton-Schulz, which ignores scale, and is not done. Left out: the trust gate of
    its attention output matrices, its schedules and averaged readouts, and the normalisation by the Schatten-4 norm
    before Newton-Schulz (here Frobenius; after twelve steps they differ for singular values below 1e-3 only).

    Attributes:
        recipe: which algorithm.
        rho: exponent of the singular values, 0 or 0.5; PAPER only.

    Raises:
        ValueError: a `rho` that the recipe does not have.
    """

    recipe: Recipe = Recipe.PAPER
    rho: float = 0.0

    def __post_init__(self) -> None:
        allowed = (0.0, 0.5) if self.recipe is Recipe.PAPER else (0.0,)
        if self.rho not in allowed:
            raise ValueError(f"rho of recipe {self.recipe}: found {self.rho}, allowed: {', '.join(map(str, allowed))}")

    def direction(self, segment: Segment, whitened: torch.Tensor, bases: Tensors) -> torch.Tensor:
        """SOAP's direction, orthogonalised and scaled as the recipe says; zero matrices stay zero."""
        if self.recipe is Recipe.NANOGPT:
            rooted = self._orthogonal(segment, whitened, _nanogpt_roots)
            return self.factors.rotate_back(segment, rooted, bases)
        back = self.factors.rotate_back(segment, whitened, bases)
        if not self.rho:
            return self._orthogonal(segment, back, _unit_rms)
        roots = square_root([bucket.stack(back) for bucket in segment.buckets])
        return _joined([_unit_rms(stack, bucket) for stack, bucket in zip(roots, segment.buckets, strict=True)], back)

    def matrix_scalars(self, step: torch.Tensor, hyper: Hyper) -> AdamStep:
        """SOAP's, but for TRACK3, which takes its first step, unwhitened, and corrects no bias."""
        if self.recipe is not Recipe.TRACK3:
            return super().matrix_scalars(step, hyper)
        return AdamStep(
            beta1=hyper["beta1"],
            beta2=hyper["beta2"].masked_fill(step == 1, 1.0),
            eps=hyper["eps"],
            amount=-hyper["learning_rate"],
            keep=1 - hyper["learning_rate"] * hyper["weight_decay"],
        )

    def matrix_step(self, segment: Segment, old: Vectors, scalars: Beside[AdamStep], bases: Tensors) -> Vectors:
        """Weights and moments of one matrix segment after this step, in these bases."""
        if self.recipe is not Recipe.TRACK3:
            return super().matrix_step(segment, old, scalars, bases)
        adam = scalars.result()
        exp_avg = average(old.exp_avg, old.grad, adam.beta1)
        nesterov = torch.lerp(old.grad, exp_avg, scalar(adam.beta1, old.grad))
        rotated = self.factors.rotate(segment, nesterov, bases)
        exp_avg_sq = average_square(old.exp_avg_sq, rotated, adam.beta2)
        # At the first step the average square is zero and the basis trivial: the momentum over epsilon, which is the
        # momentum to Newton-Schulz.
        whitened = rotated / torch.maximum(torch.sqrt(exp_avg_sq), scalar(adam.eps, rotated))
        back = self.factors.rotate_back(segment, whitened, bases)
        update = self._orthogonal(segment, back, _keller)
        rate = scalar(-adam.amount, update)
        moved = [_braked_move(bucket.of(old.weight), bucket.of(update), rate).reshape(-1) for bucket in segment.buckets]
        weight = torch.cat(moved) * scalar(adam.keep, update)
        return Vectors(weight, old.grad, exp_avg, exp_avg_sq)

    def _orthogonal(self, segment: Segment, vector: torch.Tensor, sized: _Sized) -> torch.Tensor:
        stacks = [bucket.stack(vector) for bucket in segment.buckets]
        finishes = [partial(sized, bucket=bucket) for bucket in segment.buckets]
        return _joined(orthogonalise(stacks, _SCHEDULES[self.recipe], finishes), vector)


def _joined(stacks: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """A segment's vector from its stacks of matrices."""
    return torch.cat([stack.reshape(-1) for stack in stacks]).to(like.dtype)


def _unit_rms(stack: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    return bucket.scaled(_normalised(stack), _unit_rms_norm)


def _nanogpt_roots(stack: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    return bucket.scaled(_normalised(stack.sign() * stack.abs().sqrt()), _nanogpt_norm)


def _keller(stack: torch.Tensor, bucket: Bucket) -> torch.Tensor:
    return bucket.scaled(stack, Scale.KELLER.factor)


def _normalised(stack: torch.Tensor) -> torch.Tensor:
    """Matrices of Frobenius norm 1, or zero."""
    return stack / _norm(stack).clamp(min=torch.finfo(stack.dtype).tiny)


def _unit_rms_norm(fan_in: int, fan_out: int) -> float:
    return math.sqrt(fan_in * fan_out)


def _nanogpt_norm(fan_in: int, fan_out: int) -> float:
    return math.sqrt(min(fan_in, fan_out)) * Scale.KELLER.factor(fan_in, fan_out)


def _braked_move(weight: torch.Tensor, update: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """Weights after the record's radial brake, norm floor and radius pin, all (..., rows, cols)."""
    # Motion is against the update: a negative share of the weight in it points outward.
    share = (update * weight).sum((-2, -1), keepdim=True) / weight.square().sum((-2, -1), keepdim=True).clamp(min=1e-12)
    update = update - (1 - _OUTWARD) * share.clamp(max=0) * weight
    radius, length = _norm(weight).clamp(min=1e-8), _norm(update).clamp(min=1e-8)
    update = update * (_LEAST_UPDATE * radius / length).clamp(min=1)
    pinned = radius - rate * (update * weight).sum((-2, -1), keepdim=True) / radius
    moved = weight - rate * update
    return moved * (pinned.clamp(min=1e-8) / _norm(moved).clamp(min=1e-8))


def _norm(stack: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(stack, dim=(-2, -1), keepdim=True)
    return norm
