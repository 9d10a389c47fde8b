"""What the tune stage says of one arm: failures, good learning rates, the worth of tuning, what matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.best_of_n import BestOfN, budget_grid, censored_best_of_n, stopped_bounds
from analysis.failure_rates import FailureRate, failure_rate
from analysis.importance import available_methods, importance
from analysis.ledger import FAILURES
from analysis.load import Run
from analysis.sensitivity import Tunability, Width, learning_rate_width, tunability
from analysis.statistics import Floats, Indices
from analysis.step_costs import TimeAxis, time_axis
from analysis.tuning_curve import ended_value
from tunebench.study.record import Reason, Stage, TrialRecord
from tunebench.study.seeds import named_seed

LEARNING_RATE = "learning_rate"


@dataclass(frozen=True, kw_only=True)
class ArmSearch:
    """Statistics of an arm's tune stage, on the validation objective (lower is better).

    Attributes:
        failures: failed tune trials. confirm_failures: failed confirm trials.
        width: range of good learning rates; ``None`` where none was searched or nothing was found.
        tunability: worth and price of tuning, stopped trials at what they had; ``None`` where nothing was found.
        best_of_n: expected best of n configurations; a failure counts as the worst finite objective. ``None`` before a
            trial has ended well.
        censored: trials stopped early, which `best_of_n` bounds from both sides.
        importance: method -> hyperparameter -> share, for arms with enough trials.
    """

    failures: FailureRate
    confirm_failures: FailureRate
    width: Width | None
    tunability: Tunability | None
    best_of_n: BestOfN | None
    censored: int
    importance: dict[str, dict[str, float]]


def arm_search(run: Run, workload: str, optimizer: str) -> ArmSearch:
    """Statistics of an arm's search."""
    tune = [trial for trial in run.arm(workload, optimizer, Stage.TUNE) if trial.reason is not None]
    confirm = [trial for trial in run.arm(workload, optimizer, Stage.CONFIRM) if trial.reason is not None]
    values = np.array([ended_value(trial) for trial in tune], dtype=np.float64)
    stopped = np.array([i for i, trial in enumerate(tune) if trial.reason is Reason.STOPPED_ASHA], dtype=np.intp)
    seed = named_seed(run.study.seed, "bootstrap", workload, optimizer, "search")
    return ArmSearch(
        failures=_failures(tune),
        confirm_failures=_failures(confirm),
        width=_width(tune, values),
        tunability=tunability(values, _device_s(time_axis(run, workload), tune)) if len(values) else None,
        best_of_n=_best_of_n(tune, values, stopped, seed),
        censored=len(stopped),
        importance=_importance(run, optimizer, tune, values, seed),
    )


def _failures(trials: Sequence[TrialRecord]) -> FailureRate:
    return failure_rate(sum(trial.reason in FAILURES for trial in trials), len(trials))


def _device_s(axis: TimeAxis, trials: Sequence[TrialRecord]) -> Floats:
    return np.array([axis.of_trial(trial) for trial in trials], dtype=np.float64)


def _width(tune: Sequence[TrialRecord], values: Floats) -> Width | None:
    rates = np.array([trial.params.get(LEARNING_RATE, math.nan) for trial in tune], dtype=np.float64)
    if not len(rates) or not np.isfinite(rates).all():
        return None
    return learning_rate_width(rates, values)


def _best_of_n(tune: Sequence[TrialRecord], values: Floats, stopped: Indices, seed: int) -> BestOfN | None:
    if not np.isfinite(values).any():
        return None
    seen = np.array([_best_seen(trial, value) for trial, value in zip(tune, values, strict=True)], dtype=np.float64)
    bounds = stopped_bounds(values, seen, stopped)
    worst = max(float(values[np.isfinite(values)].max()), float(seen[np.isfinite(seen)].max()))
    optimistic, pessimistic = (np.minimum(bound, worst) for bound in bounds)
    return censored_best_of_n(optimistic, pessimistic, budget_grid(len(values)), seed=seed)


def _best_seen(trial: TrialRecord, value: float) -> float:
    """Lowest objective that a trial had at a rung or at its end."""
    rungs = [rung for rung in trial.rungs.values() if math.isfinite(rung)]
    return min([value, *rungs]) if trial.reason is Reason.STOPPED_ASHA else value


def _importance(
    run: Run, optimizer: str, tune: Sequence[TrialRecord], values: Floats, seed: int
) -> dict[str, dict[str, float]]:
    parameters = run.resolved.spaces[optimizer].parameters
    known = [place for place, trial in enumerate(tune) if all(name in trial.params for name in parameters)]
    ranges = {name: parameter.distribution() for name, parameter in parameters.items()}
    found = {
        method.value: importance([tune[place].params for place in known], values[known], ranges, method, seed=seed)
        for method in available_methods()
    }
    return {method: shares for method, shares in found.items() if shares is not None}
