"""Curvature in the report: shown where it was measured, and never part of a verdict."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis.charts.chart import Chart
from analysis.charts.curvature_charts import curvature_charts
from analysis.charts.drawn import draw
from analysis.charts.plotly_form import plotly_form
from analysis.charts.run_charts import run_charts
from analysis.curvature import EXPLAINS, curvature_of, curvature_table, missing_preconditioners
from analysis.figure_style import figure_style
from analysis.json_form import to_json
from analysis.load import Run, load
from analysis.page import render
from analysis.ranking import rank
from tests.analysis.synthetic_run import Plan, write_run
from tunebench.curvature.record import (
    CurvaturePoint,
    CurvatureRecord,
    CurvatureSettings,
    OperatorRecord,
    record_files,
    write_record,
)
from tunebench.curvature.spectrum import Spectrum

ARMS = {"adamw": (0.03, 0.031, 0.032, 0.033, 0.034), "soap": (0.02, 0.021, 0.022, 0.023, 0.024)}
FLAT = np.array([-0.5, 1.0, 1.0, 1.0])
STEEP = np.array([-1e-3, 1e-4, 1e-2, 1.0])


def measured(eigenvalues: np.ndarray) -> OperatorRecord:
    weights = np.full(len(eigenvalues), 1.0 / len(eigenvalues))
    spectrum = Spectrum(
        size=100,
        values=(eigenvalues, 1.01 * eigenvalues),
        weights=(weights, weights),
        bounds=(np.zeros(4), np.zeros(4)),
    )
    return OperatorRecord(spectrum=spectrum, trace=np.nan, trace_error=np.nan, products=80, seconds=1.0)


def point(step: int, preconditioned: bool = True) -> CurvaturePoint:
    part = {"kind": "diagonal", "parameters": 100, "damping": "eps", "damped_share": 0.25, "excluded": 0}
    return CurvaturePoint(
        step=step,
        readout="raw",
        loss=0.1,
        gradient_norm=0.2,
        parameters=120,
        live=100,
        frames=10,
        force_labels=270,
        hessian=measured(STEEP),
        preconditioned=measured(FLAT) if preconditioned else None,
        preconditioner={"definition": "diag", "parts": [part]} if preconditioned else {"missing": "no linear map"},
    )


def record(optimizer: str, points: tuple[CurvaturePoint, ...]) -> CurvatureRecord:
    return CurvatureRecord(
        trial=f"ethanol-nequip.{optimizer}.confirm.c000.s0",
        workload="ethanol-nequip",
        optimizer=optimizer,
        stage="confirm",
        retrained=True,
        device="cpu",
        settings=CurvatureSettings(),
        points=points,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = write_run(tmp_path_factory.mktemp("curvature") / "run", Plan(arms=ARMS))
    write_record(folder, record("adamw", (point(60), point(240))))
    write_record(folder, record("soap", (point(60, preconditioned=False),)))
    (folder / "curvature" / "torn.json").write_text('{"schema', encoding="utf-8")
    return load(folder)


def charts(run: Run) -> dict[str, Chart]:
    return {chart.name: chart for chart in curvature_charts(run, curvature_of(run))}


def test_a_density_is_drawn_for_every_trial_and_a_course_for_those_measured_twice(run: Run) -> None:
    found = charts(run)
    assert set(found) == {"ethanol-nequip-curvature", "ethanol-nequip-curvature-along"}
    labels = [{mark.label for mark in panel.marks} for panel in found["ethanol-nequip-curvature"].panels]
    assert labels == [{"adamw", "soap"}, {"adamw"}] * 2  # soap has no preconditioned one
    assert [mark.label for mark in found["ethanol-nequip-curvature-along"].labels] == ["adamw"]


def test_a_density_of_both_signs_holds_all_directions(run: Run) -> None:
    panels = charts(run)["ethanol-nequip-curvature"].panels
    shares = 0.0
    for panel in panels[1::2]:  # preconditioned: one negative of four
        (mark,) = (mark for mark in panel.marks if mark.label == "adamw")
        decades, density = np.log10(mark.x), np.nan_to_num(mark.y)
        shares += float(np.trapezoid(density, decades))
    assert shares == pytest.approx(1.0, abs=0.02)


def test_a_row_of_panels_shares_its_range_and_every_point_is_inside(run: Run) -> None:
    chart = charts(run)["ethanol-nequip-curvature-along"]
    for row in range(chart.rows):
        left, right = chart.panels[2 * row : 2 * row + 2]
        assert left.y == right.y
        for mark in (*left.marks, *right.marks):
            assert left.y.low is not None
            assert left.y.high is not None
            assert (mark.y >= left.y.low).all()
            assert (mark.y <= left.y.high).all()


def test_both_forms_of_the_charts_can_be_drawn(run: Run) -> None:
    for chart in charts(run).values():
        assert plotly_form(chart)["data"]
        with figure_style():
            draw(chart).canvas.draw()


def test_the_table_has_a_row_per_operator_and_says_how_much_is_damped(run: Run) -> None:
    table = curvature_table(curvature_of(run))
    assert [row[1:3] for row in table.rows] == [
        ("60", "H"),
        ("60", "preconditioned H"),
        ("240", "H"),
        ("240", "preconditioned H"),
        ("60", "H"),
    ]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.rows[1][table.columns.index("damped")].startswith("25")


def test_the_page_says_that_curvature_never_ranks_and_names_what_could_not_be_read(run: Run) -> None:
    ranking = rank(run)
    page = render(run, ranking, run_charts(run, ranking))
    assert EXPLAINS[:60] in page
    assert "torn.json" in page
    assert missing_preconditioners(curvature_of(run)) == [
        "ethanol-nequip.soap.confirm.c000.s0 at step 60: no linear map"
    ]
    assert "no linear map" in page


def test_without_a_measurement_the_page_has_no_such_section_and_the_same_ranking(run: Run, tmp_path: Path) -> None:
    plain = load(write_run(tmp_path / "run", Plan(arms=ARMS)))
    assert not record_files(plain.path)
    ranking = rank(plain)
    assert 'id="curvature"' not in render(plain, ranking, run_charts(plain, ranking))
    assert to_json(ranking) == to_json(rank(run))
