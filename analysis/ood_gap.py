"""How much worse an optimizer's models are out of distribution than in it. Nothing selects or ranks by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.arm_result import ArmResult, Summary
from analysis.seed_intervals import seed_interval
from analysis.statistics import Interval, iqm
from tunebench.study.record import OOD_PREFIX, Metric, Split

GAP_METRICS = (Metric.FORCES_MAE, Metric.ENERGY_PER_ATOM_MAE)


@dataclass(frozen=True, kw_only=True)
class OodGap:
    """Error out of distribution over that in it, of the seeds of an arm's selected configuration; 1 is no gap.

    Attributes:
        split: ``ood:NAME``.
        factor: IQM over seeds of the same model's two errors, taken of their logarithms; ``None`` where no seed has
            both.
        interval: its 95 % studentized interval; ``None`` for fewer than three seeds.
        n_seeds: seeds with both errors. n_failed: seeds that failed and have none.
    """

    optimizer: str
    split: str
    metric: Metric
    factor: float | None
    interval: Interval | None
    n_seeds: int
    n_failed: int


def ood_gaps(arms: Sequence[ArmResult]) -> tuple[OodGap, ...]:
    """The gaps of all arms, split by split; nothing where there is no out-of-distribution split."""
    splits = sorted({s.split for arm in arms for s in arm.errors if s.split.startswith(OOD_PREFIX)})
    return tuple(
        _gap(arm.optimizer, inside, outside)
        for split in splits
        for metric in GAP_METRICS
        for arm in arms
        if (inside := arm.summary(Split.TEST, metric)) and (outside := arm.summary(split, metric))
    )


def _gap(optimizer: str, inside: Summary, outside: Summary) -> OodGap:
    pairs = [(inside.values[seed], error) for seed, error in outside.values.items() if seed in inside.values]
    sound = [(test, ood) for test, ood in pairs if 0.0 < test < math.inf and 0.0 < ood < math.inf]
    logs = np.log(np.array([ood / test for test, ood in sound], dtype=np.float64))
    interval = seed_interval(logs)
    return OodGap(
        optimizer=optimizer,
        split=outside.split,
        metric=outside.metric,
        factor=math.exp(float(iqm(logs))) if len(logs) else None,
        interval=None if interval is None else Interval(low=math.exp(interval.low), high=math.exp(interval.high)),
        n_seeds=len(sound),
        n_failed=len(pairs) - len(sound),
    )
