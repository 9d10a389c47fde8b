"""Which hyperparameters matter in an arm's search: Optuna's PED-ANOVA and fANOVA on the trials of the tune stage."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from enum import StrEnum
from importlib.util import find_spec
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.importance import BaseImportanceEvaluator, FanovaImportanceEvaluator, PedAnovaImportanceEvaluator
from optuna.trial import create_trial

from analysis.statistics import Floats

MINIMUM_TRIALS = 8
"""Fewer trials say nothing about importance."""
_BEST_SHARE, _FEWEST_BEST = 0.1, 4
"""PED-ANOVA asks what the best tenth of the trials has in common, and never fewer than four of them."""
_PACKAGE_OF_FANOVA = "sklearn"


class Method(StrEnum):
    """FANOVA: variance over the whole space (Hutter et al. 2014). PED_ANOVA: over its best part (Watanabe 2023)."""

    PED_ANOVA = "ped_anova"
    FANOVA = "fanova"


def available_methods() -> tuple[Method, ...]:
    """Methods that can be used here: fANOVA's forest needs scikit-learn, PED-ANOVA needs nothing more."""
    return tuple(Method) if find_spec(_PACKAGE_OF_FANOVA) else (Method.PED_ANOVA,)


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
        seed: seed of fANOVA's forest; PED-ANOVA draws nothing.

    Returns:
        ``None`` for fewer than eight trials, for fewer than two hyperparameters, or where no two errors differ.

    Raises:
        ValueError: fANOVA without scikit-learn.
    """
    if method not in available_methods():
        raise ValueError(f"importance: found method {method} without scikit-learn, allowed: {Method.PED_ANOVA}")
    errors = np.asarray(errors, dtype=np.float64)
    finite = errors[np.isfinite(errors)]
    if len(params) < MINIMUM_TRIALS or len(distributions) < 2 or len(np.unique(finite)) < 2:
        return None
    study = optuna.create_study(direction="minimize")
    for values, error in zip(params, np.minimum(errors, finite.max()), strict=True):
        chosen = {name: values[name] for name in distributions}
        study.add_trial(create_trial(params=chosen, distributions=dict(distributions), value=float(error)))
    found = optuna.importance.get_param_importances(study, evaluator=_evaluator(method, seed, len(params)))
    total = sum(found.values())
    return {name: float(value) / total for name, value in found.items()} if total > 0.0 else None


def _evaluator(method: Method, seed: int, trials: int) -> BaseImportanceEvaluator:
    if method is Method.FANOVA:
        return FanovaImportanceEvaluator(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return PedAnovaImportanceEvaluator(target_quantile=max(_BEST_SHARE, _FEWEST_BEST / trials))
