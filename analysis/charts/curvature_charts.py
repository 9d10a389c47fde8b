"""Charts of curvature: spectral densities at the end of training, and extremes and conditioning along it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from analysis.charts.chart import Axis, Chart, Kind, Mark, Panel, limits
from analysis.curvature import Curvature
from analysis.figure_style import look
from analysis.load import Run
from analysis.statistics import Floats
from tunebench.curvature.record import CurvaturePoint, CurvatureRecord, OperatorRecord
from tunebench.curvature.spectrum import Spectrum

_DECADES = 6.0
_WIDTH = 0.12
"""Standard deviation of the Gaussian that smooths a density, in decades."""
_POINTS = 181
_LEAST_DENSITY = 1e-5
_OPERATORS = ("H", "preconditioned H")


def curvature_charts(run: Run, curvature: Curvature) -> list[Chart]:
    """Densities, and what changes along training where a trial was measured more than once, by workload."""
    found = []
    for workload in dict.fromkeys(record.workload for record in curvature.records):
        records = [record for record in curvature.records if record.workload == workload]
        charts = (_densities(run, workload, records), _along(run, workload, records))
        found += [chart for chart in charts if chart is not None]
    return found


def _operator(point: CurvaturePoint, name: str) -> OperatorRecord | None:
    return point.hessian if name == "H" else point.preconditioned


def _densities(run: Run, workload: str, records: Sequence[CurvatureRecord]) -> Chart:
    panels = tuple(
        Panel(
            title=f"{words} eigenvalues, {name}",
            x=Axis(title="|eigenvalue| over the largest", log=True, low=10.0**-_DECADES, high=2.0),
            y=Axis(title="share of directions\nper decade", log=True, low=_LEAST_DENSITY, high=3.0),
            marks=tuple(
                _density(run, record, operator.spectrum, sign)
                for record in records
                if (operator := _operator(record.points[-1], name)) is not None
            ),
        )
        for sign, words in ((1.0, "positive"), (-1.0, "negative"))
        for name in _OPERATORS
    )
    return Chart(
        name=f"{workload}-curvature",
        title=f"Spectral density at the last checkpoint measured, {workload}",
        caption="Stochastic Lanczos quadrature of the Hessian of the training loss and of its preconditioned form, "
        f"smoothed over {_WIDTH:g} decades, with one standard error over random vectors. A preconditioner that "
        "conditions well moves directions towards the right edge. Far left, where a few Lanczos steps stand for very "
        "many directions, peaks are those steps' own. Explains, never ranks.",
        panels=panels,
        columns=2,
        height=13.0,
    )


def _density(run: Run, record: CurvatureRecord, spectrum: Spectrum, sign: float) -> Mark:
    at: Floats = np.linspace(-_DECADES, math.log10(2.0), _POINTS, dtype=np.float64)
    density, error = spectrum.decades(sign, 10.0 ** (-_DECADES - 1.0)).density(at, _WIDTH)
    error = np.nan_to_num(error)
    shown = np.where(density > _LEAST_DENSITY, density, np.nan)
    return Mark(
        kind=Kind.LINE,
        label=record.optimizer,
        look=look(record.optimizer, run.optimizers),
        x=10.0**at,
        y=shown,
        low=np.where(np.isnan(shown), np.nan, np.maximum(density - error, _LEAST_DENSITY)),
        high=np.where(np.isnan(shown), np.nan, density + error),
        words=(f"{record.trial}, step {record.points[-1].step}",) * _POINTS,
    )


_ALONG: tuple[tuple[str, Callable[[Spectrum], float]], ...] = (
    ("effective condition", lambda spectrum: spectrum.condition[0]),
    ("spread, decades", lambda spectrum: spectrum.spread_decades),
    ("largest eigenvalue", lambda spectrum: spectrum.largest.value),
)


def _along(run: Run, workload: str, records: Sequence[CurvatureRecord]) -> Chart | None:
    """Three numbers of both operators against the step; None where no trial was measured twice."""
    several = [record for record in records if len(record.points) > 1]
    if not several:
        return None
    panels = []
    for words, read in _ALONG:
        log = "decades" not in words
        marks = {name: _courses(run, several, name, read) for name in _OPERATORS}
        values = (value for found in marks.values() for mark in found for value in mark.y.tolist())
        low, high = limits(values, log=log)
        y = Axis(title=words, log=log, low=low, high=high)  # one range, since panels of a row share it
        panels += [Panel(title=name, x=Axis(title="step"), y=y, marks=found) for name, found in marks.items()]
    return Chart(
        name=f"{workload}-curvature-along",
        title=f"Curvature along training, {workload}",
        caption="Largest Ritz value, effective condition number (largest |Ritz value| over the mean |eigenvalue|) and "
        "spread of the Ritz values of the Hessian and of its preconditioned form. The largest eigenvalue of a "
        "preconditioned Hessian has the unit of its own P. Explains, never ranks.",
        panels=tuple(panels),
        columns=2,
        height=12.0,
    )


def _courses(
    run: Run, records: Sequence[CurvatureRecord], name: str, read: Callable[[Spectrum], float]
) -> tuple[Mark, ...]:
    """One line per trial that has the operator."""
    marks = []
    for record in records:
        found = [(point.step, operator) for point in record.points if (operator := _operator(point, name)) is not None]
        mark = Mark(
            kind=Kind.LINE,
            label=record.optimizer,
            look=look(record.optimizer, run.optimizers),
            x=np.array([step for step, _ in found], dtype=np.float64),
            y=np.array([read(operator.spectrum) for _, operator in found], dtype=np.float64),
            words=tuple(f"{record.trial}, step {step}" for step, _ in found),
        )
        marks += [mark] if found else []
    return tuple(marks)
