"""Any update rule with learning rates that differ between weights by fixed factors.

Weights of one factor are a part with a rule and a state of its own, as parameter groups are in torch.optim. So a factor
reaches whatever the learning rate reaches: decoupled weight decay, Lookahead's and schedule-free averages, trust
ratios. Gradients are clipped before, over all weights together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from tunebench.optim.packing import Packing, Tensors, factor_suffix
from tunebench.optim.rule import Hyper, Phase, Renewal, UpdateRule, renewal_of

Averaged = Callable[[Tensors, Tensors, Hyper], Tensors]


@dataclass(frozen=True)
class Part:
    """The weights of one factor.

    Attributes:
        factor: on the learning rate.
        rule: on a packing of these weights alone.
        others: suffixes of the other parts' names; empty ones left out.
    """

    factor: float
    rule: UpdateRule
    others: tuple[str, ...]

    @property
    def suffix(self) -> str:
        """What the part's names end with among those of all parts."""
        return factor_suffix(self.factor)

    def own(self, tensors: Mapping[str, torch.Tensor]) -> Tensors:
        """The part's tensors under the names of its own rule."""
        if self.suffix:
            return {k.removesuffix(self.suffix): v for k, v in tensors.items() if k.endswith(self.suffix)}
        return {key: value for key, value in tensors.items() if not key.endswith(self.others)}

    def among_all(self, tensors: Tensors) -> Tensors:
        """The inverse of `own`."""
        return {key + self.suffix: value for key, value in tensors.items()}

    def hyper(self, hyper: Hyper) -> Hyper:
        """Hyperparameters with the part's learning rate."""
        return {**hyper, "learning_rate": hyper["learning_rate"] * self.factor}


@dataclass(frozen=True)
class Factored:
    """A rule on the parts of a packing; an `UpdateRule` itself.

    Attributes:
        packing: of all weights, whose segments are those of the parts.
        parts: of each factor.
    """

    packing: Packing
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, packing: Packing, rule: Callable[[Packing], UpdateRule]) -> Factored:
        """The rule that `rule` makes of a packing, on each of its parts."""
        suffixes = {factor_suffix(factor) for factor in packing.parts} - {""}
        return cls(packing, tuple(Part(f, rule(part), tuple(sorted(suffixes))) for f, part in packing.parts.items()))

    @property
    def hyperparameters(self) -> tuple[str, ...]:
        """Names that `update` reads from `hyper`."""
        return self.parts[0].rule.hyperparameters

    def init(self, params: Tensors) -> Tensors:
        """State before the first step."""
        return _joined(part.among_all(part.rule.init(part.own(params))) for part in self.parts)

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
        weights: Tensors = {}
        states: Tensors = {}
        for part in self.parts:
            own = part.own(grads), part.own(state), part.own(params)
            moved, kept = part.rule.update(*own, part.hyper(hyper), step, phase)
            weights |= part.among_all(moved)
            states |= part.among_all(kept)
        return weights, states

    def phase(self, step: int, hyper: Mapping[str, float]) -> Phase:
        """What a step needs; no phase depends on the learning rate, so it is the same for all parts."""
        return self.parts[0].rule.phase(step, hyper)

    @property
    def renewal(self) -> Renewal | None:
        """What makes a whole step out of a plain one, of rules that can be divided; None for others."""
        return None if renewal_of(self.parts[0].rule) is None else self._renewed

    def _renewed(self, state: Tensors, phase: Phase) -> Tensors:
        renewals = [(part, renewal_of(part.rule)) for part in self.parts]
        return _joined(
            part.among_all(renewal(part.own(state), phase)) for part, renewal in renewals if renewal is not None
        )

    @property
    def averaged(self) -> Averaged | None:
        """What reads out averaged weights, of rules that keep them in their state; None for others."""
        return None if reads_average(self.parts[0].rule) is None else self._averaged

    def _averaged(self, params: Tensors, state: Tensors, hyper: Hyper) -> Tensors:
        read = [(part, reads_average(part.rule)) for part in self.parts]
        return _joined(
            part.among_all(averaged(part.own(params), part.own(state), part.hyper(hyper)))
            for part, averaged in read
            if averaged is not None
        )


def reads_average(rule: UpdateRule) -> Averaged | None:
    """The function of a rule that reads averaged weights out of its state; None where it keeps none."""
    read: Averaged | None = getattr(rule, "averaged", None)
    return read


def _joined(parts: Iterable[Tensors]) -> Tensors:
    return {key: value for part in parts for key, value in part.items()}
