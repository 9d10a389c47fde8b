"""A chart as a Plotly figure: traces, and one layout for a wide and one for a narrow window.

Plain dictionaries; a test passes them through Plotly's own validation. Colours are those of the light page, the page's
script exchanges them by `dark_colours` in the dark one. Layouts leave out fonts and grids, which follow the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from analysis.charts.chart import Along, Axis, Chart, Fill, Kind, Mark, log_ticks
from analysis.figure_style import DASHES, Look
from analysis.statistics import Floats

_SYMBOLS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "D": "diamond",
    "v": "triangle-down",
    "P": "cross",
    "X": "x",
    "<": "triangle-left",
    ">": "triangle-right",
    "p": "pentagon",
    "h": "hexagon2",
    "*": "star",
    "H": "hexagon",
    "d": "diamond-tall",
    "8": "octagon",
}
_PIXELS_PER_LINE = 17.0
_LEGEND_PIXELS = 26.0
_TITLE_PIXELS = 62.0
_TOP_PIXELS, _BARE_TOP_PIXELS = 30.0, 12.0
_AXIS_PIXELS = 52.0
_BAND = "26"  # opacity, two hexadecimal digits
_SIZES = {Fill.FULL: 8, Fill.HOLLOW: 8, Fill.CROSS: 9, Fill.FAINT: 5}
_MOST_MARKERS = 8
_DIGITS = 6


def plotly_form(chart: Chart) -> dict[str, Any]:
    """Data and layouts of a chart: ``{data, wide, narrow}``, as JSON can hold them."""
    named: set[str] = set()
    traces = []
    for place, panel in enumerate(chart.panels, start=1):
        for mark in panel.marks:
            edges = _edge(panel.x), _edge(panel.y)
            own = _TRACES[mark.kind](mark, *edges)
            for trace in own:
                trace |= {"xaxis": f"x{_number(place)}", "yaxis": f"y{_number(place)}", "legendgroup": mark.label}
            own[-1]["showlegend"] = mark.key and mark.label not in named
            named |= {mark.label} if mark.key else set()
            traces += own
    return {
        "data": traces,
        "wide": _layout(chart, chart.columns, len(named)),
        "narrow": _layout(chart, 1, 2 * len(named)),
    }


def dark_colours(looks: Sequence[Look]) -> dict[str, str]:
    """Colours of the light page by those of the dark one that take their place."""
    return {look.light: look.dark for look in looks}


def looks_of(charts: Sequence[Chart]) -> list[Look]:
    """Every look that occurs in some charts."""
    found = {mark.look for chart in charts for panel in chart.panels for mark in panel.marks}
    return sorted(found, key=lambda look: [str(getattr(look, field.name)) for field in fields(look)])


def _number(place: int) -> str:
    return "" if place == 1 else str(place)


def _edge(axis: Axis) -> float:
    return math.inf if axis.high is None else axis.high


def _line(mark: Mark, right: float, top: float) -> list[dict[str, Any]]:
    shape = "hv" if mark.kind is Kind.STEPS else "linear"
    traces: list[dict[str, Any]] = []
    if mark.low is not None and mark.high is not None:
        known = np.isfinite(mark.low)
        hidden = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False, "name": mark.label}
        edge: dict[str, Any] = {"width": 0, "shape": shape, "color": mark.look.light}
        ends = (mark.low, np.minimum(mark.high, top))
        for values, fill in zip(ends, ({}, {"fill": "tonexty", "fillcolor": mark.look.light + _BAND}), strict=True):
            places = {"x": _numbers(mark.x[known]), "y": _numbers(values[known])}
            traces.append({**hidden, **places, "line": edge, **fill})
    style = {"color": mark.look.light, "dash": DASHES[mark.look.dash][1], "width": 2, "shape": shape}
    trace = {**_points(mark), "type": "scatter", "mode": "lines", "line": style}
    if symbol := _SYMBOLS.get(mark.look.marker):
        trace["mode"] = "lines+markers"
        trace["marker"] = {"symbol": symbol, "size": 7, "color": mark.look.light, "maxdisplayed": _MOST_MARKERS}
    return [*traces, trace]


def _dots(mark: Mark, right: float, top: float) -> list[dict[str, Any]]:
    colour = mark.look.light
    symbol = "x-thin" if mark.fill is Fill.CROSS else _SYMBOLS[mark.look.marker]
    symbol += "-open" if mark.fill in (Fill.HOLLOW, Fill.CROSS) else ""
    marker: dict[str, Any] = {"symbol": symbol, "size": _SIZES[mark.fill], "color": colour}
    if mark.fill in (Fill.HOLLOW, Fill.CROSS):
        marker["line"] = {"width": 1.5, "color": colour}
    marker["opacity"] = 0.55 if mark.fill is Fill.FAINT else 1.0
    trace = {**_points(mark), "type": "scatter", "mode": "markers", "marker": marker}
    if mark.fill is Fill.CROSS:
        trace["cliponaxis"] = False
    if mark.low is None or mark.high is None:
        return [trace]
    along_x = mark.along is Along.X
    centre, edge = (mark.x, right) if along_x else (mark.y, top)
    placed = np.isfinite(centre) & np.isfinite(mark.low)
    trace[f"error_{mark.along}"] = {
        "type": "data",
        "symmetric": False,
        "array": _numbers(np.subtract(np.minimum(mark.high, edge), centre, where=placed, out=np.zeros_like(centre))),
        "arrayminus": _numbers(np.subtract(centre, mark.low, where=placed, out=np.zeros_like(centre))),
        "color": colour,
        "thickness": 2,
        "width": 0,
    }
    return [*_arrows(mark, edge, along_x), trace]


def _arrows(mark: Mark, edge: float, along_x: bool) -> list[dict[str, Any]]:
    """Tips of the intervals that leave the panel."""
    assert mark.high is not None
    leaving = (mark.high > edge) & np.isfinite(mark.x) & np.isfinite(mark.y)
    if not leaving.any():
        return []
    at_edge = np.full(int(leaving.sum()), edge, dtype=np.float64)
    x, y = (at_edge, mark.y[leaving]) if along_x else (mark.x[leaving], at_edge)
    marker = {"symbol": "triangle-right" if along_x else "triangle-up", "size": 9, "color": mark.look.light}
    places = {"x": _numbers(x), "y": _numbers(y), "cliponaxis": False}
    hidden = {"type": "scatter", "mode": "markers", "hoverinfo": "skip", "showlegend": False, "name": mark.label}
    return [{**hidden, **places, "marker": marker}]


def _bars(mark: Mark, right: float, top: float) -> list[dict[str, Any]]:
    assert mark.low is not None
    assert mark.high is not None
    width: Floats = mark.high - mark.low
    style = {"color": mark.look.light, "line": {"width": 1, "color": "#888888"}}
    hover = {"customdata": _numbers(width), "hovertemplate": f"{mark.label}: %{{customdata:.4g}}<extra></extra>"}
    bar = {"type": "bar", "orientation": "h", "width": 0.62, "marker": style, "name": mark.label, **hover}
    return [{**bar, "x": _numbers(width), "y": _numbers(mark.y), "base": _numbers(mark.low)}]


_TRACES = {Kind.LINE: _line, Kind.STEPS: _line, Kind.DOTS: _dots, Kind.BARS: _bars}


def _points(mark: Mark) -> dict[str, Any]:
    words = "<br>%{text}" if mark.words else ""
    trace: dict[str, Any] = {
        "x": _numbers(mark.x),
        "y": _numbers(mark.y),
        "name": mark.label,
        "hovertemplate": f"%{{x:.4g}}, %{{y:.4g}}{words}<extra>{mark.label}</extra>",
    }
    return trace | ({"text": list(mark.words)} if mark.words else {})


def _numbers(values: Floats) -> list[float | None]:
    """Finite values to six digits; Plotly leaves a gap at null, and has no legend entry for an empty list."""
    if not len(values):
        return [None]
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]


def _layout(chart: Chart, columns: int, legend: int) -> dict[str, Any]:
    rows = math.ceil(len(chart.panels) / columns)
    panel_pixels = _PIXELS_PER_LINE * chart.height
    legend_pixels = _LEGEND_PIXELS * math.ceil(legend / 4) if legend else 0.0
    plot = rows * panel_pixels + (rows - 1) * _TITLE_PIXELS
    above = _TOP_PIXELS if any(panel.title for panel in chart.panels) else _BARE_TOP_PIXELS
    height = above + plot + _AXIS_PIXELS + legend_pixels
    layout: dict[str, Any] = {
        "height": round(height),
        "margin": {"l": 66, "r": 18, "t": above, "b": round(height - plot - above)},
        "barmode": "overlay",
        "hovermode": "closest",
        "showlegend": legend > 0,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": -_AXIS_PIXELS / plot, "yanchor": "top"},
        "annotations": [],
    }
    for place, panel in enumerate(chart.panels):
        row, column = divmod(place, columns)
        across, down = _across(column, columns), _down(row, rows, panel_pixels, plot)
        first = row * columns + 1
        name = _number(place + 1)
        layout[f"xaxis{name}"] = {**_axis(panel.x, 4 if columns > 1 else 8), "domain": across, "anchor": f"y{name}"}
        y = {**_axis(panel.y, 8), "domain": down, "anchor": f"x{name}"}
        if column:
            y |= {"matches": f"y{_number(first)}", "showticklabels": False}
            del y["title"]
        layout[f"yaxis{name}"] = y
        if panel.title:
            layout["annotations"].append(_title(panel.title, across[0], down[1]))
    return layout


def _across(column: int, columns: int) -> list[float]:
    gap = 0.05 if columns > 1 else 0.0
    width = (1.0 - gap * (columns - 1)) / columns
    start = column * (width + gap)
    return [round(start, 4), round(min(start + width, 1.0), 4)]


def _down(row: int, rows: int, panel_pixels: float, plot: float) -> list[float]:
    top = 1.0 - row * (panel_pixels + _TITLE_PIXELS) / plot
    return [round(max(top - panel_pixels / plot, 0.0), 4), round(top, 4)]


def _title(text: str, x: float, y: float) -> dict[str, Any]:
    place = {"xref": "paper", "yref": "paper", "x": x, "y": y, "xanchor": "left", "yanchor": "bottom"}
    return {**place, "text": f"<b>{text}</b>", "showarrow": False, "yshift": 4}


def _axis(axis: Axis, most_ticks: int) -> dict[str, Any]:
    title = {"text": axis.title.replace("\n", "<br>"), "standoff": 8, "font": {"size": 13}}
    if axis.ticks:
        words = [word.replace("\n", "<br>") for word in axis.ticks]
        places = {"tickmode": "array", "tickvals": list(range(len(words))), "ticktext": words}
        return {"title": title, **places, "range": [len(words) - 0.5, -0.5], "automargin": True, "zeroline": False}
    found: dict[str, Any] = {"title": title, "automargin": True, "zeroline": False}
    if axis.log:
        ticks = log_ticks(axis, most_ticks)
        found |= {"type": "log", "tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    elif axis.integer:
        found |= {"tickformat": "d"}
    if axis.low is not None and axis.high is not None:
        ends = [axis.low, axis.high]
        found["range"] = [math.log10(end) for end in ends] if axis.log else ends
    return found
