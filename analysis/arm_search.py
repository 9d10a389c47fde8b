"""What the tune stage says of one arm: failures, good learning rates, the worth of tuning, what matters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.best_of_n import BestOfN, budget_grid, censored_best_of_n, stopped_bounds
from analysis.failure_rates import FailureRate, failure_rate
from analysis.importance import Method, importance
from analysis.ledger import FAILURES
from analysis.load import Run
from analysis.sensitivity import Tunability, Width, learning_rate_width, tunability
from analysis.statistics import Floats, Indices
from analysis.step_costs import TimeAxis, time_axis
from analysis.tuning_curve import ended_value
from tunebench.study.false_stops import FalseStops, false_stops
from tunebench.study.record import Reason, Stage, TrialRecord
from tunebench.study.seeds import named_seed

LEARNING_RATE = "learning_rate"
FEWEST_SENTINELS = 4
"""Fewer sentinels say too little of a best of n."""


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
        sentinels_best_of_n: the same of sentinels alone, which nothing stopped: an unbiased sample whatever ASHA did.
            ``None`` for fewer than four, or where nothing was stopped and `best_of_n` has no bounds.
        false_stops: what the sentinels tell of the arm's rungs; ``None`` without a tune trial.
        importance: method -> hyperparameter -> share, for arms with enough trials.
    """

    failures: FailureRate
    confirm_failures: FailureRate
    width: Width | None
    tunability: Tunability | None
    best_of_n: BestOfN | None
    censored: int
    sentinels_best_of_n: BestOfN | None
    false_stops: FalseStops | None
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
        tunability=_tunability(run, workload, optimizer, tune, values),
        best_of_n=_best_of_n(tune, values, stopped, seed),
        censored=len(stopped),
        sentinels_best_of_n=_sentinels_best_of_n(tune, values, seed) if len(stopped) else None,
        false_stops=next(iter(false_stops(tune)), None),
        importance=_importance(run, optimizer, tune, values, seed),
    )


def _failures(trials: Sequence[TrialRecord]) -> FailureRate:
    return failure_rate(sum(trial.reason in FAILURES for trial in trials), len(trials))


def _tunability(
    run: Run, workload: str, optimizer: str, tune: Sequence[TrialRecord], values: Floats
) -> Tunability | None:
    if not len(values):
        return None
    return tunability(values, _device_s(time_axis(run, workload), tune), _default_error(run, workload, optimizer))


def _default_error(run: Run, workload: str, optimizer: str) -> float | None:
    """What the untuned arm of the same optimizer ends with; ``None`` where there is none, or it failed."""
    rule = run.rule_of(optimizer)
    untuned = (arm.name for arm in run.study.optimizers if arm.untuned and arm.rule == rule and arm.name != optimizer)
    trials = (trial for name in untuned for trial in run.arm(workload, name, Stage.TUNE))
    ended = (ended_value(trial) for trial in trials if trial.reason is not None)
    return next((value for value in ended if math.isfinite(value)), None)


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


def _sentinels_best_of_n(tune: Sequence[TrialRecord], values: Floats, seed: int) -> BestOfN | None:
    """Of the sentinels that have ended; a failed one counts as the arm's worst finite objective."""
    places = [place for place, trial in enumerate(tune) if trial.sentinel and trial.reason is not Reason.STOPPED_ASHA]
    finite = values[np.isfinite(values)]
    if len(places) < FEWEST_SENTINELS or not np.isfinite(values[places]).any():
        return None
    own = np.minimum(values[places], finite.max())
    return censored_best_of_n(own, own, budget_grid(len(own)), seed=seed)


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
        for method in Method
    }
    return {method: shares for method, shares in found.items() if shares is not None}
