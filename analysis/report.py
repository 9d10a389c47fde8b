"""The report: one self-contained HTML page, figures for papers, tables (CSV, LaTeX), a summary and ranking.json."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path

from analysis.charts.chart import CSV_COLUMNS, Chart, chart_rows
from analysis.charts.drawn import draw
from analysis.charts.run_charts import run_charts
from analysis.checks import Check, Status
from analysis.figure_style import figure_style, save
from analysis.json_form import to_json
from analysis.latex import write_latex
from analysis.load import Run, load
from analysis.page import render
from analysis.ranking import Ranking, rank
from analysis.summary import summary
from analysis.tables import write_tables
from tunebench.study.files import replacing
from tunebench.study.record import REPORT

RANKING = "ranking.json"
PAGE = "index.html"
SUMMARY = "summary.md"
FIGURES = "figures"
TABLES = "tables"


@dataclass(frozen=True, kw_only=True)
class ReportResult:
    """A report that was written.

    Attributes:
        page: index.html. ranking: ranking.json, beside it.
        failed_checks: one line per failed check with its workload and first finding; empty when all passed or warned.
    """

    page: Path
    ranking: Path
    failed_checks: tuple[str, ...]


def write_report(folder: Path, out: Path | None = None) -> ReportResult:
    """Analyse a run directory, finished or not, and write its report into ``out`` or RUN/report.

    Raises:
        RunError: there is no run in ``folder``, or its journal cannot be read.
        StudyError: its study is not valid, or was edited after the start.
        OSError: the report cannot be written.
    """
    run = load(folder)
    return write_pages(run, rank(run), out or folder / REPORT)


def write_pages(run: Run, ranking: Ranking, out: Path, refresh_s: int | None = None) -> ReportResult:
    """Write page, summary, figures, tables and ranking.json of a ranked run into a folder.

    Args:
        run: the run.
        ranking: its ranking.
        out: the folder, made where it is absent.
        refresh_s: seconds after which a browser reads the page anew, for a run that goes on.

    Raises:
        OSError: the folder cannot be written.
    """
    page = out / PAGE
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(ranking), indent=2, ensure_ascii=False, allow_nan=False)
    (out / RANKING).write_text(f"{text}\n", encoding="utf-8")
    (out / SUMMARY).write_text(summary(run, ranking, page), encoding="utf-8")
    drawn = run_charts(run, ranking)
    write_tables(run, ranking, out / TABLES)
    write_latex(ranking, out / TABLES)
    for chart in drawn.every:
        _write_chart(chart, out)
    with replacing(page) as file:
        file.write_text(render(run, ranking, drawn, refresh_s), encoding="utf-8")
    failed = tuple(_line(check) for check in ranking.checks if check.status is Status.FAILED)
    return ReportResult(page=page, ranking=out / RANKING, failed_checks=failed)


def _write_chart(chart: Chart, out: Path) -> None:
    """The figure's files for papers, and the numbers in it."""
    with figure_style():
        save(draw(chart), out / FIGURES, chart.name)
    folder = out / TABLES / FIGURES
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{chart.name}.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(CSV_COLUMNS)
        writer.writerows(chart_rows(chart))


def _line(check: Check) -> str:
    first, *others = check.findings
    where = f"{check.workload}: " if check.workload else ""
    return f"{where}{check.name}: {first}" + (f" (and {len(others)} more)" if others else "")
