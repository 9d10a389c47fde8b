"""Mean ranks over workloads and which optimizers pairwise tests leave together: a critical-difference diagram's data.

Only where the numbers allow one. The usual critical difference (Nemenyi) depends on who else takes part and has no
power at the number of workloads of a study, so groups come from Wilcoxon's test with Holm's correction over all pairs
(Benavoli, Corani and Mangili, JMLR 17(5), 2016), and a diagram without a single separated pair is not drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import stats

from analysis.overall import LEVEL, log_errors
from analysis.ranking import Ranking
from analysis.statistics import Floats
from analysis.verdict import Verdict
from analysis.wording import counted, listed
from analysis.workload_tests import MINIMUM_WORKLOADS, holm, wilcoxon
from tunebench.study.record import Metric, Split


@dataclass(frozen=True, kw_only=True)
class MeanRanks:
    """Mean rank by optimizer, the best first, and the largest groups of which no pair is separated."""

    workloads: int
    ranks: dict[str, float]
    groups: tuple[tuple[str, ...], ...]


def mean_ranks(ranking: Ranking) -> MeanRanks | str:
    """Mean ranks of the test force error, or in words why there is no diagram."""
    number = len(ranking.workloads)
    if number < MINIMUM_WORKLOADS:
        return (
            f"No critical-difference diagram: {counted(number, 'workload')}, and below {MINIMUM_WORKLOADS} no "
            "signed-rank test can reach 5 %."
        )
    if any(workload.decision.verdict is Verdict.EXPLORATORY for workload in ranking.workloads):
        return "No critical-difference diagram: an exploratory search ranks nothing."
    barred = [one.workload for one in ranking.workloads if one.decision.barred or not one.finished]
    if barred:
        return f"No critical-difference diagram: no verdict is allowed on {listed(barred)}."
    errors = _errors(ranking)
    if len(errors) < 2:
        return "No critical-difference diagram: fewer than two optimizers have an error on every workload."
    return ranks_of(errors)


def ranks_of(errors: dict[str, Floats]) -> MeanRanks | str:
    """Mean ranks and groups.

    Args:
        errors: by optimizer, shape (workloads,), lower is better, ``inf`` for failures.
    """
    names = list(errors)
    table = np.stack([errors[name] for name in names])
    ranks = stats.rankdata(table, axis=0).mean(axis=1)
    order = [names[place] for place in np.lexsort((names, ranks))]
    pairs = list(combinations(order, 2))
    p = holm([wilcoxon(log_errors(errors[first]) - log_errors(errors[second])) for first, second in pairs])
    separated = {frozenset(pair) for pair, value in zip(pairs, p, strict=True) if value <= LEVEL}
    if not separated:
        return (
            f"No critical-difference diagram: over {table.shape[1]} workloads no pair of {len(names)} optimizers is "
            "separated by Wilcoxon's test with Holm's correction over all pairs."
        )
    found = dict(zip(names, ranks.tolist(), strict=True))
    return MeanRanks(
        workloads=table.shape[1], ranks={name: found[name] for name in order}, groups=groups_of(order, separated)
    )


def groups_of(order: Sequence[str], separated: Collection[frozenset[str]]) -> tuple[tuple[str, ...], ...]:
    """Runs of neighbours in the order of which no pair is separated, without those inside a longer one."""
    runs: list[tuple[str, ...]] = []
    reach = 0
    for start in range(len(order)):
        end = start
        while end + 1 < len(order) and not any(
            frozenset((order[inside], order[end + 1])) in separated for inside in range(start, end + 1)
        ):
            end += 1
        if end > start and end > reach:
            runs.append(tuple(order[start : end + 1]))
            reach = end
    return tuple(runs)


def _errors(ranking: Ranking) -> dict[str, Floats]:
    by_name: dict[str, list[float]] = {}
    for workload in ranking.workloads:
        for arm in workload.arms:
            summary = arm.summary(Split.TEST.value, Metric.FORCES_MAE)
            if arm.rank is not None and summary is not None:
                by_name.setdefault(arm.optimizer, []).append(summary.iqm)
    number = len(ranking.workloads)
    return {name: np.array(found, dtype=np.float64) for name, found in by_name.items() if len(found) == number}
