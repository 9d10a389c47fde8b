"""SOAP: Adam in the eigenbases of Shampoo's factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, partial
from typing import ClassVar, NamedTuple

import torch

from tunebench.optim.branches import Beside, in_branches
from tunebench.optim.eigenbasis import eigenbasis, power_iteration
from tunebench.optim.factors import Factors, Sides
from tunebench.optim.packing import Packing, Segment, Tensors
from tunebench.optim.rule import Hyper, Phase, Renewal, scalar
from tunebench.optim.rules.adam import average, average_square, moments


class Basis(StrEnum):
    """Whether a gradient is rotated by a basis of PAST gradients only, or by one that includes it (CURRENT)."""

    PAST = "past"
    CURRENT = "current"


@dataclass(frozen=True)
class AdamStep:
    """Scalars of one step of Adam that skips its first call, zero-dimensional float64.

    As in SOAP, the bias corrections are folded into the step and epsilon is added to the uncorrected root.

    Attributes:
        beta1, beta2: decay rates; 1 at the skipped step.
        eps: epsilon.
        amount: negative step length; 0 at the skipped step.
        keep: what decoupled weight decay leaves of a weight; 1 at the skipped step.
    """

    beta1: torch.Tensor
    beta2: torch.Tensor
    eps: torch.Tensor
    amount: torch.Tensor
    keep: torch.Tensor

    @classmethod
    def at(cls, step: torch.Tensor, hyper: Hyper, prefix: str = "") -> AdamStep:
        """Of step number `step` (from 1), with the settings of the matrix rule (no prefix) or of the rest (`aux_`)."""
        first = step == 1
        rate = hyper["learning_rate"] * hyper["aux_learning_rate_ratio"] if prefix else hyper["learning_rate"]
        beta1, beta2 = hyper[f"{prefix}beta1"], hyper[f"{prefix}beta2"]
        corrected = rate * torch.sqrt(1 - beta2 ** (step - 1)) / (1 - beta1 ** (step - 1))
        keep = 1 - rate * hyper[f"{prefix}weight_decay"]
        # masked_fill, not where: a Python scalar in where is copied to the device, which a CUDA graph cannot hold.
        return cls(
            beta1=beta1.masked_fill(first, 1.0),
            beta2=beta2.masked_fill(first, 1.0),
            eps=hyper[f"{prefix}eps"],
            amount=-corrected.masked_fill(first, 0.0),
            keep=keep.masked_fill(first, 1.0),
        )

    def normalised(self, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor) -> torch.Tensor:
        """Adam's direction, the average over the root of the average square."""
        return exp_avg / (torch.sqrt(exp_avg_sq) + scalar(self.eps, exp_avg))

    def applied(self, weight: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """The weight after the step, and after that decayed."""
        return torch.addcmul(weight, direction, scalar(self.amount, weight)) * scalar(self.keep, weight)


class Vectors(NamedTuple):
    """One segment before or after a step, each (numel,); `exp_avg_sq` is in the eigenbasis."""

    weight: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


@dataclass(frozen=True)
class Soap:
    """SOAP (arXiv:2409.11321, algorithm 3) as its authors' code runs it (nikhilvyas/SOAP, a1e5535).

    The first step of a slot only sets up the bases: no update, no decay, and Adam's count starts at the second. Blocks
    that are no matrices get the same Adam unrotated. The first moment is kept unrotated, so a new basis only reorders
    the second. Factors need no bias correction, since only their eigenvectors count.

    Attributes:
        packing: how weights are packed.
        max_precondition_dim: an axis longer than this is not rotated.
        sides: rotate both axes or the smaller one.
        basis: PAST is the published order; CURRENT lets the gradient into the factors, and when a refresh is due into
            the basis, before it is rotated (arXiv:2607.20548 traces loss spikes to leaving it out).
        basis_warmup_steps: refresh at each of the first so many steps after the set-up.
    """

    packing: Packing
    max_precondition_dim: int = 10000
    sides: Sides = Sides.TWO
    basis: Basis = Basis.PAST
    basis_warmup_steps: int = 0

    hyperparameters: ClassVar[tuple[str, ...]] = (
        "learning_rate",
        "weight_decay",
        "beta1",
        "beta2",
        "eps",
        "shampoo_beta",
        "precondition_frequency",
        "aux_learning_rate_ratio",
        "aux_beta1",
        "aux_beta2",
        "aux_eps",
        "aux_weight_decay",
    )

    @cached_property
    def factors(self) -> Factors:
        """Layout of the factors and their bases."""
        return Factors(self.packing, self.max_precondition_dim, self.sides)

    def init(self, params: Tensors) -> Tensors:
        """State before the first step.

        `exp_avg/segment` and `exp_avg_sq/segment` (numel,), the latter in the eigenbasis; `factor/dtype/d`,
        float64, and `basis/dtype/d` (matrices, d, d).
        """
        device = next(iter(params.values())).device
        moments = {f"{moment}/{s}": torch.zeros_like(params[s]) for moment in ("exp_avg", "exp_avg_sq") for s in params}
        return moments | _keyed("factor", self.factors.zeros(device)) | _keyed("basis", self.factors.identities(device))

    def phase(self, step: int, hyper: Mapping[str, float]) -> Phase:
        """START at a slot's first step, REFRESH when its bases are due, else PLAIN."""
        count = step - 1
        if count == 0:
            return Phase.START
        due = count % max(1, round(hyper["precondition_frequency"])) == 0 or count <= self.basis_warmup_steps
        return Phase.REFRESH if due else Phase.PLAIN

    @property
    def renewal(self) -> Renewal | None:
        """New bases after a plain step in the old ones; None for CURRENT, whose step is in the new ones."""
        return self._renewed if self.basis is Basis.PAST else None

    def _renewed(self, state: Tensors, phase: Phase) -> Tensors:
        factors, bases = _unkeyed("factor", state), _unkeyed("basis", state)
        if phase is Phase.START:
            return _keyed("basis", {group: eigenbasis(f).to(bases[group].dtype) for group, f in factors.items()})
        if phase is Phase.PLAIN:
            return {}
        found = in_branches([partial(power_iteration, factor, bases[group]) for group, factor in factors.items()])
        new = _keyed("basis", {group: basis for group, (basis, _) in zip(factors, found, strict=True)})
        orders = {group: order for group, (_, order) in zip(factors, found, strict=True)}
        for segment in (segment for segment in self.packing.segments if segment.is_matrix):
            name = f"exp_avg_sq/{segment.name}"
            new[name] = self.factors.permute(segment, state[name], orders)
        return new

    def update(
        self,
        grads: Tensors,
        state: Tensors,
        params: Tensors,
        hyper: Hyper,
        step: torch.Tensor,
        phase: Phase = Phase.PLAIN,
    ) -> tuple[Tensors, Tensors]:
        """One step, see `UpdateRule.update`."""
        olds = {
            name: Vectors(params[name], grads[name], state[f"exp_avg/{name}"], state[f"exp_avg_sq/{name}"])
            for name in params
        }
        refreshed = Beside(partial(self._refreshed, grads, state, hyper, step, phase), "refresh")
        scalars = Beside(partial(self.matrix_scalars, step, hyper), "scalars")
        rest = Beside(partial(self._auxiliary_steps, olds, hyper, step), "auxiliary")
        moved: dict[str, Vectors] = {}
        for segment in (segment for segment in self.packing.segments if segment.is_matrix):
            old = olds[segment.name]
            if self.basis is Basis.CURRENT:
                _, bases, orders = refreshed.result()
                moved[segment.name] = self.matrix_step(segment, self._reordered(segment, old, orders), scalars, bases)
            else:
                after = self.matrix_step(segment, old, scalars, _unkeyed("basis", state))
                moved[segment.name] = self._reordered(segment, after, refreshed.result()[2])
        moved |= rest.result()
        factors, fresh, _ = refreshed.result()
        new = _keyed("factor", factors) | _keyed("basis", fresh)
        for name, vectors in moved.items():
            new[f"exp_avg/{name}"], new[f"exp_avg_sq/{name}"] = vectors.exp_avg, vectors.exp_avg_sq
        return {name: vectors.weight for name, vectors in moved.items()}, new

    def _auxiliary_steps(self, olds: Mapping[str, Vectors], hyper: Hyper, step: torch.Tensor) -> dict[str, Vectors]:
        scalars = AdamStep.at(step, hyper, "aux_")
        names = [segment.name for segment in self.packing.segments if not segment.is_matrix]
        return {name: _auxiliary_step(olds[name], scalars) for name in names}

    def matrix_scalars(self, step: torch.Tensor, hyper: Hyper) -> AdamStep:
        """The scalars that `matrix_step` is given."""
        return AdamStep.at(step, hyper)

    def matrix_step(self, segment: Segment, old: Vectors, scalars: Beside[AdamStep], bases: Tensors) -> Vectors:
        """Weights and moments of one matrix segment after this step, in these bases."""
        rotated, rotated_avg = self.factors.rotate_both(segment, old.grad, old.exp_avg, bases)
        adam = scalars.result()
        exp_avg = average(old.exp_avg, old.grad, adam.beta1)
        exp_avg_sq = average_square(old.exp_avg_sq, rotated, adam.beta2)
        whitened = adam.normalised(average(rotated_avg, rotated, adam.beta1), exp_avg_sq)
        direction = self.direction(segment, whitened, bases)
        return Vectors(adam.applied(old.weight, direction), old.grad, exp_avg, exp_avg_sq)

    def direction(self, segment: Segment, whitened: torch.Tensor, bases: Tensors) -> torch.Tensor:
        """What weights move along, given Adam's direction in the eigenbasis: here that direction rotated back."""
        return self.factors.rotate_back(segment, whitened, bases)

    def _reordered(self, segment: Segment, vectors: Vectors, orders: Tensors) -> Vectors:
        if not orders:
            return vectors
        return vectors._replace(exp_avg_sq=self.factors.permute(segment, vectors.exp_avg_sq, orders))

    def _refreshed(
        self, grads: Tensors, state: Tensors, hyper: Hyper, step: torch.Tensor, phase: Phase
    ) -> tuple[Tensors, Tensors, Tensors]:
        """Factors with the new gradient, their bases, and how the columns were reordered (empty if they were not)."""
        share = 1 - hyper["shampoo_beta"]
        grams = self.factors.grams(grads)
        averaged = [
            partial(torch.lerp, state[f"factor/{group}"], gram, scalar(share, gram)) for group, gram in grams.items()
        ]
        factors = dict(zip(grams, in_branches(averaged), strict=True))
        bases = _unkeyed("basis", state)
        orders: Tensors = {}
        if phase is Phase.PLAIN:
            return factors, bases, orders
        due = self._due(step, hyper)
        refreshed = in_branches([partial(power_iteration, factor, bases[group]) for group, factor in factors.items()])
        for (group, factor), (basis, order) in zip(factors.items(), refreshed, strict=True):
            basis = torch.where(due, basis, bases[group])
            if phase is Phase.START:
                basis = torch.where(step == 1, eigenbasis(factor).to(basis.dtype), basis)
            bases[group] = basis
            orders[group] = torch.where(due, order, torch.arange(order.shape[-1], device=order.device))
        return factors, bases, orders

    def _due(self, step: torch.Tensor, hyper: Hyper) -> torch.Tensor:
        count = step - 1
        frequency = torch.round(hyper["precondition_frequency"]).to(torch.int64).clamp_min(1)
        return (count > 0) & ((count % frequency == 0) | (count <= self.basis_warmup_steps))


def _auxiliary_step(old: Vectors, scalars: AdamStep) -> Vectors:
    exp_avg, exp_avg_sq = moments(old.grad, old.exp_avg, old.exp_avg_sq, scalars.beta1, scalars.beta2)
    direction = scalars.normalised(exp_avg, exp_avg_sq)
    return Vectors(scalars.applied(old.weight, direction), old.grad, exp_avg, exp_avg_sq)


def _keyed(kind: str, stacks: Tensors) -> Tensors:
    return {f"{kind}/{group}": stack for group, stack in stacks.items()}


def _unkeyed(kind: str, state: Tensors) -> Tensors:
    return {key.removeprefix(f"{kind}/"): stack for key, stack in state.items() if key.startswith(f"{kind}/")}
