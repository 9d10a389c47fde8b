"""The report's sections on physics: one a regime, with what each workload's models give there, in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analysis.charts.chart import Chart
from analysis.levels import Level, level_words
from analysis.load import Run
from analysis.metric_results import MetricArm, MetricResult
from analysis.model_metrics import About, EntryFailures, entries_of, entry_failures, unmeasured
from analysis.page_tables import Table
from analysis.property_values import quantity_values
from analysis.rank_correlation import ADDS_NOTHING_ABOVE, ADDS_NOTHING_FROM, RankCorrelation
from analysis.ranking import Ranking, WorkloadRanking
from analysis.statistics import Interval
from analysis.wording import ABSENT, listed, number

TITLES = {
    About.MOLECULE: "Molecules",
    About.CRYSTAL: "Crystals",
    About.LIQUID: "Liquids and interfaces",
}
RULE = (
    f"An error adds nothing where Spearman's correlation with the test force error is above {ADDS_NOTHING_ABOVE:g} "
    f"over at least {ADDS_NOTHING_FROM} optimizers: it then orders them as the force error does already."
)
_DIGITS = 3


@dataclass(frozen=True, kw_only=True)
class RegimePart:
    """What the models of one workload give in a regime.

    Attributes:
        notes: why properties failed. incomplete: models that lack properties.
    """

    workload: str
    tables: tuple[Table, ...]
    charts: tuple[Chart, ...]
    notes: tuple[str, ...]
    incomplete: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RegimeSection:
    """A section of the page."""

    about: About
    title: str
    parts: tuple[RegimePart, ...]


def regime_sections(run: Run, ranking: Ranking, charts: Sequence[Chart]) -> tuple[RegimeSection, ...]:
    """Sections of the regimes that the study asks for, in the order of `TITLES`.

    Args:
        run: the run.
        ranking: its ranking.
        charts: of curves, whose names begin as `chart_prefix` says.
    """
    asked = {About(section.regime.value) for section in run.study.properties}
    return tuple(
        RegimeSection(
            about=about,
            title=title,
            parts=tuple(
                _part(run, workload, about, charts)
                for workload in ranking.workloads
                if about in entries_of(run, workload.workload).values()
            ),
        )
        for about, title in TITLES.items()
        if about in asked
    )


def chart_prefix(workload: str, about: About) -> str:
    """How the names of a regime's charts of a workload begin."""
    return f"{workload}-{about}-"


def _part(run: Run, workload: WorkloadRanking, about: About, charts: Sequence[Chart]) -> RegimePart:
    failures = [one for one in entry_failures(run, workload.workload, workload.arms) if one.about is about]
    prefix = chart_prefix(workload.workload, about)
    return RegimePart(
        workload=workload.workload,
        tables=(
            *metric_tables(workload, about),
            *_with_rows(_value_table(run, workload, about)),
            *_with_rows(_failure_table(run, failures)),
        ),
        charts=tuple(chart for chart in charts if chart.name.startswith(prefix)),
        notes=tuple(f"{trial}, {one.entry}: {why}" for one in failures for trial, why in one.reasons.items()),
        incomplete=unmeasured(run, workload.workload, workload.arms),
    )


def metric_tables(workload: WorkloadRanking, about: About) -> list[Table]:
    """What the metrics of one kind say of the optimizers, and what they add to the force error."""
    metrics = [metric for metric in workload.metrics if metric.about is about]
    tables = (_errors(metrics, about), _additions(metrics), _refined(metrics))
    return [table for table in tables if table.rows]


def _with_rows(table: Table) -> tuple[Table, ...]:
    return (table,) if table.rows else ()


def _errors(metrics: Sequence[MetricResult], about: About) -> Table:
    optimizers = _optimizers(metrics)
    what = "Errors out of distribution" if about is About.OOD else "Errors of properties"
    return Table(
        title=what,
        note="Interquartile mean over the seeds of the selected configuration, lower is better, with its 95 % "
        "interval; of a property |value minus reference|. A failed property is infinitely bad and counted: ✗ n of m "
        "seeds. Verdicts follow the rules of the force error, over seeds alone, with p adjusted by Holm over all "
        "metrics of the workload. Nothing is selected by them.",
        columns=("error", "unit", "verdict", "p", *optimizers),
        rows=tuple(
            (metric.name, metric.unit, _verdict(metric), number(metric.p, 2), *_cells(metric, optimizers))
            for metric in metrics
        ),
    )


def _optimizers(metrics: Sequence[MetricResult]) -> tuple[str, ...]:
    return tuple(sorted({arm.optimizer for metric in metrics for arm in metric.arms}))


def _cells(metric: MetricResult, optimizers: Iterable[str]) -> tuple[str, ...]:
    own = {arm.optimizer: arm for arm in metric.arms}
    return tuple(_cell(own[name]) if name in own else ABSENT for name in optimizers)


def _cell(arm: MetricArm) -> str:
    level = Level(iqm=arm.iqm, interval=arm.interval, n_seeds=arm.n_seeds, n_failed=arm.n_failed)
    return level_words(level, _DIGITS)


def _verdict(metric: MetricResult) -> str:
    if metric.winner:
        return f"{metric.winner} wins"
    return f"tie: {listed(metric.tied)}" if metric.tied else metric.verdict.value


def _additions(metrics: Sequence[MetricResult]) -> Table:
    return Table(
        title="What they add to the force error",
        note="Rank correlation over optimizers between this error and the test force error, failures sharing the worst "
        f"rank, with 95 % intervals over optimizers drawn with replacement. {RULE} On the front: no other optimizer is "
        "at least as good in both errors and better in one.",
        columns=("error", "Spearman", "Kendall", "optimizers", "says more than the force error", "on the front"),
        rows=tuple(
            (
                metric.name,
                _correlation(found.spearman, found.spearman_interval) if found else ABSENT,
                _correlation(found.kendall, found.kendall_interval) if found else ABSENT,
                str(found.optimizers) if found else str(len(metric.arms)),
                _adds(found),
                listed(arm.optimizer for arm in metric.arms if arm.on_front) or "nobody",
            )
            for metric in metrics
            for found in (metric.with_force,)
        ),
    )


def _correlation(value: float, interval: Interval | None) -> str:
    return f"{value:.2f}" + (f" [{interval.low:.2f}, {interval.high:.2f}]" if interval else "")


def _adds(found: RankCorrelation | None) -> str:
    if found is None or found.optimizers < ADDS_NOTHING_FROM:
        return "too few optimizers to say"
    return "adds nothing" if found.adds_nothing else "yes"


def _refined(metrics: Sequence[MetricResult]) -> Table:
    optimizers = _optimizers(metrics)
    known = [metric for metric in metrics if any(arm.refined is not None for arm in metric.arms)]
    return Table(
        title="Before and after refinement",
        note="The same errors of the same seeds before and after full-batch L-BFGS. No verdict rests on them.",
        columns=("error", "unit", *(f"{name}, {when}" for name in optimizers for when in ("before", "after"))),
        rows=tuple(
            (
                metric.name,
                metric.unit,
                *(text for name in optimizers for text in _both({a.optimizer: a for a in metric.arms}.get(name))),
            )
            for metric in known
        ),
    )


def _both(arm: MetricArm | None) -> tuple[str, str]:
    if arm is None or arm.refined is None:
        return ABSENT, ABSENT
    return number(arm.iqm, _DIGITS), number(arm.refined, _DIGITS)


def _value_table(run: Run, workload: WorkloadRanking, about: About) -> Table:
    found = [one for one in quantity_values(run, workload.workload, workload.arms) if one.about is about]
    optimizers = sorted({name for one in found for name in one.models})
    return Table(
        title="Values of properties",
        note="Interquartile mean over the seeds of the selected configuration whose property did not fail, with its "
        "95 % interval.",
        columns=("quantity", "unit", "reference", *optimizers),
        rows=tuple(
            (
                f"{one.entry} {one.quantity}",
                one.unit,
                number(one.reference),
                *(level_words(one.level(name)) for name in optimizers),
            )
            for one in found
        ),
    )


def _failure_table(run: Run, failures: Sequence[EntryFailures]) -> Table:
    optimizers = [name for name in run.optimizers if any(one.optimizer == name for one in failures)]
    by_entry: dict[str, dict[str, EntryFailures]] = {}
    for one in failures:
        by_entry.setdefault(one.entry, {})[one.optimizer] = one
    return Table(
        title="Failed properties",
        note="Models whose property could not be computed, of those of the selected configuration; a trial that did "
        "not finish has failed in all. The reasons stand below.",
        columns=("property", *optimizers),
        rows=tuple(
            (entry, *(_rate(own[name]) if name in own else ABSENT for name in optimizers))
            for entry, own in by_entry.items()
        ),
    )


def _rate(one: EntryFailures) -> str:
    return f"{one.failed} of {one.models}" if one.models else "not computed yet"
