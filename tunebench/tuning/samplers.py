"""Samplers: points in the unit cube, turned into configurations by the search spaces."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import QMCSampler, TPESampler
from optuna.trial import TrialState, create_trial

from tunebench.study.record import Reason, TrialRecord
from tunebench.study.search_space import SearchSpace

_STATES = {Reason.FINISHED: TrialState.COMPLETE, Reason.STOPPED_ASHA: TrialState.PRUNED}
_LEADING = ("learning_rate", "weight_decay")  # the best distributed dimensions of a Sobol sequence are its first


class _CubeSobol(QMCSampler):
    """Optuna's Sobol sampler on a fixed unit cube; Optuna alone would draw its first point at random."""

    def __init__(self, names: Iterable[str], seed: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            super().__init__(qmc_type="sobol", scramble=True, seed=seed, warn_asynchronous_seeding=False)
        self._cube: dict[str, BaseDistribution] = {name: FloatDistribution(0.0, 1.0) for name in names}

    def infer_relative_search_space(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        return self._cube


def sobol_points(spaces: Iterable[SearchSpace], count: int, seed: int) -> list[dict[str, float]]:
    """`count` points of one scrambled Sobol sequence over every searched parameter of all `spaces`.

    All arms of a workload take their columns from the same points, so parameters they share have common values of
    the unit cube (rules F3, F4).
    """
    names = {name for space in spaces for name in space.parameters}
    ordered = [n for n in _LEADING if n in names] + sorted(names.difference(_LEADING))
    study = optuna.create_study(sampler=_CubeSobol(ordered, seed))
    points = []
    for _ in range(count):
        trial = study.ask(fixed_distributions={name: FloatDistribution(0.0, 1.0) for name in ordered})
        points.append({name: min(trial.params[name], math.nextafter(1.0, 0.0)) for name in ordered})
        study.tell(trial, 0.0)
    return points


def configuration(space: SearchSpace, point: Mapping[str, float]) -> dict[str, Any]:
    """Values of an arm's searched parameters at a point of the unit cube."""
    return {name: parameter.value_at(point[name]) for name, parameter in space.parameters.items()}


def tpe_configurations(
    space: SearchSpace, history: Sequence[TrialRecord], count: int, seed: int
) -> list[dict[str, Any]]:
    """`count` configurations that TPE proposes after an arm's finished trials; exploratory, never ranked."""
    distributions: dict[str, BaseDistribution] = {
        name: parameter.distribution() for name, parameter in space.parameters.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True)
    study = optuna.create_study(sampler=sampler)
    for record in history:
        if record.reason not in _STATES or record.value is None:
            continue
        state = _STATES[record.reason]
        study.add_trial(
            create_trial(
                state=state,
                params=record.params,
                distributions=distributions,
                value=record.value if state == TrialState.COMPLETE else None,
                intermediate_values=record.rungs,
            )
        )
    return [dict(study.ask(fixed_distributions=distributions).params) for _ in range(count)]
