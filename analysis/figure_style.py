"""One look for every figure: fonts, one colour and marker per optimizer in all of them, file formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from tunebench.study.record import Reason

WIDTH_INCHES = 7.0
"""Text width of a two-column page."""
FORMATS = ("png", "pdf", "svg")

# Okabe and Ito (2008) for the arms most often compared, Tol (2021, muted) for the rest: safe for colour-blind readers.
_COLOURS = {
    "adamw": "#0072B2",
    "soap": "#D55E00",
    "muon": "#E69F00",
    "schedule_free": "#009E73",
    "adam": "#56B4E9",
    "radam": "#CC79A7",
    "sgd": "#777777",
    "lamb": "#999933",
    "ranger": "#882255",
    "soap_muon": "#332288",
}
_MARKERS = {
    "adamw": "o",
    "soap": "s",
    "muon": "^",
    "schedule_free": "D",
    "adam": "v",
    "radam": "P",
    "sgd": "X",
    "lamb": "<",
    "ranger": ">",
    "soap_muon": "p",
}
_SPARE_COLOURS = ("#000000", "#44AA99", "#DDCC77", "#AA4499", "#661100")
_SPARE_MARKERS = ("h", "*", "H", "d", "8")

REASON_COLOURS = {
    Reason.FINISHED: "#4D7FA8",
    Reason.STOPPED_ASHA: "#BFD3E2",
    Reason.DIVERGED: "#B2182B",
    Reason.OOM: "#EF8A62",
    Reason.CRASHED: "#67001F",
    Reason.PREEMPTED: "#FDDBC7",
    Reason.TIMED_OUT: "#8C6D31",
    Reason.MISMATCHED: "#762A83",
}
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
    "pdf.fonttype": 42,  # embedded as text, as journals ask
    "svg.fonttype": "none",
    "svg.hashsalt": "tunebench",  # the same data give the same file
}


def colour(optimizer: str, optimizers: Sequence[str]) -> str:
    """Colour of an optimizer; one that has none of its own gets a spare by its place among ``optimizers``."""
    return _COLOURS.get(optimizer) or _SPARE_COLOURS[_spare(optimizer, optimizers) % len(_SPARE_COLOURS)]


def marker(optimizer: str, optimizers: Sequence[str]) -> str:
    """Marker of an optimizer, so that colour is never the only difference."""
    return _MARKERS.get(optimizer) or _SPARE_MARKERS[_spare(optimizer, optimizers) % len(_SPARE_MARKERS)]


def _spare(optimizer: str, optimizers: Sequence[str]) -> int:
    return [name for name in optimizers if name not in _COLOURS].index(optimizer)


@contextmanager
def figure_style() -> Iterator[None]:
    """The figures' settings, starting from matplotlib's defaults whatever the user's own configuration says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure as NAME.png for the page and as NAME.pdf and NAME.svg for papers, without a date inside."""
    folder.mkdir(parents=True, exist_ok=True)
    dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {"Software": None}}
    for kind in FORMATS:
        figure.savefig(folder / f"{name}.{kind}", metadata=dates[kind])
        # The layout of the first one stands: finding it is half of the time that drawing takes.
        figure.set_layout_engine("none")
