"""The ranking of a run as typed records: errors per arm, comparisons, a verdict per workload."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from analysis.checks import Check, run_checks
from analysis.completeness import left_no_candidate, missing_work
from analysis.ledger import ArmLedger, arm_ledger
from analysis.load import Run
from analysis.selection import (
    POLICY,
    Candidate,
    best_candidate,
    confirm_candidates,
    error_of,
    mean_validation,
    rule_shares,
)
from analysis.statistics import Interval, iqm, iqm_interval, median
from analysis.step_costs import step_time
from analysis.verdict import Comparison, Contender, Decision, decide
from tunebench.study.record import OOD_PREFIX, Metric, Split, Stage
from tunebench.study.seeds import named_seed
from tunebench.study.spec import Sampler
from tunebench.study.step_times import StepTime

SCHEMA_VERSION = 1
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
        interval: 95 % bootstrap interval of the IQM; ``None`` (not available) for fewer than three seeds.
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

    def summary(self, split: str, metric: Metric, readout: str = POLICY) -> Summary | None:
        """The arm's errors of one kind, ``None`` where none were measured."""
        found = (s for s in self.errors if (s.split, s.readout, s.metric) == (split, readout, metric))
        return next(found, None)


@dataclass(frozen=True, kw_only=True)
class WorkloadRanking:
    """All arms of a workload, best first where they are ranked, and what may be said about them.

    Attributes:
        comparisons: the leading arm against every other one.
        missing: one line per arm that is not complete.
    """

    workload: str
    finished: bool
    missing: tuple[str, ...]
    decision: Decision
    comparisons: tuple[Comparison, ...]
    arms: tuple[ArmResult, ...]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The whole answer of a run; `to_json` writes it."""

    schema_version: int
    study: str
    study_hash: str
    finished: bool
    readout_policy: str
    units: dict[str, str]
    statistics: dict[str, str]
    checks: tuple[Check, ...]
    workloads: tuple[WorkloadRanking, ...]


def rank(run: Run) -> Ranking:
    """Rank every workload of a run by its confirm stage; selection reads validation, ranking reads test."""
    checks = run_checks(run)
    workloads = tuple(_rank_workload(run, name, checks) for name in run.workloads)
    return Ranking(
        schema_version=SCHEMA_VERSION,
        study=run.study.name,
        study_hash=run.resolved.hash,
        finished=all(workload.finished for workload in workloads),
        readout_policy=run.study.objective.readout,
        units={"energy_per_atom": "eV/atom", "forces": "eV/Å", "stress": "eV/Å³", "device": "s"},
        statistics={
            "iqm": "25 % trimmed mean over seeds, floor(n/4) seeds cut at each end",
            "interval": "95 % percentile bootstrap over seeds, 10000 seeded draws; too narrow at 3 to 5 seeds",
            "comparison": "IQM of the leading arm minus IQM of the other one, both drawn at the same seeds",
            "failed_seed": "inf, never dropped",
        },
        checks=checks,
        workloads=workloads,
    )


def _rank_workload(run: Run, workload: str, checks: tuple[Check, ...]) -> WorkloadRanking:
    results = [_arm_result(run, workload, optimizer) for optimizer in run.optimizers]
    missing = missing_work(run, workload)
    exploratory = run.study.tune.sampler is Sampler.TPE
    arms = tuple(results) if exploratory else _ordered(results)
    decision, comparisons = decide(
        [_contender(result) for result in arms],
        exploratory=exploratory,
        missing=missing,
        failed_checks=[check.name for check in checks if check.forbids_winner(workload)],
        seed=lambda first, second: named_seed(run.study.seed, "bootstrap", workload, "difference", first, second),
    )
    return WorkloadRanking(
        workload=workload,
        finished=not missing,
        missing=missing,
        decision=decision,
        comparisons=comparisons,
        arms=arms,
    )


def _arm_result(run: Run, workload: str, optimizer: str) -> ArmResult:
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
        own_share=shares.get(optimizer, 0.0) if shares else None,
        left_no_candidate=hopeless,
        errors=_errors(run, workload, optimizer, best) if best else _no_errors(planned) if hopeless else (),
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
            seed = named_seed(run.study.seed, "bootstrap", workload, optimizer, split, readout, metric)
            summaries.append(_summary(split, readout, metric, values, seed))
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
    return (_summary(Split.TEST.value, POLICY, Metric.FORCES_MAE, failed, 0),)


def _summary(split: str, readout: str, metric: Metric, values: dict[int, float], seed: int) -> Summary:
    errors = np.array(list(values.values()), dtype=np.float64)
    return Summary(
        split=split,
        readout=readout,
        metric=metric,
        values=values,
        median=median(errors),
        mean=float(errors.mean()),
        iqm=float(iqm(errors)),
        interval=iqm_interval(errors, seed),
    )


def _ordered(results: Sequence[ArmResult]) -> tuple[ArmResult, ...]:
    """Best first by IQM of the test force error; arms without an ended seed come last and have no rank."""

    def force_iqm(result: ArmResult) -> float | None:
        summary = result.summary(Split.TEST, Metric.FORCES_MAE)
        return None if summary is None else summary.iqm

    scored = sorted((r for r in results if force_iqm(r) is not None), key=lambda r: (force_iqm(r), r.optimizer))
    unscored = [result for result in results if force_iqm(result) is None]
    return tuple(_with_rank(result, place) for place, result in enumerate(scored, start=1)) + tuple(unscored)


def _with_rank(result: ArmResult, place: int) -> ArmResult:
    values = {field.name: getattr(result, field.name) for field in fields(result)}
    return ArmResult(**{**values, "rank": place})


def _contender(result: ArmResult) -> Contender:
    summary = result.summary(Split.TEST, Metric.FORCES_MAE)
    return Contender(optimizer=result.optimizer, values=summary.values if summary else {})


def to_json(record: object) -> Any:
    """A record as plain JSON data; infinite numbers become the strings ``"inf"`` and ``"-inf"``, NaN is refused.

    Raises:
        ValueError: a NaN reached the record.
    """
    if is_dataclass(record):
        return {field.name: to_json(getattr(record, field.name)) for field in fields(record)}
    if isinstance(record, dict):
        return {str(name): to_json(value) for name, value in record.items()}
    if isinstance(record, list | tuple):
        return [to_json(value) for value in record]
    if isinstance(record, float):
        return _json_float(record)
    return record.value if isinstance(record, StrEnum) else record


def _json_float(number: float) -> float | str:
    if math.isnan(number):
        raise ValueError("ranking: found NaN, allowed: a number or inf")
    return float(number) if math.isfinite(number) else "inf" if number > 0.0 else "-inf"
