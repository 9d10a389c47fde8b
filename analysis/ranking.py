"""The ranking of a run as typed records: errors per arm, comparisons, a verdict per workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.arm_result import ArmResult, arm_result
from analysis.audits import budget_audits
from analysis.checks import Check, run_checks
from analysis.comparison import Comparison, Contender
from analysis.completeness import missing_work
from analysis.label_efficiency import LabelEfficiency
from analysis.label_groups import label_efficiencies
from analysis.load import Run
from analysis.metric_results import MetricResult, metric_results
from analysis.model_metrics import model_metrics, unmeasured
from analysis.ood_gap import OodGap, ood_gaps
from analysis.overall import Overall, decide_overall
from analysis.pareto import ParetoPoint, pareto_front
from analysis.rank_correlation import ADDS_NOTHING_ABOVE, ADDS_NOTHING_FROM
from analysis.reselection import Search
from analysis.search_results import searches_of
from analysis.selection import finished_trials
from analysis.step_costs import TimeAxis, time_axis
from analysis.targets import TargetScores, target_scores
from analysis.verdict import Decision, decide
from analysis.wording import counted
from analysis.workload_errors import forces_by_seed, workload_errors
from analysis.workload_tests import holm
from tunebench.study.record import Metric, Split, TrialRecord
from tunebench.study.seeds import named_seed
from tunebench.study.spec import Sampler

SCHEMA_VERSION = 4


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
        gaps: error out of distribution over that in it, of every arm; they select and rank nothing.
        metrics: out-of-distribution errors and errors of physical properties, each with a verdict of its own.
    """

    workload: str
    finished: bool
    missing: tuple[str, ...]
    decision: Decision
    comparisons: tuple[Comparison, ...]
    family_p: float | None
    pareto: tuple[ParetoPoint, ...]
    gaps: tuple[OodGap, ...]
    metrics: tuple[MetricResult, ...]
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
    errors = [workload_errors(run, w.workload, _rivals(run, w.arms), w.decision) for w in workloads]
    forces = {w.workload: forces_by_seed(_rivals(run, w.arms)) for w in workloads}
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
            "metric": "IQM over seeds of an out-of-distribution error or of |value - reference| of a property, inf "
            "where it failed; numbered frequencies are one metric, their mean absolute error",
            "adds_nothing": "Spearman's correlation with the test force error above "
            f"{ADDS_NOTHING_ABOVE} over at least {ADDS_NOTHING_FROM} optimizers",
        },
        checks=(*checks, *budget_audits(run, {w.workload: w.arms for w in workloads})),
        overall=decide_overall(errors, seed=named_seed(run.study.seed, "bootstrap", "overall")),
        targets=(targets := target_scores(run)),
        labels=label_efficiencies(run, forces, targets.baseline),
        workloads=workloads,
    )


def _rank_workload(run: Run, workload: str, checks: tuple[Check, ...]) -> WorkloadRanking:
    results = [arm_result(run, workload, optimizer) for optimizer in run.optimizers]
    missing = missing_work(run, workload)
    exploratory = run.study.tune.sampler is Sampler.TPE
    rivals = _rivals(run, results)
    rivals = rivals if exploratory else _ordered(rivals)
    searches = searches_of(run, workload)
    decision, comparisons = decide(
        [_contender(result, searches.get(result.optimizer)) for result in rivals],
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
        pareto=_pareto(run, workload, rivals),
        gaps=ood_gaps(results),
        metrics=metric_results(
            model_metrics(run, workload, rivals),
            forces_by_seed(rivals),
            missing=missing,
            unmeasured=unmeasured(run, workload, rivals),
            failed_checks=[check.name for check in checks if check.forbids_winner(workload)],
            exploratory=exploratory,
            seed=lambda metric, drawn: named_seed(run.study.seed, "bootstrap", workload, metric, drawn),
        ),
        arms=(*rivals, *(result for result in results if result.optimizer not in run.rivals)),
    )


def _rivals(run: Run, arms: Sequence[ArmResult]) -> tuple[ArmResult, ...]:
    return tuple(arm for arm in arms if arm.optimizer in run.rivals)


def _with_family_p(workloads: Sequence[WorkloadRanking]) -> tuple[WorkloadRanking, ...]:
    """Adjust the p of each workload's closest comparison for the number of workloads."""
    raw = [workload.family_p for workload in workloads if workload.family_p is not None]
    adjusted = iter(holm(raw))
    return tuple(
        workload if workload.family_p is None else replace(workload, family_p=next(adjusted)) for workload in workloads
    )


def _budget(run: Run, workload: str) -> str:
    """What every arm was given, as part of a sentence."""
    confirm, planned = run.study.confirm, sorted(run.planned(workload, name) for name in run.rivals)
    steps = next(found.max_steps for found in run.study.workloads if found.name == workload)
    return (
        f"{_configurations(planned)} per arm and {steps} steps, the best {confirm.top_k} with "
        f"{counted(confirm.seeds, 'seed')}"
    )


def _configurations(planned: Sequence[int]) -> str:
    """How many each arm was given, fewest first; a cap on device-seconds leaves costly arms fewer."""
    several = planned and planned[0] < planned[-1]
    least = f"{planned[0]} to " if several else ""
    return f"{least}{counted(max(planned, default=0), 'configuration')}"


def _pareto(run: Run, workload: str, arms: Sequence[ArmResult]) -> tuple[ParetoPoint, ...]:
    axis = time_axis(run, workload)
    errors = {arm.optimizer: s.iqm for arm in arms if (s := arm.summary(Split.TEST, Metric.FORCES_MAE)) is not None}
    trials = {arm.optimizer: finished_trials(run, workload, arm.optimizer, arm.config_index) for arm in arms}
    costs = {name: _run_cost(own, axis) for name, own in trials.items() if own}
    alone = axis.are_of_one([trial for own in trials.values() for trial in own])
    return pareto_front(errors, costs, calibrated=axis.calibrated, alone=alone)


def _run_cost(finished: Sequence[TrialRecord], axis: TimeAxis) -> float:
    """Median device-seconds of one full run, from the finished seeds of an arm's best configuration."""
    return float(np.median([axis.of_kept_steps(trial) for trial in finished]))


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
