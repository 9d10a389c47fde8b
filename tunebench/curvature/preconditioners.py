"""The preconditioner P that an optimizer has at a checkpoint, read off its state.

An update is -learning_rate P^-1 m, with m the optimizer's averaged gradient: whatever multiplies m apart from the
learning rate of the matrices is in P, such as LAMB's trust ratio, Muon's scale and a ratio of learning rates. P is
given by a root C of its inverse, P^-1 = C C^T: C^T H C has the eigenvalues of P^-1 H, and is P^-1/2 H P^-1/2 where C is
symmetric. Everything is in float64, whatever the state's own precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from tunebench.curvature.operators import Coordinates, Operator
from tunebench.optim.factored import Factored
from tunebench.optim.factors import Factors
from tunebench.optim.newton_schulz import CUBIC, QUINTIC
from tunebench.optim.packing import Segment, Tensors
from tunebench.optim.rule import UpdateRule
from tunebench.optim.rules.adam import Adam
from tunebench.optim.rules.lamb import Lamb, trust_ratios
from tunebench.optim.rules.muon import Muon
from tunebench.optim.rules.radam import RAdam, RectifiedScalars
from tunebench.optim.rules.ranger import Ranger
from tunebench.optim.rules.schedule_free import ScheduleFree
from tunebench.optim.rules.sgd import Sgd
from tunebench.optim.rules.soap import Soap
from tunebench.optim.rules.soap_muon import Recipe, SoapMuon


@dataclass(frozen=True, kw_only=True, eq=False)
class OptimizerState:
    """An optimizer at a checkpoint.

    Attributes:
        rule: the update rule. step: finished steps, at least 1.
        hyper: its hyperparameters, the learning rate without its schedule.
        tensors: the rule's state. weights: trained weights by name.
    """

    rule: UpdateRule
    step: int
    hyper: Mapping[str, float]
    tensors: Mapping[str, torch.Tensor]
    weights: Mapping[str, torch.Tensor]

    def of(self, buffer: str, segment: Segment) -> torch.Tensor:
        """A buffer of a segment, float64 (numel,)."""
        return self.tensors[f"{buffer}/{segment.name}"].to(torch.float64)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What P is on the weights of one rule.

    Attributes:
        kind: of preconditioner, in words. parameters: elements it treats.
        damping: what keeps P away from zero, in words with its value.
        least, largest: eigenvalues of P.
        damped_share: of P's eigenvalues, those that the damping makes up at least half of.
        excluded: elements on which P is zero, and the root of its inverse is set to zero: of blocks without momentum.
    """

    kind: str
    parameters: int
    damping: str
    least: float
    largest: float
    damped_share: float
    excluded: int = 0


class Root(Protocol):
    """A root C of the inverse of P on a segment's vector (numel,)."""

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """C x."""
        ...

    def transposed(self, vector: torch.Tensor) -> torch.Tensor:
        """C^T x."""
        ...


@dataclass(frozen=True, eq=False)
class Scaled:
    """A diagonal C."""

    values: torch.Tensor

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """C x."""
        return self.values * vector

    transposed = __call__


@dataclass(frozen=True, eq=False)
class Rotated:
    """A C that is diagonal in SOAP's eigenbases."""

    values: torch.Tensor
    factors: Factors
    segment: Segment
    bases: Tensors

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """C x."""
        rotated = self.factors.rotate(self.segment, vector, self.bases)
        return self.factors.rotate_back(self.segment, self.values * rotated, self.bases)

    transposed = __call__


@dataclass(frozen=True, eq=False)
class RowProducts:
    """A symmetric C that multiplies each matrix of a segment from its smaller side; one stack per bucket."""

    matrices: Sequence[torch.Tensor]
    segment: Segment

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """C x."""
        pairs = zip(self.matrices, self.segment.buckets, strict=True)
        return torch.cat([(matrix @ bucket.stack(vector)).reshape(-1) for matrix, bucket in pairs])

    transposed = __call__


@dataclass(frozen=True, eq=False)
class Chained:
    """C = outer inner."""

    outer: Root
    inner: Root

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """C x."""
        return self.outer(self.inner(vector))

    def transposed(self, vector: torch.Tensor) -> torch.Tensor:
        """C^T x."""
        return self.inner.transposed(self.outer.transposed(vector))


@dataclass(frozen=True, eq=False)
class Preconditioner:
    """P of all weights of a model.

    Attributes:
        definition: what P is, in one line.
        parts: what it is on which weights, with its damping.
    """

    definition: str
    parts: tuple[Part, ...]
    _rule: UpdateRule
    _roots: Mapping[str, Root]

    def root(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """C x of named tensors in float64."""
        return self._mapped(tensors, lambda root: root.__call__)

    def root_transposed(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """C^T x of named tensors in float64."""
        return self._mapped(tensors, lambda root: root.transposed)

    def _mapped(
        self, tensors: Mapping[str, torch.Tensor], way: Callable[[Root], Callable[[torch.Tensor], torch.Tensor]]
    ) -> Tensors:
        packed = self._rule.packing.pack(tensors)
        return self._rule.packing.unpack({name: way(self._roots[name])(vector) for name, vector in packed.items()})


class Preconditioned:
    """C^T H C on the elements of a Hessian, with the eigenvalues of P^-1 H there.

    Args:
        hessian: operator on `coordinates`.
        coordinates: the elements that take part.
        preconditioner: of the same weights.
    """

    def __init__(self, hessian: Operator, coordinates: Coordinates, preconditioner: Preconditioner) -> None:
        self._hessian, self._coordinates, self._preconditioner = hessian, coordinates, preconditioner
        self.size, self.device, self.products = hessian.size, hessian.device, 0

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        """The product with one vector, (size,)."""
        self.products += 1
        to, of = self._coordinates.tensors, self._coordinates.vector
        image = self._hessian(of(self._preconditioner.root(to(vector))))
        return of(self._preconditioner.root_transposed(to(image)))


def preconditioner(state: OptimizerState) -> Preconditioner:
    """P of an optimizer at a checkpoint.

    Raises:
        ValueError: a rule without a linear preconditioner, or a state in which it has not made a step yet.
    """
    if isinstance(state.rule, Factored):
        return _factored(state, state.rule)
    known = _KNOWN.get(type(state.rule))
    if known is None:
        names = ", ".join(kind.__name__ for kind in _KNOWN)
        raise ValueError(f"preconditioner: found {type(state.rule).__name__}, allowed: {names}")
    if state.step < 1:
        raise ValueError(f"preconditioner: found a checkpoint at step {state.step}, allowed: 1 or later")
    definition, of_segment = known
    found = {segment.name: of_segment(state, segment) for segment in state.rule.packing.segments}
    roots = {name: root for name, (root, _) in found.items()}
    parts = tuple(part for _, own in found.values() for part in own)
    return Preconditioner(definition, parts, state.rule, roots)


def _factored(state: OptimizerState, rule: Factored) -> Preconditioner:
    """P of weights with learning rates of their own: that of their rule over their factor."""
    definition, parts, roots = "", [], {}
    for part in rule.parts:
        names = {block.parameter for block in part.rule.packing.blocks}
        weights = {name: weight for name, weight in state.weights.items() if name in names}
        found = preconditioner(replace(state, rule=part.rule, tensors=part.own(state.tensors), weights=weights))
        definition = found.definition
        parts += [replace(p, least=p.least / part.factor, largest=p.largest / part.factor) for p in found.parts]
        for segment in part.rule.packing.segments:
            scale = torch.full((segment.numel,), part.factor**0.5, dtype=torch.float64, device=_device(state))
            roots[segment.name + part.suffix] = Chained(Scaled(scale), found._roots[segment.name])
    return Preconditioner(definition, tuple(parts), state.rule, roots)


# --- diagonal --------------------------------------------------------------------------------------------------------

_Found = tuple[Root, tuple[Part, ...]]


def _diagonal(root: torch.Tensor, eps: float, correction: float, kind: str, divided: Any = 1.0) -> _Found:
    """C of P = diag((root + eps) / correction / divided)."""
    values = (root + eps) / correction / divided
    damping = f"eps {eps / correction:.1e} added to the root"
    return Scaled(values**-0.5), (_part(values, root < eps, kind, damping),)


def _part(values: torch.Tensor, damped: torch.Tensor, kind: str, damping: str) -> Part:
    return Part(
        kind=kind,
        parameters=values.numel(),
        damping=damping,
        least=float(values.min()),
        largest=float(values.max()),
        damped_share=float(damped.to(torch.float64).mean()),
    )


def _identity(state: OptimizerState, segment: Segment) -> _Found:
    ones = torch.ones(segment.numel, dtype=torch.float64, device=_device(state))
    return Scaled(ones), (_part(ones, torch.zeros_like(ones), "identity", "none"),)


def _adam(state: OptimizerState, segment: Segment) -> _Found:
    # eps is added to the corrected root, so it carries the correction here.
    correction = (1.0 - state.hyper["beta2"] ** state.step) ** 0.5
    root = state.of("exp_avg_sq", segment).sqrt()
    return _diagonal(root, state.hyper["eps"] * correction, correction, "diagonal")


def _rectified(state: OptimizerState, segment: Segment) -> _Found:
    if isinstance(state.rule, Ranger) and state.rule.centralise:
        raise ValueError("preconditioner: found Ranger with centralised gradients, allowed: centralise: false")
    if not bool(RectifiedScalars.at(torch.tensor(state.step, dtype=torch.int64), _scalars(state)).rectified):
        return _identity(state, segment)
    correction = (1.0 - state.hyper["beta2"] ** state.step) ** 0.5
    return _diagonal(state.of("exp_avg_sq", segment).sqrt(), state.hyper["eps"], correction, "diagonal")


def _lamb(state: OptimizerState, segment: Segment) -> _Found:
    root, eps = state.of("exp_avg_sq", segment).sqrt(), state.hyper["eps"]
    weight = state.rule.packing.pack({n: w.to(torch.float64) for n, w in state.weights.items()})[segment.name]
    trust = trust_ratios(weight, state.of("exp_avg", segment) / (root + eps), segment, _scalars(state))
    return _diagonal(root, eps, 1.0, "diagonal over trust ratios", segment.spread(trust))


def _auxiliary(state: OptimizerState, segment: Segment, *, skipped: int) -> _Found:
    """The Adam of weights that are no matrices; `skipped` steps had no update, and eps is then added uncorrected."""
    hyper = state.hyper
    correction = (1.0 - hyper["aux_beta2"] ** (state.step - skipped)) ** 0.5
    eps = hyper["aux_eps"] if skipped else hyper["aux_eps"] * correction
    root = state.of("exp_avg_sq", segment).sqrt()
    return _diagonal(root, eps, correction, "diagonal, auxiliary Adam", hyper["aux_learning_rate_ratio"])


# --- rotated ---------------------------------------------------------------------------------------------------------


def _bases(state: OptimizerState) -> Tensors:
    stacks = {key.removeprefix("basis/"): t for key, t in state.tensors.items() if key.startswith("basis/")}
    return {group: stack.to(torch.float64) for group, stack in stacks.items()}


def _soap(state: OptimizerState, segment: Segment) -> _Found:
    rule = state.rule
    assert isinstance(rule, Soap)
    if state.step < 2:
        raise ValueError(
            f"preconditioner: found SOAP at step {state.step}, which sets up its bases, allowed: 2 or later"
        )
    if not segment.is_matrix:
        return _auxiliary(state, segment, skipped=1)
    correction = (1.0 - state.hyper["beta2"] ** (state.step - 1)) ** 0.5
    root = state.of("exp_avg_sq", segment).sqrt()
    scaled, parts = _diagonal(root, state.hyper["eps"], correction, "diagonal in the eigenbases")
    assert isinstance(scaled, Scaled)
    return Rotated(scaled.values, rule.factors, segment, _bases(state)), parts


# --- orthogonalised --------------------------------------------------------------------------------------------------


def _muon(state: OptimizerState, segment: Segment) -> _Found:
    rule = state.rule
    assert isinstance(rule, Muon)
    if not segment.is_matrix:
        return _auxiliary(state, segment, skipped=0)
    damping = QUINTIC[0] ** -rule.newton_schulz_steps
    polar = _Polar(segment, state.of("momentum", segment), damping)
    sizes = [
        bucket.scaled(torch.ones_like(stack[:, :1, :1]), rule.scale.factor)
        for bucket, stack in zip(segment.buckets, polar.stacks, strict=True)
    ]
    return polar.root(1.0, sizes), (polar.part("orthogonalised momentum", 1.0, sizes),)


def _soap_muon(state: OptimizerState, segment: Segment) -> _Found:
    rule = state.rule
    assert isinstance(rule, SoapMuon)
    if rule.recipe not in _NEWTON_SCHULZ_GAIN:
        allowed = ", ".join(_NEWTON_SCHULZ_GAIN)
        raise ValueError(f"preconditioner: found SOAP-Muon's recipe {rule.recipe}, no linear map, allowed: {allowed}")
    whitening, parts = _soap(state, segment)
    if not segment.is_matrix:
        return whitening, parts
    momentum = state.of("exp_avg", segment)
    damping = 1e-6 if rule.rho else 1.0 / _NEWTON_SCHULZ_GAIN[rule.recipe]
    polar = _Polar(segment, whitening(whitening(momentum)), damping)
    exponent = 1.0 - rule.rho
    # An update has unit RMS times SOAP's correction of the second moment.
    correction = (1.0 - state.hyper["beta2"] ** (state.step - 1)) ** 0.5
    sizes = [correction * size for size in polar.unit_rms(exponent)]
    part = polar.part("orthogonalised direction", exponent, sizes)
    return Chained(whitening, polar.root(exponent, sizes)), (*parts, part)


# What the recipe's Newton-Schulz iteration multiplies a tiny singular value by.
_NEWTON_SCHULZ_GAIN = {Recipe.PAPER: QUINTIC[0] ** 5, Recipe.OLMO: QUINTIC[0] ** 10 * CUBIC[0] ** 2}


class _Polar:
    """(G G^T + d^2 |G|^2 I)^(-e/2) of all matrices G of a segment, with |G| the Frobenius norm.

    It multiplies from the smaller side, a square matrix from its in-axis, as they are packed. d is the damping:
    Newton-Schulz multiplies tiny singular values by 1/d and leaves those below d |G| short of 1.
    """

    def __init__(self, segment: Segment, vector: torch.Tensor, damping: float) -> None:
        self.segment, self.damping = segment, damping
        self.stacks = [bucket.stack(vector) for bucket in segment.buckets]
        found = [torch.linalg.eigh(stack @ stack.mT) for stack in self.stacks]
        self._squares = [values.clamp(min=0.0) for values, _ in found]
        self._vectors = [vectors for _, vectors in found]
        self._floors = [damping**2 * values.sum(-1, keepdim=True) for values in self._squares]

    def root(self, exponent: float, sizes: Sequence[torch.Tensor]) -> RowProducts:
        """Symmetric root of the sized inverse power; zero for a matrix that is zero."""
        powers = self._powers(-exponent / 4.0)
        matrices = [
            v * (size.sqrt().squeeze(-1) * power).unsqueeze(-2) @ v.mT
            for v, power, size in zip(self._vectors, powers, sizes, strict=True)
        ]
        return RowProducts(matrices, self.segment)

    def unit_rms(self, exponent: float) -> list[torch.Tensor]:
        """Sizes under which the matrices times their inverse power have unit RMS, each (matrices, 1, 1)."""
        sizes = []
        for squares, power, stack in zip(self._squares, self._powers(-exponent / 2.0), self.stacks, strict=True):
            norm = (squares * power**2).sum(-1).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
            sizes.append(((stack.shape[-2] * stack.shape[-1]) ** 0.5 / norm).reshape(-1, 1, 1))
        return sizes

    def part(self, kind: str, exponent: float, sizes: Sequence[torch.Tensor]) -> Part:
        """What P is, each of its eigenvalues counted for all columns that it multiplies."""
        values, damped = [], []
        for number, (squares, floor) in enumerate(zip(self._squares, self._floors, strict=True)):
            live = floor.squeeze(-1) > 0.0
            power = (squares + floor)[live] ** (exponent / 2.0) / sizes[number].squeeze(-1)[live]
            columns = self.stacks[number].shape[-1]
            values.append(power.repeat_interleave(columns))
            damped.append((squares < floor)[live].reshape(-1).repeat_interleave(columns))
        eigenvalues, small = torch.cat([v.reshape(-1) for v in values]), torch.cat(damped)
        if not len(eigenvalues):
            raise ValueError(f"preconditioner: found no momentum in {self.segment.name}, allowed: some")
        excluded = self.segment.numel - len(eigenvalues)
        damping = f"{self.damping:.1e} of the Frobenius norm added in square"
        return replace(_part(eigenvalues, small, kind, damping), parameters=self.segment.numel, excluded=excluded)

    def _powers(self, exponent: float) -> list[torch.Tensor]:
        """Damped squares of the singular values to this power, (matrices, rows); zero for a zero matrix."""
        powers = []
        for squares, floor in zip(self._squares, self._floors, strict=True):
            damped = squares + floor
            powers.append(torch.where(damped > 0.0, damped, 1.0) ** exponent * (floor > 0.0))
        return powers


_KNOWN: dict[type, tuple[str, Callable[[OptimizerState, Segment], _Found]]] = {
    Sgd: ("identity", _identity),
    Adam: ("diag(sqrt(v / (1 - beta2^t)) + eps)", _adam),
    RAdam: ("diag((sqrt(v) + eps) / sqrt(1 - beta2^t)), identity before the rectification begins", _rectified),
    Ranger: ("RAdam's, without Lookahead", _rectified),
    Lamb: ("diag(sqrt(v) + eps) over the trust ratio of each block", _lamb),
    ScheduleFree: ("diag(sqrt(v / (1 - beta2^t)) + eps)", _adam),
    Soap: ("Q diag((sqrt(V) + eps) / sqrt(1 - beta2^(t-1))) Q^T in the eigenbases Q = QL x QR", _soap),
    Muon: ("(M M^T + d^2 |M|^2 I)^(1/2) / scale, M the momentum with the smaller side in front", _muon),
    SoapMuon: (
        "P^-1 = S^-1/2 K S^-1/2: SOAP's S, and K = scale (D D^T + d^2 |D|^2 I)^(-(1-rho)/2) of SOAP's direction D",
        _soap_muon,
    ),
}


def _scalars(state: OptimizerState) -> dict[str, torch.Tensor]:
    """Hyperparameters as the rules take them."""
    device = _device(state)
    return {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in state.hyper.items()}


def _device(state: OptimizerState) -> torch.device:
    return next(iter(state.weights.values())).device
