"""The ranking of a run as typed records: errors per arm, comparisons, a verdict per workload."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.arm_search import ArmSearch, arm_search
from analysis.checks import Check, run_checks
from analysis.comparison import Comparison, Contender
from analysis.completeness import left_no_candidate, missing_work
from analysis.label_efficiency import LabelEfficiency
from analysis.label_groups import label_efficiencies
from analysis.ledger import ArmLedger, arm_ledger
from analysis.load import Run
from analysis.nested_bootstrap import Redrawn, redraw
from analysis.overall import Overall, WorkloadErrors, decide_overall
from analysis.pareto import ParetoPoint, pareto_front
from analysis.reselection import Search
from analysis.search_results import search_of, test_per_validation
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
from analysis.step_costs import TimeAxis, step_time, time_axis
from analysis.targets import TargetScores, target_scores
from analysis.verdict import Decision, decide
from analysis.workload_tests import holm
from tunebench.study.record import OOD_PREFIX, Metric, Reason, Split, Stage
from tunebench.study.seeds import named_seed
from tunebench.study.spec import Sampler
from tunebench.study.step_times import StepTime

SCHEMA_VERSION = 2
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


@dataclass(frozen=True, kw_only=True)
class WorkloadRanking:
    """All arms of a workload, best first where they are ranked, and what may be said about them.

    Attributes:
        comparisons: the leading arm against every other one.
        missing: one line per arm that is not complete.
        family_p: p of the leading arm's closest comparison, adjusted by Holm over the workloads of the study: a winner
            whose value is above 0.05 wins here, but among so many workloads one such win may be chance. ``None`` where
            nothing is compared.
        pareto: error against device-seconds of a full run, cheapest arm first; arms without either are absent.
    """

    workload: str
    finished: bool
    missing: tuple[str, ...]
    decision: Decision
    comparisons: tuple[Comparison, ...]
    family_p: float | None
    pareto: tuple[ParetoPoint, ...]
    arms: tuple[ArmResult, ...]


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The whole answer of a run; `json_form.to_json` writes it, `ranking.schema.json` says how that looks."""

    schema_version: int
    study: str
    study_hash: str
    finished: bool
    readout_policy: str
    units: dict[str, str]
    statistics: dict[str, str]
    checks: tuple[Check, ...]
    overall: Overall
    targets: TargetScores
    labels: tuple[LabelEfficiency, ...]
    workloads: tuple[WorkloadRanking, ...]


def rank(run: Run) -> Ranking:
    """Rank every workload of a run by its confirm stage; selection reads validation, ranking reads test."""
    checks = run_checks(run)
    workloads = _with_family_p([_rank_workload(run, name, checks) for name in run.workloads])
    errors = [_workload_errors(run, workload) for workload in workloads]
    return Ranking(
        schema_version=SCHEMA_VERSION,
        study=run.study.name,
        study_hash=run.resolved.hash,
        finished=all(workload.finished for workload in workloads),
        readout_policy=run.study.objective.readout,
        units={"energy_per_atom": "eV/atom", "forces": "eV/Å", "stress": "eV/Å³", "device": "s"},
        statistics={
            "iqm": "25 % trimmed mean over seeds, floor(n/4) seeds cut at each end",
            "interval": "95 % of the IQM over seeds, studentized; exact for normal errors",
            "comparison": "IQM over paired seeds of the leading arm minus the other one; 95 % interval over seeds and, "
            "where both searches are known, over re-selections among the same configurations",
            "tie": "90 % interval of the difference inside one seed standard deviation",
            "redrawn": "95 % percentile interval of 10000 seeded draws of configurations and seeds, alike in both arms",
            "failed_seed": "inf, never dropped",
        },
        checks=checks,
        overall=decide_overall(errors, seed=named_seed(run.study.seed, "bootstrap", "overall")),
        targets=(targets := target_scores(run)),
        labels=label_efficiencies(run, {w.workload: _forces_by_seed(w) for w in workloads}, targets.baseline),
        workloads=workloads,
    )


def _rank_workload(run: Run, workload: str, checks: tuple[Check, ...]) -> WorkloadRanking:
    results = [_arm_result(run, workload, optimizer) for optimizer in run.optimizers]
    missing = missing_work(run, workload)
    exploratory = run.study.tune.sampler is Sampler.TPE
    arms = tuple(results) if exploratory else _ordered(results)
    searches = _searches(run, workload)
    decision, comparisons = decide(
        [_contender(result, searches.get(result.optimizer)) for result in arms],
        exploratory=exploratory,
        missing=missing,
        failed_checks=[check.name for check in checks if check.forbids_winner(workload)],
        seed=lambda first, second: named_seed(run.study.seed, "bootstrap", workload, "difference", first, second),
        budget=_budget(run, workload),
    )
    return WorkloadRanking(
        workload=workload,
        finished=not missing,
        missing=missing,
        decision=decision,
        comparisons=comparisons,
        family_p=max((1.0 if c.p is None else c.p for c in comparisons), default=None),
        pareto=_pareto(run, workload, arms),
        arms=arms,
    )


def _with_family_p(workloads: Sequence[WorkloadRanking]) -> tuple[WorkloadRanking, ...]:
    """Adjust the p of each workload's closest comparison for the number of workloads."""
    raw = [workload.family_p for workload in workloads if workload.family_p is not None]
    adjusted = iter(holm(raw))
    return tuple(
        workload if workload.family_p is None else replace(workload, family_p=next(adjusted)) for workload in workloads
    )


def _budget(run: Run, workload: str) -> str:
    """What every arm was given, as part of a sentence."""
    tune, confirm = run.study.tune, run.study.confirm
    steps = next(found.max_steps for found in run.study.workloads if found.name == workload)
    return (
        f"{_counted(tune.trials_per_arm, 'configuration')} per arm and {steps} steps, the best {confirm.top_k} with "
        f"{_counted(confirm.seeds, 'seed')}"
    )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _searches(run: Run, workload: str) -> dict[str, Search]:
    factor = test_per_validation(run, workload)
    found = {optimizer: search_of(run, workload, optimizer, factor) for optimizer in run.optimizers}
    return {optimizer: search for optimizer, search in found.items() if search is not None}


def _pareto(run: Run, workload: str, arms: Sequence[ArmResult]) -> tuple[ParetoPoint, ...]:
    axis = time_axis(run, workload)
    errors = {arm.optimizer: s.iqm for arm in arms if (s := arm.summary(Split.TEST, Metric.FORCES_MAE)) is not None}
    costs = {arm.optimizer: cost for arm in arms if (cost := _run_cost(run, workload, arm, axis)) is not None}
    return pareto_front(errors, costs, axis.calibrated)


def _run_cost(run: Run, workload: str, arm: ArmResult, axis: TimeAxis) -> float | None:
    """Median device-seconds of the finished seeds of an arm's best configuration."""
    trials = run.arm(workload, arm.optimizer, Stage.CONFIRM)
    own = [t for t in trials if t.key.config_index == arm.config_index and t.reason is Reason.FINISHED]
    return float(np.median([axis.of_trial(trial) for trial in own])) if own else None


def _workload_errors(run: Run, workload: WorkloadRanking) -> WorkloadErrors:
    """What the overall verdict needs of a workload; arms without a measured error take no part in it."""
    found = {arm.optimizer: s for arm in workload.arms if (s := arm.summary(Split.TEST, Metric.FORCES_MAE)) is not None}
    runs = {name: np.array(list(summary.values.values()), dtype=np.float64) for name, summary in found.items()}
    return WorkloadErrors(
        workload=workload.workload,
        errors={name: summary.iqm for name, summary in found.items()},
        runs=runs,
        deviation={name: share for name, values in runs.items() if (share := _relative_deviation(values)) is not None},
        decision=workload.decision,
        redrawn=_redrawn(run, workload.workload, runs),
    )


def _forces_by_seed(workload: WorkloadRanking) -> dict[str, dict[int, float]]:
    summaries = {arm.optimizer: arm.summary(Split.TEST, Metric.FORCES_MAE) for arm in workload.arms}
    return {name: summary.values for name, summary in summaries.items() if summary is not None}


def _relative_deviation(values: Floats) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.std(ddof=1) / finite.mean()) if len(finite) > 1 and finite.mean() > 0.0 else None


def _redrawn(run: Run, workload: str, runs: dict[str, Floats]) -> Redrawn | None:
    searches = _searches(run, workload)
    if not runs or set(searches) != set(runs):
        return None
    seeds = sorted(set.intersection(*(set(search.confirmed[0]) for search in searches.values())))
    if not seeds:
        return None
    return redraw(searches, seeds, seed=named_seed(run.study.seed, "bootstrap", workload, "redraw"))


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


def _ordered(results: Sequence[ArmResult]) -> tuple[ArmResult, ...]:
    """Best first by IQM of the test force error; arms without an ended seed come last and have no rank."""

    def force_iqm(result: ArmResult) -> float | None:
        summary = result.summary(Split.TEST, Metric.FORCES_MAE)
        return None if summary is None else summary.iqm

    scored = sorted((r for r in results if force_iqm(r) is not None), key=lambda r: (force_iqm(r), r.optimizer))
    unscored = [result for result in results if force_iqm(result) is None]
    return tuple(_with_rank(result, place) for place, result in enumerate(scored, start=1)) + tuple(unscored)


def _with_rank(result: ArmResult, place: int) -> ArmResult:
    return replace(result, rank=place)


def _contender(result: ArmResult, search: Search | None) -> Contender:
    summary = result.summary(Split.TEST, Metric.FORCES_MAE)
    return Contender(optimizer=result.optimizer, values=summary.values if summary else {}, search=search)
