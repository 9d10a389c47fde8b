"""The charts over all workloads of a study: profiles, label efficiency, mean ranks where the numbers allow them."""

from __future__ import annotations

import math

import numpy as np

from analysis.charts.chart import Along, Axis, Chart, Fill, Kind, Mark, Panel, limits
from analysis.charts.workload_charts import MILLI
from analysis.figure_style import look
from analysis.label_efficiency import LabelEfficiency
from analysis.load import Run
from analysis.mean_ranks import MeanRanks, mean_ranks
from analysis.profiles import LARGEST_RATIO, profile
from analysis.ranking import Ranking
from analysis.targets import AxisScores

_POINTS = 121
_FEWEST_PROFILED = 2


def study_charts(run: Run, ranking: Ranking) -> list[Chart]:
    """Every chart over workloads that has something to show."""
    found = [profile_chart(run, ranking), *(label_chart(run, labels) for labels in ranking.labels)]
    ranks = mean_ranks(ranking)
    if isinstance(ranks, MeanRanks):
        found.append(rank_chart(run, ranks))
    return [chart for chart in found if chart is not None]


def profile_chart(run: Run, ranking: Ranking) -> Chart | None:
    """Share of workloads on which an optimizer is within a multiple of the fastest; two workloads or more."""
    usable = [workload for workload in ranking.targets.workloads if workload.target is not None]
    axes = {"steps": ranking.targets.steps, "device-seconds": ranking.targets.seconds}
    known = {name: axis for name, axis in axes.items() if axis is not None}
    if len(usable) < _FEWEST_PROFILED or not known:
        return None
    panels = tuple(
        Panel(
            x=Axis(title=f"{name} over the fastest's", low=1.0, high=LARGEST_RATIO),
            y=Axis(title="share of workloads", low=0.0, high=1.05),
            marks=_profiles(run, axis),
        )
        for name, axis in known.items()
    )
    return Chart(
        name="profiles",
        title="Performance profiles",
        caption=f"Share of workloads on which an optimizer's best configuration reaches the error of "
        f"{ranking.targets.baseline} within a multiple of the fastest's cost, higher is better. The profile depends on "
        "who takes part.",
        panels=panels,
        columns=len(panels),
    )


def _profiles(run: Run, axis: AxisScores) -> tuple[Mark, ...]:
    taus = np.linspace(1.0, LARGEST_RATIO, _POINTS, dtype=np.float64)
    shares = profile(np.array(list(axis.ratios.values()), dtype=np.float64), taus)
    return tuple(
        Mark(kind=Kind.STEPS, label=name, look=look(name, run.optimizers), x=taus, y=share)
        for name, share in zip(axis.ratios, shares, strict=True)
    )


def label_chart(run: Run, labels: LabelEfficiency) -> Chart | None:
    """Test error against the share of force labels, with intervals, and the share that reaches the baseline."""
    if not labels.curves:
        return None
    errors = [
        MILLI * value
        for points in labels.curves.values()
        for point in points
        for value in (point.iqm, *((point.interval.low, point.interval.high) if point.interval else ()))
    ]
    low, high = limits(errors, log=True)
    curves = Panel(
        title="error",
        x=Axis(title="share of frames with force labels", low=0.0, high=1.05),
        y=Axis(title="test force MAE (meV/Å)", log=True, low=low, high=high),
        marks=tuple(mark for name in labels.curves for mark in _label_marks(run, labels, name)),
    )
    return Chart(
        name=f"labels-{labels.workloads[max(labels.workloads)]}",
        title="Label efficiency",
        caption="Test error against the share of frames that keep their force labels: interquartile mean over seeds "
        f"with its 95 % interval. The table says which share reaches the error of {labels.baseline} with the most.",
        panels=(curves,),
        columns=1,
    )


def _label_marks(run: Run, labels: LabelEfficiency, name: str) -> tuple[Mark, Mark]:
    points = labels.curves[name]
    own = look(name, run.optimizers)
    x = np.array([point.fraction for point in points], dtype=np.float64)
    y = MILLI * np.array([point.iqm for point in points], dtype=np.float64)
    ends = [(math.nan, math.nan) if p.interval is None else (p.interval.low, p.interval.high) for p in points]
    low, high = MILLI * np.array(ends, dtype=np.float64).T
    shifted = x + 0.004 * (list(labels.curves).index(name) - 0.5 * (len(labels.curves) - 1))
    line = Mark(kind=Kind.LINE, label=name, look=own, x=x, y=y)
    dots = Mark(kind=Kind.DOTS, label=f"{name}, 95 %", look=own, x=shifted, y=y, low=low, high=high, key=False)
    return line, dots


def rank_chart(run: Run, ranks: MeanRanks) -> Chart:
    """Mean ranks over workloads with a bar between optimizers that the pairwise tests do not separate."""
    names = list(ranks.ranks)
    dots = [
        Mark(
            kind=Kind.DOTS,
            label=name,
            look=look(name, run.optimizers),
            x=np.array([ranks.ranks[name]], dtype=np.float64),
            y=np.array([place], dtype=np.float64),
            key=False,
        )
        for place, name in enumerate(names)
    ]
    bars = [
        Mark(
            kind=Kind.DOTS,
            label="not separated",
            look=look(group[0], run.optimizers),
            x=np.array([ranks.ranks[group[0]]], dtype=np.float64),
            y=np.array([names.index(group[0]) - 0.28], dtype=np.float64),
            low=np.array([ranks.ranks[group[0]]], dtype=np.float64),
            high=np.array([ranks.ranks[group[-1]]], dtype=np.float64),
            along=Along.X,
            fill=Fill.FAINT,
            words=(f"not separated: {', '.join(group)}",),
            key=False,
        )
        for group in ranks.groups
    ]
    return Chart(
        name="mean-ranks",
        title="Mean ranks",
        caption=f"Mean rank of the test force error over {ranks.workloads} workloads, lower is better. A bar from an "
        "optimizer to another one: no pair between them is separated by Wilcoxon's test with Holm's correction over "
        "all pairs.",
        panels=(
            Panel(
                x=Axis(title="mean rank", low=0.8, high=len(names) + 0.2),
                y=Axis(title="", ticks=tuple(names)),
                marks=(*bars, *dots),
            ),
        ),
        columns=1,
        height=3.0 + 1.9 * len(names),
    )
