"""What force labels are worth: error against their fraction, and the fraction that reaches the baseline's error.

Workloads belong together when they differ in nothing but the share of frames that keep their force labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.seed_intervals import bounds, estimate, seed_interval
from analysis.statistics import MINIMUM_RUNS, Floats, Interval, iqm


@dataclass(frozen=True, kw_only=True)
class LabelPoint:
    """Test force MAE (eV/Å, lower is better) at one fraction: IQM over seeds and its 95 % interval."""

    fraction: float
    iqm: float
    interval: Interval | None
    n_seeds: int


@dataclass(frozen=True, kw_only=True)
class LabelsNeeded:
    """The fraction of force labels at which an optimizer reaches the baseline's error with the most labels.

    Attributes:
        fraction: smallest such fraction; ``None`` where no fraction reaches it.
        low, high: 95 % interval: below `low` the optimizer is worse beyond chance, from `high` on it is shown to be
            better; ``None`` for an end that lies beyond the measured fractions.
        censored: even the smallest measured fraction reaches it, so less may do.
    """

    fraction: float | None
    low: float | None
    high: float | None
    censored: bool


@dataclass(frozen=True, kw_only=True)
class LabelEfficiency:
    """Curves of all optimizers on workloads that differ in their force labels only.

    Attributes:
        workloads: fraction -> name of the workload.
        baseline: optimizer whose error with the most labels is the mark.
        curves: optimizer -> points by rising fraction.
        needed: optimizer -> labels it needs for the baseline's error.
    """

    workloads: dict[float, str]
    baseline: str
    curves: dict[str, tuple[LabelPoint, ...]]
    needed: dict[str, LabelsNeeded]


def label_efficiency(
    workloads: Mapping[float, str], errors: Mapping[str, Mapping[float, Mapping[int, float]]], baseline: str
) -> LabelEfficiency:
    """Curves over fractions and the labels that each optimizer needs.

    Args:
        workloads: fraction of frames with force labels -> workload.
        errors: optimizer -> fraction -> test force error by seed index, ``inf`` for a failed seed.
        baseline: one of the optimizers.
    """
    curves = {name: _curve(by_fraction) for name, by_fraction in errors.items()}
    mark = errors.get(baseline, {}).get(max(workloads), {})
    needed = {name: labels_needed(by_fraction, mark) for name, by_fraction in errors.items()} if mark else {}
    return LabelEfficiency(workloads=dict(sorted(workloads.items())), baseline=baseline, curves=curves, needed=needed)


def labels_needed(errors: Mapping[float, Mapping[int, float]], mark: Mapping[int, float]) -> LabelsNeeded:
    """The smallest fraction at which an optimizer's error is at most the mark.

    At each fraction the log of its error minus the log of the mark is taken over common seeds, with a studentized
    interval. The fraction and the ends of its interval are where centre, lower and upper end first reach 0, linear
    between the measured fractions; error curves bend upwards towards few labels, so that asks for rather too many.

    Args:
        errors: fraction -> error by seed index, at least one fraction.
        mark: the baseline's error with the most labels by seed index.
    """
    fractions = np.array(sorted(errors), dtype=np.float64)
    rows = [_log_difference(errors[fraction], mark) for fraction in sorted(errors)]
    low, centre, high = (np.array(values, dtype=np.float64) for values in zip(*rows, strict=True))
    return LabelsNeeded(
        fraction=first_crossing(fractions, centre),
        low=first_crossing(fractions, low) if low[0] > 0.0 else None,
        high=first_crossing(fractions, high),
        censored=bool(centre[0] <= 0.0),
    )


def first_crossing(fractions: Floats, values: Floats) -> float | None:
    """Where a piecewise linear curve first is at or below 0; ``None`` where it never is.

    Args:
        fractions: rising, shape (points,).
        values: shape (points,), infinite where nothing is known.
    """
    below = np.flatnonzero(values <= 0.0)
    if not len(below):
        return None
    place = int(below[0])
    if place == 0 or not np.isfinite(values[place - 1 : place + 1]).all():
        return float(fractions[place])
    above, under = values[place - 1], values[place]
    share = above / (above - under)
    return float(fractions[place - 1] + share * (fractions[place] - fractions[place - 1]))


def _curve(by_fraction: Mapping[float, Mapping[int, float]]) -> tuple[LabelPoint, ...]:
    points = []
    for fraction, by_seed in sorted(by_fraction.items()):
        values = np.array(list(by_seed.values()), dtype=np.float64)
        interval = seed_interval(values)
        points.append(LabelPoint(fraction=fraction, iqm=float(iqm(values)), interval=interval, n_seeds=len(values)))
    return tuple(points)


def _log_difference(errors: Mapping[int, float], mark: Mapping[int, float]) -> tuple[float, float, float]:
    """Lower end, centre and upper end of the log ratio over common seeds; two failures are alike."""
    common: Sequence[int] = sorted(set(errors) & set(mark))
    ours, theirs = (np.array([values[seed] for seed in common], dtype=np.float64) for values in (errors, mark))
    if not len(common):
        return -np.inf, np.inf, np.inf
    both = np.isinf(ours) & np.isinf(theirs)
    differences = np.log(np.where(both, 1.0, ours)) - np.log(np.where(both, 1.0, theirs))
    if len(common) < MINIMUM_RUNS:
        return -np.inf, float(iqm(differences)), np.inf
    found = estimate(differences)
    low, high = bounds(found)
    return float(low), float(found.centre), float(high)
