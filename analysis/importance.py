"""Which hyperparameters matter in an arm's search: Optuna's PED-ANOVA and fANOVA on the trials of the tune stage."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.importance import BaseImportanceEvaluator, FanovaImportanceEvaluator, PedAnovaImportanceEvaluator
from optuna.trial import create_trial

from analysis.statistics import Floats, Indices

MINIMUM_TRIALS = 8
"""Fewer trials say nothing about importance."""
_TREES = 24
_BEST_SHARE, _FEWEST_BEST = 0.1, 4
"""PED-ANOVA asks what the best tenth of the trials has in common, and never fewer than four of them."""


class Method(StrEnum):
    """FANOVA: variance over the whole space (Hutter et al. 2014). PED_ANOVA: over its best part (Watanabe 2023)."""

    PED_ANOVA = "ped_anova"
    FANOVA = "fanova"


MOST_TRIALS = {Method.PED_ANOVA: 400, Method.FANOVA: 64}
"""Of more trials a method takes a random sample: fANOVA's time grows with their square, to 12 s for a thousand."""


def importance(
    params: Sequence[Mapping[str, Any]],
    errors: Floats,
    distributions: Mapping[str, BaseDistribution],
    method: Method,
    *,
    seed: int,
) -> dict[str, float] | None:
    """Share of each hyperparameter in the variation of the error, the most important one first, summing to 1.

    Args:
        params: hyperparameters of each trial, with the same names.
        errors: error of each trial (lower is better), shape (trials,); a failure is ``inf`` and counts as the worst
            finite error.
        distributions: ranges by name.
        method: which of the two.
        seed: seed of the sample of trials and of fANOVA's forest.

    Returns:
        ``None`` for fewer than eight trials, for fewer than two hyperparameters, or where no two errors differ.
    """
    errors = np.asarray(errors, dtype=np.float64)
    finite = errors[np.isfinite(errors)]
    if len(params) < MINIMUM_TRIALS or len(distributions) < 2 or len(np.unique(finite)) < 2:
        return None
    bounded = np.minimum(errors, finite.max())
    places = _places(method, len(params), seed)
    if len(np.unique(bounded[places])) < 2:
        return None
    with _quiet_optuna():
        study = optuna.create_study(direction="minimize")
    for place in places.tolist():
        chosen = {name: params[place][name] for name in distributions}
        study.add_trial(create_trial(params=chosen, distributions=dict(distributions), value=float(bounded[place])))
    found = optuna.importance.get_param_importances(study, evaluator=_evaluator(method, seed, len(places)))
    total = sum(found.values())
    return {name: float(value) / total for name, value in found.items()} if total > 0.0 else None


def _places(method: Method, trials: int, seed: int) -> Indices:
    """Which trials a method looks at: all of them, or a random sample where there are many."""
    if trials <= MOST_TRIALS[method]:
        return np.arange(trials, dtype=np.intp)
    drawn = np.random.default_rng(seed).choice(trials, size=MOST_TRIALS[method], replace=False)
    return np.sort(drawn).astype(np.intp)


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Without the line on standard error that tells of every new study."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _evaluator(method: Method, seed: int, trials: int) -> BaseImportanceEvaluator:
    if method is Method.FANOVA:
        return FanovaImportanceEvaluator(n_trees=_TREES, seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return PedAnovaImportanceEvaluator(target_quantile=max(_BEST_SHARE, _FEWEST_BEST / trials))
