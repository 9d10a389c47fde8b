"""What the confirm stage says of one arm: errors of its best configuration over seeds, failures, cost."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.arm_search import ArmSearch, arm_search
from analysis.completeness import left_no_candidate
from analysis.ledger import ArmLedger, arm_ledger
from analysis.load import Run
from analysis.seed_intervals import seed_interval
from analysis.selection import (
    POLICY,
    Candidate,
    best_candidate,
    confirm_candidates,
    error_of,
    mean_validation,
    rule_shares,
)
from analysis.statistics import Floats, Interval, iqm, median
from analysis.step_costs import step_time
from tunebench.study.record import OOD_PREFIX, Metric, Split, Stage
from tunebench.study.step_times import StepTime

ERROR_METRICS = (
    Metric.ENERGY_PER_ATOM_MAE,
    Metric.ENERGY_PER_ATOM_RMSE,
    Metric.FORCES_MAE,
    Metric.FORCES_RMSE,
    Metric.STRESS_MAE,
    Metric.STRESS_RMSE,
)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One error over the seeds of an arm's best configuration (lower is better), eV/atom, eV/Å or eV/Å³.

    Attributes:
        split: ``test`` or ``ood:NAME``. readout: a `Readout`, or ``policy`` for the study's own choice.
        values: error by seed index, ``inf`` for a failed seed.
        interval: 95 % studentized interval of the IQM; ``None`` (not available) for fewer than three seeds.
    """

    split: str
    readout: str
    metric: Metric
    values: dict[int, float]
    median: float
    mean: float
    iqm: float
    interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What the confirm stage says of one arm.

    Attributes:
        rank: place by IQM of the test force error; ``None`` when nothing is ranked.
        planned_seeds: seeds that the study plans for each configuration.
        n_seeds: ended seeds of the best configuration, failed ones included.
        failed_seeds: seed index -> reason. missing_seeds: seeds that have not ended.
        n_configs: configurations with at least one ended confirm trial.
        config_index: the best configuration, chosen on validation; ``None`` before the first confirm trial has ended.
        validation_objective: its mean over seeds, lower is better.
        step_time: mean seconds of its step alone on the device; ``None`` where it was not calibrated.
        rule_shares: share of the weights by realised update rule. own_share: share under the arm's own rule.
        left_no_candidate: no configuration survived the tune stage, so every planned seed counts as failed.
    """

    optimizer: str
    rank: int | None
    planned_seeds: int
    n_seeds: int
    failed_seeds: dict[int, str]
    missing_seeds: tuple[int, ...]
    n_configs: int
    config_index: int | None
    params: dict[str, Any]
    validation_objective: float | None
    step_time: StepTime | None
    rule_shares: dict[str, float]
    own_share: float | None
    left_no_candidate: bool
    errors: tuple[Summary, ...]
    tune: ArmLedger
    confirm: ArmLedger
    search: ArmSearch

    def summary(self, split: str, metric: Metric, readout: str = POLICY) -> Summary | None:
        """The arm's errors of one kind, ``None`` where none were measured."""
        found = (s for s in self.errors if (s.split, s.readout, s.metric) == (split, readout, metric))
        return next(found, None)


def arm_result(run: Run, workload: str, optimizer: str) -> ArmResult:
    """Everything about one arm but its place."""
    found = confirm_candidates(run, workload, optimizer)
    best = best_candidate(found, run.study.objective)
    hopeless = left_no_candidate(run, workload, optimizer)
    planned = run.study.confirm.seeds
    shares = next((s for trial in best.trials.values() if (s := rule_shares(trial))), {}) if best else {}
    unended = best.missing if best else () if hopeless else tuple(range(planned))
    return ArmResult(
        optimizer=optimizer,
        rank=None,
        planned_seeds=planned,
        n_seeds=len(best.trials) if best else 0,
        failed_seeds={seed: str(best.trials[seed].reason) for seed in best.failed} if best else {},
        missing_seeds=unended,
        n_configs=sum(bool(candidate.trials) for candidate in found),
        config_index=best.config_index if best else None,
        params=best.params if best else {},
        validation_objective=mean_validation(best, run.study.objective) if best else None,
        step_time=step_time(run, next(iter(best.trials.values()))) if best else None,
        rule_shares=shares,
        own_share=shares.get(run.rule_of(optimizer), 0.0) if shares else None,
        left_no_candidate=hopeless,
        errors=_errors(run, workload, optimizer, best) if best else _no_errors(planned) if hopeless else (),
        search=arm_search(run, workload, optimizer),
        tune=arm_ledger(run, workload, optimizer, Stage.TUNE),
        confirm=arm_ledger(run, workload, optimizer, Stage.CONFIRM),
    )


def _errors(run: Run, workload: str, optimizer: str, best: Candidate) -> tuple[Summary, ...]:
    summaries = []
    for split, readout, metric in _measured(best):
        values = {
            seed: error
            for seed, trial in best.trials.items()
            if (error := error_of(trial, split, readout, metric, run.study.objective)) is not None
        }
        if values:
            summaries.append(_summary(split, readout, metric, values))
    return tuple(summaries)


def _measured(best: Candidate) -> Iterator[tuple[str, str, Metric]]:
    """Split, readout and metric of every error that some seed measured; the test force error always."""
    finished = [best.trials[seed] for seed in best.finished]
    ood = {split for trial in finished for split in trial.result if split.startswith(OOD_PREFIX)}
    for split in (Split.TEST.value, *sorted(ood)):
        errors = [errors for trial in finished for errors in trial.result.get(split, {}).items()]
        readouts = sorted({readout for readout, _ in errors})
        metrics = {metric for _, values in errors for metric in values} | {Metric.FORCES_MAE.value}
        for readout in (POLICY, *readouts):
            yield from ((split, readout, metric) for metric in ERROR_METRICS if metric in metrics)


def _no_errors(planned: int) -> tuple[Summary, ...]:
    failed = dict.fromkeys(range(planned), math.inf)
    return (_summary(Split.TEST.value, POLICY, Metric.FORCES_MAE, failed),)


def _summary(split: str, readout: str, metric: Metric, values: dict[int, float]) -> Summary:
    errors = np.array(list(values.values()), dtype=np.float64)
    return Summary(
        split=split,
        readout=readout,
        metric=metric,
        values=values,
        median=median(errors),
        mean=float(errors.mean()),
        iqm=float(iqm(errors)),
        interval=_error_interval(errors),
    )


def _error_interval(errors: Floats) -> Interval | None:
    """Interval of an arm's error, which is positive; too many failures stretch it from the best seed to ``inf``."""
    interval = seed_interval(errors)
    if interval is None or interval.low > 0.0:
        return interval
    return Interval(low=0.0 if math.isfinite(interval.low) else float(errors.min()), high=interval.high)
