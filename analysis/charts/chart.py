"""A chart as data: panels with axes and marks. Every number that is drawn stands here once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from analysis.figure_style import Look
from analysis.statistics import Floats


class Kind(StrEnum):
    """LINE joins its points, STEPS holds each until the next, DOTS stand alone, BARS lie from `low` to `high`."""

    LINE = "line"
    STEPS = "steps"
    DOTS = "dots"
    BARS = "bars"


class Fill(StrEnum):
    """How dots look: FULL, HOLLOW, a CROSS for what has no value, or FAINT and small behind others."""

    FULL = "full"
    HOLLOW = "hollow"
    CROSS = "cross"
    FAINT = "faint"


class Along(StrEnum):
    """Axis along which `low` and `high` of a mark lie."""

    X = "x"
    Y = "y"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis: title with unit, scale, range.

    Attributes:
        low, high: range, in the unit of the data; ``None`` leaves it to the data, but not on a logarithmic axis.
        ticks: places with words, in place of numbers; the first one on top of a vertical axis.
        integer: ticks at whole numbers only.
    """

    title: str
    log: bool = False
    low: float | None = None
    high: float | None = None
    ticks: tuple[str, ...] = ()
    integer: bool = False


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What is drawn of one series in one panel.

    Attributes:
        label: the series, as the legend says it; marks of one label belong together over all panels.
        x, y: places, shape (points,); infinite ones stand in the table and are not drawn.
        low, high: ends of a band (lines), of an interval (dots) or of a bar, shape (points,).
        along: axis of these ends.
        words: what a pointer shows of each point; empty for nothing.
        key: whether the legend names the label.
    """

    kind: Kind
    label: str
    look: Look
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    along: Along = Along.Y
    fill: Fill = Fill.FULL
    words: tuple[str, ...] = ()
    key: bool = True


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes with its marks, drawn in their order."""

    x: Axis
    y: Axis
    marks: tuple[Mark, ...]
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure of the report.

    Attributes:
        name: part of file names, for example ``ethanol-nequip-errors``.
        title: what it shows, in a few words. caption: how to read it.
        panels: left to right, then down, `columns` in a row; y axes of a row share their range.
        height: of a row of panels, in lines of text.
    """

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...]
    columns: int
    height: float = 15.0

    @property
    def rows(self) -> int:
        """Rows of panels."""
        return math.ceil(len(self.panels) / self.columns)

    @property
    def labels(self) -> tuple[Mark, ...]:
        """The first mark of every label that the legend names."""
        first: dict[str, Mark] = {}
        for panel in self.panels:
            for mark in panel.marks:
                if mark.key:
                    first.setdefault(mark.label, mark)
        return tuple(first.values())


# Ticks of a decade, from the closest together to the decade alone.
_LOG_PARTS: tuple[tuple[float, ...], ...] = (
    tuple(part / 20.0 for part in range(20, 200)),
    tuple(part / 10.0 for part in range(10, 100)),
    (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 9.0),
    (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0),
    (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
    (1.0, 2.0, 5.0),
    (1.0, 3.0),
    (1.0,),
)
CSV_COLUMNS = ("panel", "series", "kind", "x_axis", "y_axis", "x", "y", "low", "high", "words")


def chart_rows(chart: Chart) -> Iterator[tuple[object, ...]]:
    """The chart's table: one row per point, columns `CSV_COLUMNS`, in the units of the axes."""
    for place, panel in enumerate(chart.panels, start=1):
        name = panel.title or str(place)
        for mark in panel.marks:
            kind = mark.kind.value if mark.kind is not Kind.DOTS else f"{mark.kind} {mark.fill}"
            ends = [_column(values, len(mark.x)) for values in (mark.low, mark.high)]
            words = mark.words or ("",) * len(mark.x)
            for row in zip(mark.x.tolist(), mark.y.tolist(), *ends, words, strict=True):
                yield (name, mark.label, kind, panel.x.title, _one_line(panel.y.title), *row)


def _column(values: Floats | None, length: int) -> Sequence[float | None]:
    return [None] * length if values is None else values.tolist()


def _one_line(title: str) -> str:
    return " ".join(title.split())


def log_ticks(axis: Axis, most: int = 8) -> list[float]:
    """At most so many round numbers between the ends of a logarithmic axis, as close together as that allows."""
    assert axis.low is not None
    assert axis.high is not None
    low, high = axis.low * (1.0 - 1e-9), axis.high * (1.0 + 1e-9)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside: list[float] = []
    for parts in _LOG_PARTS:
        places = (float(f"{part:.6g}e{decade}") for decade in decades for part in parts)
        inside = [place for place in places if low <= place <= high and (place.is_integer() or not axis.integer)]
        if len(inside) <= most:
            return inside
    return inside[:: math.ceil(len(inside) / most)]


def limits(values: Iterable[float], *, log: bool, margin: float = 0.05) -> tuple[float, float]:
    """A range around the finite values, with a margin on both sides; of a logarithmic axis above 0 only."""
    found = np.array([v for v in values if math.isfinite(v) and (v > 0.0 or not log)], dtype=np.float64)
    if not len(found):
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = float(found.min()), float(found.max())
    if log:
        factor = max((high / low) ** margin, 1.05)
        return low / factor, high * factor
    pad = margin * (high - low) or margin * abs(high) or 1.0
    return low - pad, high + pad
