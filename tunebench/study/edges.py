"""The edge rule F5: a best value in the outer tenth of its range may not be the best there is, so the range is widened.

Exempt are settings that trade cost, which are not judged by errors, choices, and the lower end of a weight decay, where
less is as good as none. Imports neither Ray nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import fmean
from typing import Any

from tunebench.study.record import Reason, Stage, TrialRecord
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.search_space import FloatParameter, Parameter, Role, SearchSpace

EDGE = 0.1
"""Share of a range at either end where the best value should not lie."""
_WIDENED_BY = 1.0 / 3.0  # of its width: a decade where three are searched


class Side(StrEnum):
    """An end of a range."""

    LOW = "low"
    HIGH = "high"


@dataclass(frozen=True, kw_only=True)
class Widening:
    """A range that is to be widened, or was.

    Attributes:
        optimizer: name of the optimizer's entry in the study. parameter: of its search space.
        low, high: ends of the wider range.
    """

    optimizer: str
    parameter: str
    low: float
    high: float


def outer_side(parameter: Parameter, value: Any) -> Side | None:
    """The end of a range at whose outer tenth a best value lies, if that says that the range is too narrow."""
    if not isinstance(parameter, FloatParameter) or parameter.role not in (Role.LEARNING_RATE, Role.DECAY):
        return None
    if value < parameter.low or parameter.unit_of(min(value, parameter.high)) < EDGE:
        return Side.LOW if parameter.role is Role.LEARNING_RATE else None
    return Side.HIGH if parameter.unit_of(min(value, parameter.high)) > 1.0 - EDGE else None


def widenings(resolved: ResolvedStudy, records: Iterable[TrialRecord]) -> list[Widening]:
    """The ranges at whose edge the best configuration of some arm lies, wider by a third of their width at that end.

    A search space belongs to its optimizer in all workloads, so an edge in one of them widens it for all.
    """
    of_arm: dict[tuple[str, str], list[TrialRecord]] = {}
    for record in records:
        of_arm.setdefault((record.key.optimizer, record.key.workload), []).append(record)
    bests: dict[str, list[dict[str, Any]]] = {}
    for (optimizer, _), trials in of_arm.items():
        bests.setdefault(optimizer, []).extend(_best_params(trials))
    found = (
        _widened(arm.name, resolved.spaces[arm.name], bests.get(arm.name, ())) for arm in resolved.study.optimizers
    )
    return [widening for each in found for widening in each]


def _best_params(trials: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Hyperparameters of an arm's best configuration by validation objective, confirmed where there is one."""
    stages = (_means([t for t in trials if t.key.stage is stage]) for stage in (Stage.CONFIRM, Stage.TUNE))
    means = next((means for means in stages if means), {})
    best = min(means, key=lambda index: (means[index], index), default=None)
    return [next(t.params for t in trials if t.key.config_index == best)] if best is not None else []


def _means(trials: Iterable[TrialRecord]) -> dict[int, float]:
    """Mean objective of every configuration whose trials all reached the horizon."""
    values: dict[int, list[float]] = {}
    for trial in trials:
        finished = trial.reason is Reason.FINISHED and trial.value is not None
        values.setdefault(trial.key.config_index, []).append(float(trial.value or 0.0) if finished else math.inf)
    means = {index: fmean(of_one) for index, of_one in values.items()}
    return {index: mean for index, mean in means.items() if math.isfinite(mean)}


def _widened(optimizer: str, space: SearchSpace, bests: Sequence[dict[str, Any]]) -> list[Widening]:
    found = []
    for name, parameter in space.parameters.items():
        sides = {outer_side(parameter, params[name]) for params in bests if name in params} - {None}
        if sides and isinstance(parameter, FloatParameter):
            low = _beyond(parameter, -_WIDENED_BY) if Side.LOW in sides else parameter.low
            high = _beyond(parameter, 1.0 + _WIDENED_BY) if Side.HIGH in sides else parameter.high
            found.append(Widening(optimizer=optimizer, parameter=name, low=low, high=high))
    return found


def _beyond(parameter: FloatParameter, share: float) -> float:
    """The value at a share of the range that is not inside it, to four digits."""
    if parameter.log:
        value = parameter.low * (parameter.high / parameter.low) ** share
    else:
        value = parameter.low + share * (parameter.high - parameter.low)
    return float(f"{value:.4g}")
