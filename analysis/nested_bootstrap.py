"""The stratified paired bootstrap that re-selects: workloads, configurations and seeds are drawn, for all arms alike.

Steps of one draw (Dodge et al. 2019 and rliable, arXiv:2108.13264, joined): workloads with replacement where there are
six or more; per workload configurations with replacement, the same numbers for every arm; each arm's preferred one
among them; seeds with replacement, the same for every arm; a statistic over seeds; a mean over workloads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from analysis.reselection import Search
from analysis.statistics import DRAWS, Floats, Indices, Interval, iqm, paired_differences, percentile_interval
from analysis.workload_tests import MINIMUM_WORKLOADS

_CHUNK = 2_000_000
"""Numbers held at once in the largest array of a draw."""


class Statistic(StrEnum):
    """What speaks for the seeds of a configuration; lower is better."""

    IQM = "iqm"
    MEDIAN = "median"
    MEAN = "mean"


@dataclass(frozen=True, kw_only=True)
class Redrawn:
    """Draws of every arm on one workload.

    Attributes:
        values: optimizer -> statistic of the redrawn arm, shape (draws,), ``inf`` where what was drawn failed.
        flagged: optimizer -> share of draws whose configuration has no confirm seeds, so that its stage-1 value stands
            in for all of them.
    """

    values: dict[str, Floats]
    flagged: dict[str, float]


def redraw(
    searches: Mapping[str, Search],
    seeds: Sequence[int],
    *,
    seed: int,
    statistic: Statistic = Statistic.IQM,
    draws: int = DRAWS,
) -> Redrawn:
    """Redraw configurations and seeds of one workload, the same for every arm.

    Args:
        searches: what each arm's search offers, at least one configuration each.
        seeds: confirm seed indices that are drawn; seeds that a configuration lacks count as failed.
        seed: seed of the draws.
        statistic: what speaks for the seeds.
        draws: number of draws.

    Raises:
        ValueError: there are no arms, no seeds, or an arm without a configuration.
    """
    if not searches or not seeds or any(not search.order for search in searches.values()):
        raise ValueError("redraw: found no arms, seeds or configurations, allowed: at least one of each")
    configs = sorted({config for search in searches.values() for config in search.order})
    places = {name: _places(search, configs) for name, search in searches.items()}
    tables = {name: _values(search, seeds) for name, search in searches.items()}
    generator = np.random.default_rng(seed)
    parts: dict[str, list[Floats]] = {name: [] for name in searches}
    unconfirmed = dict.fromkeys(searches, 0)
    for size in _chunks(draws, max(len(configs), len(seeds))):
        drawn = generator.integers(0, len(configs), size=(size, len(configs)), dtype=np.intp)
        runs = generator.integers(0, len(seeds), size=(size, len(seeds)), dtype=np.intp)
        for name, search in searches.items():
            picked = places[name][drawn].min(axis=1)
            values = np.take_along_axis(tables[name][picked], runs, axis=1)
            parts[name].append(_statistic(values, statistic))
            unconfirmed[name] += int((picked >= len(search.confirmed)).sum())
    return Redrawn(
        values={name: np.concatenate(found) for name, found in parts.items()},
        flagged={name: count / draws for name, count in unconfirmed.items()},
    )


def difference_interval(redrawn: Redrawn, first: str, second: str) -> Interval:
    """Percentile interval of first minus second arm over paired draws; two failures are no difference."""
    return percentile_interval(paired_differences(redrawn.values[first], redrawn.values[second]))


def probability_of_lead(redrawn: Redrawn, first: str, second: str) -> float:
    """Share of draws in which the first arm has the lower error, ties counting half."""
    difference = paired_differences(redrawn.values[first], redrawn.values[second])
    return float((difference < 0.0).mean() + 0.5 * (difference == 0.0).mean())


def pooled(by_workload: Sequence[Redrawn], *, seed: int, baseline: str) -> dict[str, Floats]:
    """Log of each arm's error over the baseline's, averaged over workloads, by optimizer, shape (draws,).

    Workloads are drawn with replacement from `MINIMUM_WORKLOADS` on. Logs of ratios make workloads with different error
    levels comparable; minus the logarithm of the geometric-mean improvement. A failure is ``inf``.

    Args:
        by_workload: draws of every workload, equally many.
        seed: seed of the draws of workloads.
        baseline: optimizer that the others are divided by.
    """
    names = [name for name in by_workload[0].values if all(name in redrawn.values for redrawn in by_workload)]
    logs = {
        name: np.stack([_log_ratio(part.values[name], part.values[baseline]) for part in by_workload]) for name in names
    }
    number, draws = logs[baseline].shape
    if number < MINIMUM_WORKLOADS:
        return {name: np.asarray(values.mean(axis=0), dtype=np.float64) for name, values in logs.items()}
    drawn = np.random.default_rng(seed).integers(0, number, size=(number, draws), dtype=np.intp)
    return {
        name: np.asarray(np.take_along_axis(values, drawn, axis=0).mean(axis=0), dtype=np.float64)
        for name, values in logs.items()
    }


def _places(search: Search, configs: Sequence[int]) -> Indices:
    """Place in the arm's order of each configuration, the place after the last one where the arm lacks it."""
    place = {config: place for place, config in enumerate(search.order)}
    return np.array([place.get(config, len(search.order)) for config in configs], dtype=np.intp)


def _values(search: Search, seeds: Sequence[int]) -> Floats:
    """Error by place and seed, shape (configurations + 1, seeds); the last row, nothing drawn, has failed."""
    confirmed = [[values.get(seed, np.inf) for seed in seeds] for values in search.confirmed]
    tuned = [[value] * len(seeds) for value in search.tuned]
    return np.array([*confirmed, *tuned, [np.inf] * len(seeds)], dtype=np.float64)


def _statistic(values: Floats, statistic: Statistic) -> Floats:
    if statistic is Statistic.IQM:
        return iqm(values)
    if statistic is Statistic.MEAN:
        return np.asarray(values.mean(axis=-1), dtype=np.float64)
    ordered, middle = np.sort(values, axis=-1), values.shape[-1] // 2
    lower = ordered[..., middle] if values.shape[-1] % 2 else ordered[..., middle - 1]
    return np.asarray(0.5 * (lower + ordered[..., middle]), dtype=np.float64)


def _log_ratio(values: Floats, baseline: Floats) -> Floats:
    """Log of a ratio of errors; 0 where both failed, so that a failed baseline helps nobody who failed too."""
    both = np.isposinf(values) & np.isposinf(baseline)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(both, 0.0, np.log(values) - np.log(np.where(both, 1.0, baseline))), dtype=np.float64)


def _chunks(draws: int, width: int) -> Iterator[int]:
    size = max(_CHUNK // max(width, 1), 1)
    for start in range(0, draws, size):
        yield min(size, draws - start)
