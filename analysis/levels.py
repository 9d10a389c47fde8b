"""A number over the seeds of an arm with its interval and its failures, and how tables show it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.seed_intervals import seed_interval
from analysis.statistics import Floats, Interval, iqm
from analysis.wording import ABSENT, MINUS, number


@dataclass(frozen=True, kw_only=True)
class Level:
    """A number over seeds.

    Attributes:
        iqm: interquartile mean.
        interval: its 95 % interval, studentized; ``None`` for fewer than three seeds with a number.
        n_seeds: seeds, failed ones included. n_failed: of them.
    """

    iqm: float
    interval: Interval | None
    n_seeds: int
    n_failed: int


def level_of(values: Floats, n_absent: int = 0) -> Level | None:
    """The level of seeds; None where no seed has a number.

    Args:
        values: of shape (seeds,), ``inf`` for a failed one.
        n_absent: further failed seeds, whose failure has no number.
    """
    if not len(values):
        return None
    return Level(
        iqm=float(iqm(values)),
        interval=seed_interval(values),
        n_seeds=len(values) + n_absent,
        n_failed=int(np.isinf(values).sum()) + n_absent,
    )


def level_words(level: Level | None, digits: int = 4) -> str:
    """A number with its interval and its failures; a dash where there is none."""
    if level is None:
        return ABSENT
    interval = level.interval
    words = number(level.iqm, digits)
    words += f" [{number(interval.low, digits)}, {number(interval.high, digits)}]" if interval else ""
    return words.replace("-", MINUS) + (f" ✗ {level.n_failed} of {level.n_seeds}" if level.n_failed else "")
