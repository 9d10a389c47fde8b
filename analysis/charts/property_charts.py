"""Curves of physical properties beside those of their reference: bands, distributions, profiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.charts.chart import Axis, Chart, Kind, Mark, Panel, limits
from analysis.figure_style import NEUTRAL, look
from analysis.load import Run
from analysis.model_metrics import About, entries_of
from analysis.model_rows import curves_of
from analysis.physics import chart_prefix
from analysis.ranking import WorkloadRanking
from analysis.selection import finished_trials

_WORDS = {
    "bands": "Phonon band structure",
    "density_of_states": "Phonon density of states",
    "radial_distribution": "Radial distribution",
    "mean_square_displacement": "Mean-square displacement",
    "density_profile": "Density across the interface",
    "order_profile": "Order across the interface",
    "energy_of_volume": "Energy against volume",
    "energy": "Torsion profile",
}
_AXES = {"bands": "path", "density_of_states": "frequency"}


def property_charts(run: Run, workload: WorkloadRanking) -> list[Chart]:
    """A chart for every curve of every entry that some model or reference has."""
    models = _models(run, workload)
    charts = []
    for entry, about in entries_of(run, workload.workload).items():
        reference = curves_of(run.path, f"reference-{_section(run, workload.workload, entry)}")
        own = {name: _of_entry(points, entry) for name, points in models.items()}
        known = {**own, "reference": _of_entry(reference, entry)}
        curves = dict.fromkeys(str(name) for points in known.values() if len(points) for name in points["curve"])
        charts += [_chart(run, workload.workload, about, entry, curve, known) for curve in curves]
    return charts


def _models(run: Run, workload: WorkloadRanking) -> dict[str, pd.DataFrame]:
    """Curves of the first seed of each arm's selected configuration that finished, by optimizer."""
    found = {}
    for arm in workload.arms:
        trials = finished_trials(run, workload.workload, arm.optimizer, arm.config_index)
        if trials and run.study.properties:
            found[arm.optimizer] = curves_of(run.path, trials[0].key.trial_id)
    return found


def _section(run: Run, workload: str, entry: str) -> int:
    return next(
        index
        for index, section in enumerate(run.study.properties)
        if entry in section.properties and (not section.workloads or workload in section.workloads)
    )


def _of_entry(points: pd.DataFrame, entry: str) -> pd.DataFrame:
    return points[points["entry"] == entry] if len(points) else points


def _chart(run: Run, workload: str, about: About, entry: str, curve: str, known: dict[str, pd.DataFrame]) -> Chart:
    own = {name: points[points["curve"] == curve] for name, points in known.items() if len(points)}
    own = {name: points for name, points in own.items() if len(points)}
    first = next(iter(own.values())).iloc[0]
    marks = tuple(_mark(run, name, points[points["branch"] >= 0]) for name, points in own.items())
    low, high = limits((y for mark in marks for y in mark.y.tolist()), log=False)
    title = _WORDS.get(curve, curve.replace("_", " "))
    return Chart(
        name=f"{chart_prefix(workload, about)}{entry}-{curve.replace('_', '-')}",
        title=f"{title}, {entry}, {workload}",
        caption="The first finished seed of each optimizer's selected configuration, and the reference where it has "
        f"the curve.{_places(list(own.values()))}",
        panels=(
            Panel(
                x=Axis(title=_titled(_AXES.get(curve, "x"), str(first["x_unit"]))),
                y=Axis(title=_titled(title.lower(), str(first["y_unit"])), low=low, high=high),
                marks=marks,
            ),
        ),
        columns=1,
    )


def _titled(name: str, unit: str) -> str:
    return name if unit in ("1", "") else f"{name}, {unit}"


def _mark(run: Run, name: str, points: pd.DataFrame) -> Mark:
    """All branches as one line with gaps between them."""
    x: list[float] = []
    y: list[float] = []
    for _, branch in points.groupby("branch", sort=True):
        x += [*branch["x"].tolist(), np.nan]
        y += [*branch["y"].tolist(), np.nan]
    return Mark(
        kind=Kind.LINE,
        label=name,
        look=NEUTRAL if name == "reference" else look(name, run.optimizers),
        x=np.array(x[:-1], dtype=np.float64),
        y=np.array(y[:-1], dtype=np.float64),
    )


def _places(tables: Sequence[pd.DataFrame]) -> str:
    """The named places on the axis, in words."""
    marks = tables[-1][tables[-1]["branch"] < 0]
    named = [f"{mark} at {x:.3g}" for mark, x in zip(marks["mark"], marks["x"], strict=True)]
    return f" On the axis: {', '.join(named)}." if named else ""
