"""A picture of how a workload's arms stand while the run goes on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from analysis.figure_style import WIDTH_INCHES, figure_style, look
from tunebench.study.arm_history import Standing

_HEIGHT_INCHES, _HEIGHT_PER_ARM_INCHES = 1.0, 0.28
_DPI = 120.0  # 840 pixels wide: a page of TensorBoard shows it whole
_TICKS = 8  # of any range, wide or narrow


def ranking_picture(standings: Sequence[Standing], title: str) -> Figure:
    """Arms from the best down to the worst over validation objectives, lower is better.

    Open: the best of the search, whichever seed and step it had. Small and filled: seeds of the best confirmed
    configuration; the bar is their mean.

    Args:
        standings: in the order of the picture.
        title: what is shown, and how far the run is.
    """
    names = sorted(standing.optimizer for standing in standings)
    with figure_style():
        height = _HEIGHT_INCHES + _HEIGHT_PER_ARM_INCHES * len(standings)
        figure = Figure(figsize=(WIDTH_INCHES, height), dpi=_DPI, layout="constrained")
        axes = figure.subplots()
        for place, standing in enumerate(standings):
            own = look(standing.optimizer, names)
            style: dict[str, Any] = {"color": own.light, "marker": own.marker}
            if standing.found is not None:
                axes.plot(standing.found, place, **style, markersize=7.0, markerfacecolor="none", linestyle="none")
            axes.plot(standing.confirmed, [place] * len(standing.confirmed), **style, linestyle="none", alpha=0.6)
            if standing.confirmed:
                axes.plot(standing.objective, place, marker="|", markersize=14.0, color=own.light)
        axes.set_yticks(range(len(standings)), [_label(standing) for standing in standings])
        axes.set_ylim(len(standings) - 0.5, -0.5)
        if any(0.0 < standing.objective < math.inf for standing in standings):  # before that there is nothing to scale
            axes.set_xscale("log")
            ticks = {float(f"{tick:.2g}") for tick in np.geomspace(*axes.get_xlim(), _TICKS)}
            axes.set_xticks(sorted(ticks), [f"{tick:g}" for tick in sorted(ticks)])
            axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(axis="x")
        axes.set_title(title, loc="left")
        axes.set_xlabel(
            "validation objective, lower is better. Open: best of the search; filled: confirmed seeds, bar: their mean"
        )
    return figure


def _label(standing: Standing) -> str:
    failed = f" ({standing.failed} failed)" if standing.failed else ""
    return f"{standing.optimizer}{failed}"
