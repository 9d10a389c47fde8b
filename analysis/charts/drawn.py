"""A chart drawn by matplotlib, for papers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from analysis.charts.chart import Along, Axis, Chart, Fill, Kind, Mark, Panel, log_ticks
from analysis.figure_style import DASHES, WIDTH_INCHES
from analysis.statistics import Floats

_INCHES_PER_LINE = 0.165
_LEGEND_COLUMNS = 5
_MOST_MARKERS = 7
_MOST_TICKS = 4
"""Along the narrow side of a panel of four in a row."""
_SIZES = {Fill.FULL: 4.5, Fill.HOLLOW: 4.5, Fill.CROSS: 5.0, Fill.FAINT: 2.6}


def draw(chart: Chart) -> Figure:
    """The chart as a figure of a page's width; call it inside `figure_style`."""
    labels = chart.labels
    legend_rows = math.ceil(len(labels) / _LEGEND_COLUMNS)
    height = _INCHES_PER_LINE * (chart.rows * chart.height + 1.2 * legend_rows)
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    grid = list(figure.subplots(chart.rows, chart.columns, sharey="row", squeeze=False).flat)
    for axes, panel in zip(grid, chart.panels, strict=False):
        _draw_panel(axes, panel)
    for place, axes in enumerate(grid):
        if place >= len(chart.panels):
            axes.set_visible(False)
        elif place % chart.columns == 0:
            axes.set_ylabel(chart.panels[place].y.title)
    if labels:
        handles = [_handle(mark) for mark in labels]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(_LEGEND_COLUMNS, len(handles)))
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    _scale(axes, panel.x, "x")
    _scale(axes, panel.y, "y")
    axes.margins(x=0.03)
    for mark in panel.marks:
        _DRAW[mark.kind](axes, mark)
    axes.set_xlabel(panel.x.title)
    if panel.title:
        axes.set_title(panel.title, loc="left", pad=6.0)
    _tick(axes, panel.x, "x")
    _tick(axes, panel.y, "y")
    axes.grid(axis="x" if panel.y.ticks else "y")


def _scale(axes: Axes, axis: Axis, name: str) -> None:
    if axis.log:
        getattr(axes, f"set_{name}scale")("log")
    if axis.ticks:
        getattr(axes, f"set_{name}lim")(len(axis.ticks) - 0.5, -0.5)
    elif axis.low is not None and axis.high is not None:
        getattr(axes, f"set_{name}lim")(axis.low, axis.high)


def _tick(axes: Axes, axis: Axis, name: str) -> None:
    of = getattr(axes, f"{name}axis")
    most = _MOST_TICKS if name == "x" else 2 * _MOST_TICKS
    if axis.ticks:
        getattr(axes, f"set_{name}ticks")(range(len(axis.ticks)), list(axis.ticks))
        of.set_tick_params(length=0)
    elif axis.log:
        of.set_major_locator(FixedLocator(log_ticks(axis, most)))
        of.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        of.set_minor_locator(NullLocator())
    else:
        of.set_major_locator(MaxNLocator(5, integer=axis.integer))


def _draw_line(axes: Axes, mark: Mark) -> None:
    steps = mark.kind is Kind.STEPS
    seen = np.isfinite(mark.y)
    if mark.low is not None and mark.high is not None:
        bounds = np.isfinite(mark.low)
        top = np.minimum(mark.high, axes.get_ylim()[1]) if np.isinf(mark.high).any() else mark.high
        band: dict[str, Any] = {"color": mark.look.light, "alpha": 0.15, "linewidth": 0}
        axes.fill_between(mark.x, mark.low, top, where=bounds.tolist(), step="post" if steps else None, **band)
    shown = mark.x[seen]
    axes.plot(
        shown,
        mark.y[seen],
        color=mark.look.light,
        linestyle=DASHES[mark.look.dash][0],
        marker=mark.look.marker,
        markevery=max(1, math.ceil(len(shown) / _MOST_MARKERS)),
        drawstyle="steps-post" if steps else "default",
    )


def _draw_dots(axes: Axes, mark: Mark) -> None:
    seen = np.isfinite(mark.x) & np.isfinite(mark.y)
    if mark.low is not None and mark.high is not None:
        for place in np.flatnonzero(np.isfinite(mark.low)):
            _interval(axes, mark, int(place), float(mark.low[place]), float(mark.high[place]))
    if seen.any():  # an empty line that is not clipped has no extent, and the layout gives up
        axes.plot(mark.x[seen], mark.y[seen], **_dot_style(mark), zorder=3)


def _dot_style(mark: Mark) -> dict[str, Any]:
    colour = mark.look.light
    return {
        "linestyle": "",
        "color": colour,
        "marker": "x" if mark.fill is Fill.CROSS else mark.look.marker,
        "markersize": _SIZES[mark.fill],
        "markerfacecolor": "white" if mark.fill is Fill.HOLLOW else colour,
        "markeredgewidth": 0.0 if mark.fill is Fill.FAINT else 1.0,
        "alpha": 0.55 if mark.fill is Fill.FAINT else 1.0,
        "clip_on": mark.fill is not Fill.CROSS,
    }


def _interval(axes: Axes, mark: Mark, place: int, low: float, high: float) -> None:
    """From `low` to `high`; an interval without an end leaves the panel as an arrow."""
    along_x = mark.along is Along.X
    fixed = float((mark.y if along_x else mark.x)[place])
    edge = (axes.get_xlim() if along_x else axes.get_ylim())[1]
    ends, others = (low, min(high, edge)), (fixed, fixed)
    points = (ends, others) if along_x else (others, ends)
    axes.plot(*points, color=mark.look.light, linewidth=1.6, solid_capstyle="butt")
    if high > edge:
        tip = (edge, fixed) if along_x else (fixed, edge)
        axes.plot(*tip, marker=">" if along_x else "^", color=mark.look.light, markersize=4.5, clip_on=False)


def _draw_bars(axes: Axes, mark: Mark) -> None:
    assert mark.low is not None
    assert mark.high is not None
    colour = mark.look.light
    edge = "#888888" if colour == "#FFFFFF" else colour
    width: Floats = mark.high - mark.low
    axes.barh(mark.y, width, left=mark.low, height=0.62, color=colour, edgecolor=edge, linewidth=0.6)


_DRAW = {Kind.LINE: _draw_line, Kind.STEPS: _draw_line, Kind.DOTS: _draw_dots, Kind.BARS: _draw_bars}


def _handle(mark: Mark) -> Line2D | Patch:
    if mark.kind is Kind.BARS:
        return Patch(facecolor=mark.look.light, edgecolor="#888888", linewidth=0.6, label=mark.label)
    if mark.kind is Kind.DOTS:
        return Line2D([], [], **_dot_style(mark), label=mark.label)
    dash = DASHES[mark.look.dash][0]
    return Line2D([], [], color=mark.look.light, marker=mark.look.marker, linestyle=dash, label=mark.label)
