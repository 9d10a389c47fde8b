"""What a run tells the verdict over all workloads of each of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from analysis.arm_result import ArmResult
from analysis.load import Run
from analysis.nested_bootstrap import Redrawn, redraw
from analysis.overall import WorkloadErrors
from analysis.search_results import searches_of
from analysis.statistics import Floats, iqm
from analysis.verdict import Decision
from tunebench.study.record import Metric, Split
from tunebench.study.seeds import named_seed


def workload_errors(run: Run, workload: str, arms: Sequence[ArmResult], decision: Decision) -> WorkloadErrors:
    """What the overall verdict needs of a workload; arms without a measured error take no part in it."""
    runs = {name: np.array(list(values.values()), dtype=np.float64) for name, values in forces_by_seed(arms).items()}
    return WorkloadErrors(
        workload=workload,
        errors={name: float(iqm(values)) for name, values in runs.items()},
        runs=runs,
        deviation={name: share for name, values in runs.items() if (share := _relative_deviation(values)) is not None},
        decision=decision,
        redrawn=_redrawn(run, workload, runs),
    )


def forces_by_seed(arms: Sequence[ArmResult]) -> dict[str, dict[int, float]]:
    """Test force error (eV/Å) by seed index of every arm that has one, by optimizer."""
    summaries = {arm.optimizer: arm.summary(Split.TEST, Metric.FORCES_MAE) for arm in arms}
    return {name: summary.values for name, summary in summaries.items() if summary is not None}


def _relative_deviation(values: Floats) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.std(ddof=1) / finite.mean()) if len(finite) > 1 and finite.mean() > 0.0 else None


def _redrawn(run: Run, workload: str, runs: dict[str, Floats]) -> Redrawn | None:
    searches = searches_of(run, workload)
    if not runs or set(searches) != set(runs):
        return None
    seeds = sorted(set.intersection(*(set(search.confirmed[0]) for search in searches.values())))
    if not seeds:
        return None
    return redraw(searches, seeds, seed=named_seed(run.study.seed, "bootstrap", workload, "redraw"))
