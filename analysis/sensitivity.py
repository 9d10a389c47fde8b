"""How wide the range of good learning rates is, and what searching for it is worth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.best_of_n import best_of_n, budget_grid
from analysis.statistics import Floats

NEAR_BEST = 0.1
"""An error within this share of the best one counts as good."""
LEVELS = (0.5, 0.2, 0.1, 0.05)
"""Shares above the arm's best error whose price in trials is told."""


@dataclass(frozen=True, kw_only=True)
class Width:
    """Range of learning rates that hold errors within 10 % of the arm's best.

    Attributes:
        low, high: smallest and largest such learning rate among the trials.
        decades: ``log10(high / low)``, 0 for a single one; a lower bound, for only rates that were tried count.
        trials: number of trials within 10 %.
        reaches_low, reaches_high: it is the lowest, the highest rate tried, so the range may go on beyond.
    """

    low: float
    high: float
    decades: float
    trials: int
    reaches_low: bool
    reaches_high: bool


def learning_rate_width(rates: Floats, errors: Floats, near: float = NEAR_BEST) -> Width | None:
    """Width in decades of the learning rates whose trials end within a share of the best error.

    Other hyperparameters vary as well, so rates between the ends may do worse. Stopped trials should come with a bound.

    Args:
        rates: learning rates, above 0, shape (trials,).
        errors: errors (lower is better), ``inf`` for failures, shape (trials,).
        near: share above the best error that still counts.

    Returns:
        ``None`` where no trial has a finite error.
    """
    rates, errors = np.asarray(rates, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    best = errors.min(initial=np.inf)
    if not np.isfinite(best):
        return None
    good = rates[errors <= best + near * abs(best)]
    low, high = float(good.min()), float(good.max())
    return Width(
        low=low,
        high=high,
        decades=float(np.log10(high / low)),
        trials=len(good),
        reaches_low=low <= float(rates.min()),
        reaches_high=high >= float(rates.max()),
    )


@dataclass(frozen=True, kw_only=True)
class Tunability:
    """What tuning an arm gives and costs.

    Attributes:
        median_error, best_error: of the arm's trials (lower is better).
        gain: ``1 - best / median``, the share of the error of a configuration picked blindly that the search removes.
        default_error: error with untuned defaults, ``None`` where no trial ran with them.
        default_gain: ``1 - best / default``, tunability in the sense of Probst et al. 2019 (arXiv:1802.09596).
        trials_to_level: share above the best error -> trials after which the expected best error is that low; ``None``
            where not even all of them suffice.
        seconds_to_level: the same in device-seconds, at the arm's mean cost of a trial.
    """

    median_error: float
    best_error: float
    gain: float
    default_error: float | None
    default_gain: float | None
    trials_to_level: dict[float, int | None]
    seconds_to_level: dict[float, float | None]


def tunability(errors: Floats, device_s: Floats, default_error: float | None = None) -> Tunability | None:
    """Gain by tuning and the price of each level of error.

    Args:
        errors: validation errors of the search's trials (lower is better), shape (trials,); a failure is ``inf`` and
            counts as the worst finite error, for an expectation over it would be infinite.
        device_s: device-seconds of the trials, shape (trials,).
        default_error: error of the configuration that nobody tuned.

    Returns:
        ``None`` where no trial has a finite error.
    """
    errors = np.asarray(errors, dtype=np.float64)
    finite = errors[np.isfinite(errors)]
    if not len(finite):
        return None
    bounded = np.minimum(errors, finite.max())
    best, middle = float(finite.min()), float(np.median(bounded))
    budgets = budget_grid(len(bounded), most=256)
    expected = best_of_n(bounded, budgets)
    trials = {level: _first_at(budgets, expected, best * (1.0 + level)) for level in LEVELS}
    mean_cost = float(np.mean(device_s))
    return Tunability(
        median_error=middle,
        best_error=best,
        gain=1.0 - best / middle if middle > 0.0 else 0.0,
        default_error=default_error,
        default_gain=None if not default_error else 1.0 - best / default_error,
        trials_to_level=trials,
        seconds_to_level={level: None if n is None else n * mean_cost for level, n in trials.items()},
    )


def _first_at(budgets: np.ndarray[tuple[int, ...], np.dtype[np.intp]], expected: Floats, level: float) -> int | None:
    # Only the best trial itself lies at its own level, and rounding must not lose it.
    reached = np.flatnonzero(expected <= level * (1.0 + 1e-12))
    return int(budgets[reached[0]]) if len(reached) else None
