"""The statistics of a ranking as tables of words, for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from analysis.arm_search import ArmSearch
from analysis.comparison import Comparison
from analysis.failure_rates import FailureRate
from analysis.label_efficiency import LabelEfficiency, LabelPoint, LabelsNeeded
from analysis.overall import Overall
from analysis.ranking import Ranking, WorkloadRanking
from analysis.statistics import Interval
from analysis.targets import AxisScores, TargetScores
from analysis.wording import ABSENT, MINUS, NO_INTERVAL, listed, milli, milli_interval, number, percent
from tunebench.study.record import Metric

MEV = "meV/Å"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of words: title, what the reader must know, columns and rows; the first column names the row."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def workload_tables(workload: WorkloadRanking) -> list[Table]:
    """Comparisons, cost and search of one workload; tables without a row are left out."""
    tables = (
        _comparisons(workload),
        _pareto(workload),
        _gaps(workload),
        _searches(workload),
        _false_stops(workload),
        _importance(workload),
    )
    return [table for table in tables if table.rows]


def study_tables(ranking: Ranking) -> list[Table]:
    """What holds over all workloads of a study."""
    tables = (_overall(ranking.overall), _targets(ranking.targets), *map(_labels, ranking.labels))
    return [table for table in tables if table.rows]


def _comparisons(workload: WorkloadRanking) -> Table:
    return Table(
        title="The first arm against the others",
        note=f"Test force MAE, {MEV}: first arm minus other arm over paired seeds, negative is better. Claims rest on "
        "the interval over seeds and search. A tie needs the 90 % interval inside the region of one seed deviation.",
        columns=(
            "against",
            "difference",
            "95 %, seeds and search",
            "95 %, seeds alone",
            "95 %, nested bootstrap",
            "90 %",
            "seed deviation",
            "P(improve)",
            "p",
            "seeds to show it",
            "seeds to show a tie",
        ),
        rows=tuple(map(_comparison_row, workload.comparisons)),
    )


def _comparison_row(comparison: Comparison) -> tuple[str, ...]:
    return (
        f"{comparison.second} (n = {comparison.n_pairs})",
        milli(comparison.difference),
        milli_interval(comparison.interval),
        milli_interval(comparison.seeds_interval),
        milli_interval(comparison.redrawn),
        milli_interval(comparison.equivalence),
        ABSENT if comparison.rope is None else milli(comparison.rope),
        percent(comparison.improvement),
        number(comparison.p, 2),
        "search too uncertain" if comparison.limited_by_search else number(comparison.seeds_to_resolve),
        number(comparison.seeds_to_tie),
    )


def _pareto(workload: WorkloadRanking) -> Table:
    calibrated = any(point.calibrated for point in workload.pareto)
    return Table(
        title="Error against cost",
        note=f"Device-seconds of one full run, {'calibrated' if calibrated else 'as spent'}. An arm is on the front "
        "where no other one is at least as good in both and better in one.",
        columns=("optimizer", f"test force MAE, {MEV}", "device-seconds", "on the front", "beaten in both by"),
        rows=tuple(
            (
                point.optimizer,
                milli(point.error),
                number(point.device_s, 3),
                "yes" if point.on_front else "no",
                listed(point.dominated_by) or ABSENT,
            )
            for point in workload.pareto
        ),
    )


def _gaps(workload: WorkloadRanking) -> Table:
    return Table(
        title="Out of distribution",
        note="Error on an out-of-distribution split over the test error of the same model: interquartile mean over "
        "seeds of the logarithms, with its 95 % interval; 1 is no gap. A failed seed has no gap and is counted. "
        "Nothing is selected or ranked by it.",
        columns=("optimizer", "split", "error", "factor", "95 %", "seeds", "failed"),
        rows=tuple(
            (
                gap.optimizer,
                gap.split,
                "forces" if gap.metric is Metric.FORCES_MAE else "energy",
                number(gap.factor, 3),
                f"[{number(gap.interval.low, 3)}, {number(gap.interval.high, 3)}]" if gap.interval else NO_INTERVAL,
                str(gap.n_seeds),
                str(gap.n_failed),
            )
            for gap in workload.gaps
        ),
    )


def _searches(workload: WorkloadRanking) -> Table:
    return Table(
        title="The searches",
        note="Good learning rates end within 10 % of the arm's best objective; a range that ends at the lowest or "
        "highest rate tried is marked with <. Gain: share of the objective that the best configuration saves against "
        "the median one, or against the untuned arm of the same optimizer. Trials to 10 %: after how many "
        "configurations the expected best is within 10 % of the best. A stopped trial counts with the objective of its "
        "last rung.",
        columns=(
            "optimizer",
            "tune trials failed",
            "confirm trials failed",
            "good learning rates",
            "decades",
            "gain by tuning",
            "gain over defaults",
            "trials to 10 %",
            "device-seconds to 10 %",
        ),
        rows=tuple((arm.optimizer, *_search_row(arm.search)) for arm in workload.arms),
    )


def _search_row(search: ArmSearch) -> tuple[str, ...]:
    width, tuned = search.width, search.tunability
    rates = ABSENT
    if width is not None:
        ends = ("<" if width.reaches_low else "", "<" if width.reaches_high else "")
        rates = f"{ends[0]}{number(width.low, 2)} to {number(width.high, 2)}{ends[1]}"
    return (
        _rate(search.failures),
        _rate(search.confirm_failures),
        rates,
        ABSENT if width is None else f"{width.decades:.1f}",
        ABSENT if tuned is None else percent(tuned.gain),
        ABSENT if tuned is None or tuned.default_gain is None else percent(tuned.default_gain).replace("-", MINUS),
        ABSENT if tuned is None else number(tuned.trials_to_level[0.1]),
        ABSENT if tuned is None else number(tuned.seconds_to_level[0.1], 3),
    )


def _false_stops(workload: WorkloadRanking) -> Table:
    found = [(arm.optimizer, arm.search.false_stops) for arm in workload.arms]
    return Table(
        title="Does early stopping err?",
        note="Sentinels, chosen before the start, run to the horizon whatever the rungs say. Wrongly: those that a "
        "rung would have stopped and that ended better than every trial it let go on. Rate with its exact interval.",
        columns=("optimizer", "sentinels at the horizon", "would have been stopped", "wrongly", "false-stop rate"),
        rows=tuple(
            (
                name,
                str(one.sentinels),
                str(one.would_stop),
                str(one.wrongly),
                f"{percent(one.rate)} [{percent(one.low)}, {percent(one.high)}]",
            )
            for name, one in found
            if one is not None and one.sentinels
        ),
    )


def _rate(rate: FailureRate) -> str:
    if rate.share is None:
        return ABSENT
    return f"{rate.failed} of {rate.ended} [{percent(rate.low)}, {percent(rate.high)}]"


def _importance(workload: WorkloadRanking) -> Table:
    rows = [
        (arm.optimizer, method, listed(f"{name} {percent(share)}" for name, share in shares.items()))
        for arm in workload.arms
        for method, shares in arm.search.importance.items()
    ]
    return Table(
        title="Which hyperparameters matter",
        note="Share in what sets the best trials apart (PED-ANOVA), or in the variance of the objective (fANOVA). "
        "A stopped trial counts with the objective of its last rung.",
        columns=("optimizer", "method", "importance"),
        rows=tuple(rows),
    )


def _overall(overall: Overall) -> Table:
    rows = [
        (
            comparison.second,
            number(comparison.ratio, 3),
            _plain_interval(comparison.interval),
            number(comparison.holm_p, 2),
            percent(comparison.bayes.first_better),
            percent(comparison.bayes.alike),
            percent(comparison.bayes.second_better),
            percent(comparison.improvement),
            number(comparison.workloads_to_resolve),
        )
        for comparison in overall.comparisons
    ]
    first = overall.comparisons[0].first if overall.comparisons else ""
    return Table(
        title=f"{first} over {overall.n_workloads} workload{'s' if overall.n_workloads != 1 else ''}",
        note="Geometric mean of the test force MAE over that of the other optimizer, below 1 is better; interval by "
        "the nested bootstrap; Bayesian signed rank with a region of one mean seed deviation.",
        columns=(
            "against",
            "error ratio",
            "95 %",
            "Wilcoxon-Holm p",
            "P(better)",
            "P(alike)",
            "P(worse)",
            "P(improve)",
            "workloads to show it",
        ),
        rows=tuple(rows),
    )


def _targets(targets: TargetScores) -> Table:
    names = targets.workloads[0].reached
    rows = [
        (
            name,
            *(_reached(workload.reached[name].steps) for workload in targets.workloads),
            *_axis_words(targets.steps, name),
            *_axis_words(targets.seconds, name),
        )
        for name in names
        if any(workload.target is not None for workload in targets.workloads)
    ]
    return Table(
        title=f"Steps to the validation error at which {targets.baseline} ends",
        note="Median over the seeds of the best configurations; a miss is infinite. Score: area under the performance "
        "profile up to 4 times the fastest, which depends on who takes part. Speed-up: geometric mean of the "
        f"time of {targets.baseline} over the optimizer's.",
        columns=(
            "optimizer",
            *(f"{workload.workload}, steps" for workload in targets.workloads),
            "score, steps",
            "speed-up, steps",
            "score, device-seconds",
            "speed-up, device-seconds",
        ),
        rows=tuple(rows),
    )


def _labels(labels: LabelEfficiency) -> Table:
    columns = [f"{percent(fraction)} of labels" for fraction in labels.workloads]
    return Table(
        title=f"Force labels: {listed(labels.workloads.values())}",
        note=f"Test force MAE, {MEV}, with its 95 % interval, by the share of frames with force labels. Labels needed: "
        f"the share at which an optimizer reaches the error of {labels.baseline} with the most labels, linear between "
        "shares, with its 95 % interval.",
        columns=("optimizer", *columns, "labels needed", "95 %"),
        rows=tuple(
            (name, *_label_cells(labels, points), *_needed(labels.needed.get(name)))
            for name, points in labels.curves.items()
        ),
    )


def _label_cells(labels: LabelEfficiency, points: Sequence[LabelPoint]) -> list[str]:
    cells = {point.fraction: f"{milli(point.iqm)} {milli_interval(point.interval)}" for point in points}
    return [cells.get(fraction, ABSENT) for fraction in labels.workloads]


def _needed(needed: LabelsNeeded | None) -> tuple[str, str]:
    if needed is None:
        return ABSENT, ABSENT
    if needed.fraction is None:
        return "more than measured", ABSENT
    at_most = "at most " if needed.censored else ""
    low = "0" if needed.low is None else percent(needed.low)
    high = "more than measured" if needed.high is None else percent(needed.high)
    return f"{at_most}{percent(needed.fraction)}", f"{low} to {high}"


def _axis_words(axis: AxisScores | None, name: str) -> tuple[str, str]:
    if axis is None:
        return ABSENT, ABSENT
    return number(axis.scores[name], 3), number(axis.speedups[name], 3)


def _reached(steps: float) -> str:
    return "missed" if math.isinf(steps) else number(int(steps))


def _plain_interval(interval: Interval | None) -> str:
    return ABSENT if interval is None else f"[{number(interval.low, 3)}, {number(interval.high, 3)}]"
