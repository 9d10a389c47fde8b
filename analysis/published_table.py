"""Re-analysis of published means and standard deviations, where the values of the single seeds are not public."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from scipy import stats

from analysis.workload_tests import holm

LEVEL = 0.05


class Effect(StrEnum):
    """GAIN: lower error than the baseline beyond chance. LOSS: higher. UNDECIDED: neither survives."""

    GAIN = "gain"
    LOSS = "loss"
    UNDECIDED = "undecided"


@dataclass(frozen=True, kw_only=True)
class PublishedCell:
    """One optimizer's published error against the baseline's in the same cell of a table, lower is better.

    Attributes:
        name: what the cell is about.
        mean, deviation: of the optimizer over seeds; the deviation is taken as the sample standard deviation.
        baseline_mean, baseline_deviation: of the baseline. seeds: number of seeds of both.
    """

    name: str
    mean: float
    deviation: float
    baseline_mean: float
    baseline_deviation: float
    seeds: int


@dataclass(frozen=True, kw_only=True)
class Reanalysed:
    """A cell with its relative change, raw and adjusted p, and what may be said."""

    cell: PublishedCell
    change: float
    p: float
    adjusted_p: float
    effect: Effect


def reanalyse(cells: Sequence[PublishedCell]) -> tuple[Reanalysed, ...]:
    """Welch's t from means and deviations in every cell, then Holm over all cells of the table.

    Unpaired: seeds may be paired, but a table does not say so, which is conservative where seeds correlate.

    Raises:
        ValueError: a cell with fewer than two seeds or with a deviation below 0.
    """
    for cell in cells:
        if cell.seeds < 2 or min(cell.deviation, cell.baseline_deviation) < 0.0:
            raise ValueError(f"{cell.name}: found {cell.seeds} seeds or a negative deviation, allowed: 2 and 0 or more")
    p_values = [_welch(cell) for cell in cells]
    return tuple(
        Reanalysed(
            cell=cell,
            change=cell.mean / cell.baseline_mean - 1.0,
            p=p,
            adjusted_p=adjusted,
            effect=_effect(cell, adjusted),
        )
        for cell, p, adjusted in zip(cells, p_values, holm(p_values), strict=True)
    )


def _welch(cell: PublishedCell) -> float:
    return float(
        stats.ttest_ind_from_stats(
            cell.mean,
            cell.deviation,
            cell.seeds,
            cell.baseline_mean,
            cell.baseline_deviation,
            cell.seeds,
            equal_var=False,
        ).pvalue
    )


def _effect(cell: PublishedCell, adjusted_p: float) -> Effect:
    if not adjusted_p <= LEVEL:
        return Effect.UNDECIDED
    return Effect.GAIN if cell.mean < cell.baseline_mean else Effect.LOSS
