"""The report: one self-contained HTML page, figures for papers, CSV tables and ranking.json."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from analysis import plots
from analysis.checks import Check, Status
from analysis.figure_style import FORMATS, figure_style, save
from analysis.json_form import to_json
from analysis.load import Run, load
from analysis.page import PageFigure, render
from analysis.ranking import Ranking, WorkloadRanking, rank
from analysis.tables import write_tables
from tunebench.study.record import REPORT

RANKING = "ranking.json"
PAGE = "index.html"
FIGURES = "figures"
TABLES = "tables"

_Draw = Callable[[Run, WorkloadRanking], Figure | None]
_FIGURES: tuple[tuple[str, _Draw, str], ...] = (
    (
        "errors",
        plots.error_figure,
        "Test errors of each arm's best configuration. Large dot: interquartile mean over seeds; bar: its 95 % "
        "interval; small dots: seeds. Lower is better.",
    ),
    (
        "learning",
        plots.learning_figure,
        "Learning curves of the best configurations in the confirm stage. Line: median over the seeds that finished; "
        "band: lowest to highest of them.",
    ),
    (
        "tuning",
        plots.tuning_figure,
        "What the search had found, against the number of trials and against device-seconds, stopped and failed work "
        "included. A stopped trial counts with its objective when it was stopped. Band, drawn for up to four arms: "
        "80 % of random orders of the same trials.",
    ),
    (
        "sensitivity",
        plots.sensitivity_figure,
        "Sensitivity to the learning rate: every trial of the tune stage. Objective: {objective}. The other "
        "hyperparameters vary too. Stopped trials were measured earlier in training than finished ones.",
    ),
    ("endings", plots.endings_figure, "Where every trial ended, both stages together."),
)


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


def write_pages(run: Run, ranking: Ranking, out: Path) -> ReportResult:
    """Write page, figures, tables and ranking.json of a ranked run into a folder.

    Raises:
        OSError: the folder cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(ranking), indent=2, ensure_ascii=False, allow_nan=False)
    (out / RANKING).write_text(f"{text}\n", encoding="utf-8")
    write_tables(run, ranking, out / TABLES)
    figures = {workload.workload: _draw(run, workload, out) for workload in ranking.workloads}
    page = out / PAGE
    page.write_text(render(run, ranking, figures), encoding="utf-8")
    failed = tuple(_line(check) for check in ranking.checks if check.status is Status.FAILED)
    return ReportResult(page=page, ranking=out / RANKING, failed_checks=failed)


def _line(check: Check) -> str:
    first, *others = check.findings
    where = f"{check.workload}: " if check.workload else ""
    return f"{where}{check.name}: {first}" + (f" (and {len(others)} more)" if others else "")


def _draw(run: Run, workload: WorkloadRanking, out: Path) -> list[PageFigure]:
    drawn = []
    for name, draw, caption in _FIGURES:
        with figure_style():
            figure = draw(run, workload)
            if figure is None:
                continue
            stem = f"{workload.workload}-{name}"
            save(figure, out / FIGURES, stem)
        encoded = base64.b64encode((out / FIGURES / f"{stem}.png").read_bytes()).decode("ascii")
        drawn.append(
            PageFigure(
                caption=caption.format(objective=plots.objective_label(run.study.objective)),
                alternative=f"{workload.workload}: {caption.split('.', maxsplit=1)[0]}",
                data_uri=f"data:image/png;base64,{encoded}",
                files=tuple(f"{FIGURES}/{stem}.{kind}" for kind in FORMATS),
            )
        )
    return drawn
