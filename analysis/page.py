"""The report's HTML page: what it shows, in which order, and the caveats it owes the reader."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis import wording
from analysis.arm_result import ArmResult
from analysis.charts.plotly_form import dark_colours, looks_of, plotly_form
from analysis.charts.run_charts import Charts
from analysis.charts.search_charts import objective_label
from analysis.checklist import checklist
from analysis.comparison import Comparison
from analysis.curvature import EXPLAINS, curvature_table, missing_preconditioners
from analysis.error_parts import part_tables
from analysis.figure_style import look
from analysis.headline import cost, evidence, remedies, uses
from analysis.ledger import ledgers, spread
from analysis.load import Run
from analysis.mean_ranks import mean_ranks
from analysis.methods import methods
from analysis.model_metrics import About
from analysis.page_tables import Table, study_tables, workload_tables
from analysis.physics import metric_tables, regime_sections
from analysis.ranking import Ranking, WorkloadRanking
from analysis.refinement import refinement_table, refused
from analysis.statistics import Interval
from analysis.trial_table import trial_table
from analysis.twin_tables import twin_tables
from analysis.twins import twins
from analysis.verdict import MINIMUM_SEEDS
from tunebench.study.record import OOD_PREFIX, Metric, Reason, Split, Stage
from tunebench.study.step_times import DeviceTimes, StepTime, TimedStep

_COMPRESSION = 6
_ERROR_WORDS = {
    Metric.FORCES_MAE: "force MAE, meV/Å",
    Metric.ENERGY_PER_ATOM_MAE: "energy MAE, meV/atom",
    Metric.STRESS_MAE: "stress MAE, meV/Å³",
}


def render(run: Run, ranking: Ranking, drawn: Charts, refresh_s: int | None = None) -> str:
    """The page as text; everything that came from files is escaped.

    Args:
        run: the run.
        ranking: its ranking.
        drawn: its charts.
        refresh_s: seconds after which a browser reads the page anew, for a run that goes on.
    """
    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (wording.number, wording.params, wording.percent, wording.quoted)
    environment.filters.update({function.__name__: function for function in filters})
    ranks = mean_ranks(ranking)
    return environment.get_template("report.html.j2").render(
        run=run,
        study=run.study,
        ranking=ranking,
        refresh_s=refresh_s,
        evidence=evidence(ranking),
        remedies=remedies(ranking),
        cost=cost(run),
        uses=uses(run, ranking),
        charts=drawn.by_workload,
        study_charts=drawn.of_study,
        physics=regime_sections(run, ranking, drawn.of_properties),
        twins=[(pair, twin_tables(pair)) for pair in twins(run, ranking)],
        curvature=drawn.curvature,
        curvature_charts=drawn.of_curvature,
        curvature_table=curvature_table(drawn.curvature),
        missing_preconditioners=missing_preconditioners(drawn.curvature),
        explains=EXPLAINS,
        no_ranks=ranks if isinstance(ranks, str) else "",
        answers=[_answer(run, workload) for workload in ranking.workloads],
        checklist=checklist(run, ranking),
        ledgers=ledgers(run),
        spreads=_spreads(ranking),
        step_times=[(table, _step_rows(table)) for table in (run.calibration.tables if run.calibration else ())],
        objective=objective_label(run.study.objective),
        methods=methods(run, ranking),
        caveats=caveats(run, ranking),
        study_tables=study_tables(ranking),
        environment=_environment_rows(run.environment),
        packed=_packed(run, drawn),
        style=_own_text("report.css"),
        script=_own_text("report.js"),
    )


def _own_text(name: str) -> Markup:
    """A file of ours that stands in the page as it is."""
    return Markup((files("analysis") / "templates" / name).read_text(encoding="utf-8").rstrip())


def _packed(run: Run, drawn: Charts) -> dict[str, Markup]:
    """What the page's script unpacks: charts, trials, and Plotly, which alone has 4.8 MB, as base64 of gzip."""
    content = {
        "charts": {chart.name: plotly_form(chart) for chart in drawn.every},
        "dark": dark_colours(looks_of(drawn.every)),
    }
    texts = {"charts": _json(content), "trials": _json(trial_table(run))}
    if drawn.every:
        texts["plotly"] = get_plotlyjs()
    return {name: Markup(pack(text)) for name, text in texts.items()}


def _json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def pack(text: str) -> str:
    """Base64 of gzip, the same for the same text."""
    return base64.b64encode(gzip.compress(text.encode("utf-8"), _COMPRESSION, mtime=0)).decode("ascii")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the page says about a workload: columns of errors and one row per arm, further tables, notes below them."""

    ranking: WorkloadRanking
    columns: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def _answer(run: Run, workload: WorkloadRanking) -> Answer:
    ood = sorted({s.split for arm in workload.arms for s in arm.errors if s.split.startswith(OOD_PREFIX)})
    stress = any(s.metric is Metric.STRESS_MAE for arm in workload.arms for s in arm.errors)
    cells = [(Split.TEST.value, Metric.FORCES_MAE), (Split.TEST.value, Metric.ENERGY_PER_ATOM_MAE)]
    cells += [(Split.TEST.value, Metric.STRESS_MAE)] if stress else []
    cells += [(split, metric) for split in ood for metric in (Metric.FORCES_MAE, Metric.ENERGY_PER_ATOM_MAE)]
    differences = {comparison.second: comparison for comparison in workload.comparisons}
    compared = ("difference to the first, test force MAE, meV/Å",) if differences else ()
    return Answer(
        ranking=workload,
        columns=(*(f"{split} {_ERROR_WORDS[metric]}" for split, metric in cells), *compared),
        rows=tuple(_answer_row(run, arm, cells, differences) for arm in workload.arms),
        tables=tuple(
            table
            for table in (
                *workload_tables(workload),
                *metric_tables(workload, About.OOD),
                *part_tables(run, workload.workload, workload.arms),
                refinement_table(run, workload.workload),
            )
            if table.rows
        ),
        notes=tuple(refused(run, workload.workload)),
    )


def _answer_row(
    run: Run, arm: ArmResult, cells: Sequence[tuple[str, Metric]], differences: Mapping[str, Comparison]
) -> dict[str, Any]:
    tune_ended = sum(arm.tune.reasons.values())
    errors = [_error_cell(arm, split, metric) for split, metric in cells]
    return {
        "arm": arm,
        "look": look(arm.optimizer, run.optimizers),
        "errors": [*errors, _difference_cell(differences.get(arm.optimizer))] if differences else errors,
        "seeds": _seed_words(arm),
        "tune_failed": f"{arm.tune.failed} of {tune_ended}" if tune_ended else wording.NOT_AVAILABLE,
        "own_share": wording.percent(arm.own_share),
        "step_ms": _milliseconds(arm.step_time),
        "device_s": f"{arm.tune.device_s + arm.confirm.device_s:.0f}",
    }


def _difference_cell(comparison: Comparison | None) -> tuple[str, str]:
    if comparison is None:
        return wording.ABSENT, ""
    # Signs as the reader of a ranking expects them: how much worse than the first arm.
    interval = comparison.interval
    turned = None if interval is None else Interval(low=0.0 - interval.high, high=0.0 - interval.low)
    return wording.milli(0.0 - comparison.difference), wording.milli_interval(turned)


def _seed_words(arm: ArmResult) -> str:
    words = [str(arm.n_seeds)]
    if arm.left_no_candidate:
        return "0 (no candidate)"
    if arm.failed_seeds:
        words.append(f"{len(arm.failed_seeds)} failed")
    if arm.missing_seeds:
        words.append(f"{len(arm.missing_seeds)} missing")
    return words[0] if len(words) == 1 else f"{words[0]} ({', '.join(words[1:])})"


def _error_cell(arm: ArmResult, split: str, metric: Metric) -> tuple[str, str]:
    """IQM and interval as text, times 1000."""
    summary = arm.summary(split, metric)
    if summary is None:
        return wording.ABSENT, ""
    everything_failed = all(map(math.isinf, summary.values.values()))
    return wording.milli(summary.iqm), "failed" if everything_failed else wording.milli_interval(summary.interval)


def _spreads(ranking: Ranking) -> list[dict[str, str]]:
    """Largest over smallest share of the arms, by workload and stage."""
    rows = []
    for workload in ranking.workloads:
        for stage in Stage:
            shares = [arm.tune if stage is Stage.TUNE else arm.confirm for arm in workload.arms]
            ratios = [
                spread(values)
                for values in (
                    [s.trials for s in shares],
                    [s.steps for s in shares],
                    [s.device_s for s in shares],
                    [s.calibrated_s or 0.0 for s in shares],
                )
            ]
            words = [wording.NOT_AVAILABLE if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            rows.append(
                dict(zip(("trials", "steps", "device_s", "calibrated_s"), words, strict=True))
                | {"workload": workload.workload, "stage": stage.value}
            )
    return rows


def _step_rows(table: DeviceTimes) -> list[dict[str, Any]]:
    """Step times of a kind of device: plain and refresh steps as text, and over the workload's cheapest plain one."""
    cheapest: dict[str, float] = {}
    for step in table.steps:
        cheapest[step.workload] = min(step.plain.median_s, cheapest.get(step.workload, math.inf))
    return [
        {
            "step": step,
            "plain": _milliseconds(step.plain),
            "refresh": _milliseconds(step.refresh),
            "ratio": f"{step.plain.median_s / cheapest[step.workload]:.2f}",
        }
        for step in table.steps
    ]


def _milliseconds(time: StepTime | TimedStep | None) -> tuple[str, str]:
    """Median and quartiles as text, times 1000."""
    if time is None:
        return wording.ABSENT, ""
    return wording.milli(time.median_s), f"[{wording.milli(time.low_s)}, {wording.milli(time.high_s)}]"


def _environment_rows(environment: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in environment.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
            value = {str(place): item for place, item in enumerate(value)}
        if isinstance(value, Mapping):
            rows += [(f"{name}.{inner}", text) for inner, text in _environment_rows(value)]
        else:
            rows.append((name, _flat(value)))
    return rows


def _flat(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def caveats(run: Run, ranking: Ranking) -> list[str]:
    """What the numbers cannot say, one sentence or two each."""
    seeds = run.study.confirm.seeds
    lines = [
        f"{seeds} seed{'s' if seeds != 1 else ''} per configuration. Intervals over seeds are studentized: for normal "
        "errors they hold the true value in 95 of 100 studies at any number of seeds from three on, with heavier tails "
        "in 96 to 98. They say nothing about other data, models or horizons.",
        f"A winner needs {MINIMUM_SEEDS} paired seeds and an interval of the difference below 0 against every other "
        "arm. The interval holds the luck of the seeds and that of the search, as far as re-selections among the same "
        "configurations show it: that takes two confirmed configurations per arm (`confirm.top_k`), with one it is "
        "not in the interval. In simulated studies without any difference at most 5 of 100 named a winner per "
        "workload; over several workloads read the p adjusted by Holm.",
        "The nested bootstrap redraws configurations and seeds, the same ones for both arms. A configuration without "
        "confirm seeds then stands with its stage-1 error. Its percentile interval is too narrow at few seeds.",
        "IQM: the mean after cutting floor(n/4) seeds at each end; with three seeds or fewer it is the plain mean. A "
        "failed seed counts as infinitely bad.",
    ]
    arms = [arm for workload in ranking.workloads for arm in workload.arms]
    reasons = {reason for arm in arms for reason in arm.failed_seeds.values()}
    outside = sorted(reasons - {Reason.DIVERGED.value})
    if outside:
        lines.append(
            f"Confirm seeds that ended as {wording.listed(outside)} count as failures of their arm, whether or not the "
            "optimizer was the cause."
        )
    if any(workload.decision.winner for workload in ranking.workloads):
        lines.append("A winner is the winner on this workload, at this horizon and search budget.")
    return lines
