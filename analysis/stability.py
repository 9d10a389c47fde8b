"""Does the order of the optimizers depend on who else takes part?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.profiles import ratios, score
from analysis.statistics import Floats

Order = Callable[[Mapping[str, Floats]], Sequence[str]]
"""Optimizers' values by workload, each of shape (workloads,) -> names, best first."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """The order without one optimizer, and the pairs that changed places by its absence."""

    without: str
    order: tuple[str, ...]
    swapped: tuple[tuple[str, str], ...]


def leave_one_out(values: Mapping[str, Floats], order: Order) -> tuple[LeftOut, ...]:
    """Order the optimizers anew without each of them in turn; none where there are fewer than three.

    Args:
        values: by optimizer, shape (workloads,), ``inf`` for failures and misses.
        order: how they are ordered.
    """
    full = list(order(values))
    if len(full) < 3:
        return ()
    return tuple(
        _left_out(
            name, [other for other in full if other != name], order({o: v for o, v in values.items() if o != name})
        )
        for name in full
    )


def by_profile_score(times: Mapping[str, Floats]) -> tuple[str, ...]:
    """Order by the exact profile score on times to target, higher first, names breaking ties."""
    names = list(times)
    scores = score(ratios(np.stack([times[name] for name in names])))
    return tuple(sorted(names, key=lambda name: (-scores[names.index(name)], name)))


def _left_out(without: str, before: Sequence[str], after: Sequence[str]) -> LeftOut:
    place = {name: index for index, name in enumerate(after)}
    swapped = [
        (first, second)
        for index, first in enumerate(before)
        for second in before[index + 1 :]
        if place[first] > place[second]
    ]
    return LeftOut(without=without, order=tuple(after), swapped=tuple(swapped))
