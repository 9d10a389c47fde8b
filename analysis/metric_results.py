"""What each metric beside the test error says of the optimizers, and whether it says more than the force error does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from analysis.comparison import Comparison, Contender
from analysis.model_metrics import About, ModelMetric
from analysis.pareto import dominated
from analysis.rank_correlation import RankCorrelation, rank_correlation
from analysis.seed_intervals import seed_interval
from analysis.statistics import Interval, iqm
from analysis.verdict import Verdict, decide
from analysis.workload_tests import holm

_LEVEL = 0.05


@dataclass(frozen=True, kw_only=True)
class MetricArm:
    """One optimizer under a metric.

    Attributes:
        rank: place by IQM; optimizers that failed share the worst one.
        iqm: over the seeds of the selected configuration, ``inf`` where failures reach the interquartile range.
        interval: 95 % studentized; ``None`` for fewer than three seeds.
        n_seeds: seeds with a value, failed ones included. n_failed: of them.
        refined: IQM of the refined weights; ``None`` where there are none.
        on_front: no other optimizer is at least as good in this metric and in the test force error and better in one.
    """

    optimizer: str
    rank: float
    iqm: float
    interval: Interval | None
    n_seeds: int
    n_failed: int
    refined: float | None
    on_front: bool


@dataclass(frozen=True, kw_only=True)
class MetricResult:
    """A metric beside the test error; it never selects.

    Attributes:
        verdict: as for the test force error, but the intervals hold the luck of the seeds alone, and a winner's
            comparisons must hold after `p` was adjusted.
        p: of the leading optimizer's closest comparison, adjusted by Holm over the metrics of the workload.
        with_force: its rank correlation with the test force error over optimizers; ``None`` for fewer than four.
        arms: best first.
        comparisons: the leading optimizer against every other one, in `unit`.
    """

    name: str
    about: About
    entry: str
    unit: str
    verdict: Verdict
    winner: str | None
    tied: tuple[str, ...]
    p: float | None
    with_force: RankCorrelation | None
    arms: tuple[MetricArm, ...]
    comparisons: tuple[Comparison, ...]


def metric_results(
    metrics: Sequence[ModelMetric],
    forces: Mapping[str, Mapping[int, float]],
    *,
    missing: Sequence[str],
    unmeasured: Sequence[str],
    failed_checks: Sequence[str],
    exploratory: bool,
    seed: Callable[[str, str], int],
) -> tuple[MetricResult, ...]:
    """Judge every metric that some optimizer has.

    Args:
        metrics: of one workload, optimizers that are ranked only.
        forces: test force error by optimizer and seed.
        missing: what an unfinished workload lacks.
        unmeasured: models whose properties are not complete.
        failed_checks: names of checks that failed.
        exploratory: the search adapted itself to results, so nothing is ranked.
        seed: bootstrap seed from a metric's name and what is drawn.
    """
    found = [
        _result(
            metric,
            forces,
            missing if metric.about is About.OOD else [*missing, *unmeasured],
            failed_checks,
            exploratory,
            seed,
        )
        for metric in metrics
        if any(metric.values.values())
    ]
    adjusted = iter(holm([result.p for result in found if result.p is not None]))
    return tuple(result if result.p is None else _adjusted(result, next(adjusted)) for result in found)


def _result(
    metric: ModelMetric,
    forces: Mapping[str, Mapping[int, float]],
    missing: Sequence[str],
    failed_checks: Sequence[str],
    exploratory: bool,
    seed: Callable[[str, str], int],
) -> MetricResult:
    arms = _arms(metric, forces)
    decision, comparisons = decide(
        [Contender(optimizer=arm.optimizer, values=metric.values[arm.optimizer]) for arm in arms],
        exploratory=exploratory,
        missing=missing,
        failed_checks=failed_checks,
        seed=lambda first, second: seed(metric.name, f"{first} {second}"),
    )
    return MetricResult(
        name=metric.name,
        about=metric.about,
        entry=metric.entry,
        unit=metric.unit,
        verdict=decision.verdict,
        winner=decision.winner,
        tied=decision.tied,
        p=max((1.0 if c.p is None else c.p for c in comparisons), default=None),
        with_force=_with_force(arms, forces, seed(metric.name, "correlation")),
        arms=arms,
        comparisons=comparisons,
    )


def _adjusted(result: MetricResult, p: float) -> MetricResult:
    """One of many metrics is won by chance: a winner must stay one after the adjustment."""
    if result.verdict is Verdict.WINNER and p > _LEVEL:
        return replace(result, p=p, verdict=Verdict.UNRESOLVED, winner=None)
    return replace(result, p=p)


def _arms(metric: ModelMetric, forces: Mapping[str, Mapping[int, float]]) -> tuple[MetricArm, ...]:
    seeds = {name: np.array(list(own.values()), dtype=np.float64) for name, own in metric.values.items() if own}
    levels = {name: float(iqm(values)) for name, values in seeds.items()}
    ranks = dict(zip(levels, stats.rankdata(list(levels.values())).tolist(), strict=True))
    both = [name for name in levels if forces.get(name)]
    table = np.array([[levels[name], _level(forces[name])] for name in both], dtype=np.float64).reshape(len(both), 2)
    front = {name for name, beaten in zip(both, dominated(table), strict=True) if not beaten}
    arms = [
        MetricArm(
            optimizer=name,
            rank=ranks[name],
            iqm=levels[name],
            interval=seed_interval(values),
            n_seeds=len(values),
            n_failed=int(np.isinf(values).sum()),
            refined=_level(metric.refined[name]) if metric.refined.get(name) else None,
            on_front=name in front and bool(np.isfinite(levels[name])),
        )
        for name, values in seeds.items()
    ]
    return tuple(sorted(arms, key=lambda arm: (arm.rank, arm.optimizer)))


def _level(seeds: Mapping[int, float]) -> float:
    return float(iqm(np.array(list(seeds.values()), dtype=np.float64)))


def _with_force(
    arms: Sequence[MetricArm], forces: Mapping[str, Mapping[int, float]], seed: int
) -> RankCorrelation | None:
    both = [arm for arm in arms if forces.get(arm.optimizer)]
    own = np.array([arm.iqm for arm in both], dtype=np.float64)
    force = np.array([_level(forces[arm.optimizer]) for arm in both], dtype=np.float64)
    return rank_correlation(force, own, seed)
