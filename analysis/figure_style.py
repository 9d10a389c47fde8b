"""One look for every figure: fonts, one look per optimizer in all of them, file formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from tunebench.study.record import Reason

WIDTH_INCHES = 7.0
"""Text width of a two-column page."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a series is told from others: a colour on white, one on a dark page, a marker and a dash.

    Attributes:
        light, dark: ``#RRGGBB`` with a contrast of at least 3 against their background.
        marker: matplotlib's letter, empty for none. dash: number of the dash pattern, 0 is a solid line.
    """

    light: str
    dark: str
    marker: str = "o"
    dash: int = 0


# After Okabe and Ito (2008) for the arms most often compared and Tol (2021, muted) for the rest, which colour-blind
# readers can tell apart; yellow and light blue are darker than theirs, so that they can be seen on white.
_LOOKS = {
    "adamw": Look(light="#0072B2", dark="#4FA8E8", marker="o", dash=0),
    "soap": Look(light="#D55E00", dark="#FF8B3D", marker="s", dash=1),
    "muon": Look(light="#A87A00", dark="#F0B92E", marker="^", dash=2),
    "schedule_free": Look(light="#00845F", dark="#2FC79A", marker="D", dash=3),
    "adam": Look(light="#3E93C4", dark="#A5DAF8", marker="v", dash=4),
    "radam": Look(light="#B9638F", dark="#EBA6CC", marker="P", dash=1),
    "sgd": Look(light="#6E6E6E", dark="#B5B5B5", marker="X", dash=2),
    "lamb": Look(light="#80802A", dark="#CFCF63", marker="<", dash=3),
    "ranger": Look(light="#882255", dark="#E3779F", marker=">", dash=4),
    "soap_muon": Look(light="#332288", dark="#AFA3FF", marker="p", dash=0),
}
_SPARE_LOOKS = (
    Look(light="#1A1A1A", dark="#F2F2F2", marker="h", dash=0),
    Look(light="#2B8A7C", dark="#62D6C4", marker="*", dash=1),
    Look(light="#917C17", dark="#E6D684", marker="H", dash=2),
    Look(light="#AA4499", dark="#E28BD3", marker="d", dash=3),
    Look(light="#661100", dark="#E38C79", marker="8", dash=4),
)
NEUTRAL = Look(light="#555555", dark="#B0B0B0")
DASHES: tuple[tuple[Any, str], ...] = (
    ("solid", "solid"),
    ((0, (6, 2)), "dash"),
    ((0, (1.2, 1.4)), "dot"),
    ((0, (6, 2, 1.2, 2)), "dashdot"),
    ((0, (10, 3)), "longdash"),
)
"""Dash patterns as matplotlib's and as Plotly's."""

REASON_LOOKS = {
    Reason.FINISHED: Look(light="#4D7FA8", dark="#5E97C6"),
    Reason.STOPPED_ASHA: Look(light="#8FB4D1", dark="#34536B"),
    Reason.DIVERGED: Look(light="#B2182B", dark="#E0566A"),
    Reason.OOM: Look(light="#DB6A42", dark="#F09B78"),
    Reason.CRASHED: Look(light="#67001F", dark="#B0496B"),
    Reason.PREEMPTED: Look(light="#C08A60", dark="#E8C9AC"),
    Reason.TIMED_OUT: Look(light="#8C6D31", dark="#C9A964"),
    Reason.MISMATCHED: Look(light="#762A83", dark="#C07ECD"),
}
UNENDED = Look(light="#FFFFFF", dark="#16191D")
REASON_WORDS = {
    Reason.FINISHED: "finished",
    Reason.STOPPED_ASHA: "stopped by ASHA",
    Reason.DIVERGED: "diverged",
    Reason.OOM: "out of memory",
    Reason.CRASHED: "crashed",
    Reason.PREEMPTED: "preempted",
    Reason.TIMED_OUT: "timed out",
    Reason.MISMATCHED: "treated other weights",
}

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.labelsize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.5,
    "xtick.labelsize": 7.0,
    "ytick.labelsize": 7.0,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7.0,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.0,
    "figure.dpi": 100.0,
    "savefig.dpi": 200.0,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "tunebench",  # the same data give the same file
}


def look(optimizer: str, optimizers: Sequence[str]) -> Look:
    """Look of an optimizer; one that has none of its own gets a spare by its place among ``optimizers``."""
    known = _LOOKS.get(optimizer)
    if known is not None:
        return known
    place = [name for name in optimizers if name not in _LOOKS].index(optimizer)
    return _SPARE_LOOKS[place % len(_SPARE_LOOKS)]


@contextmanager
def figure_style() -> Iterator[None]:
    """The figures' settings, starting from matplotlib's defaults whatever the user's own configuration says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as NAME.svg, with text as text and without a date inside."""
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
