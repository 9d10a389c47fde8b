"""What would resolve an open question: seeds for a difference, seeds for a tie, workloads for a general claim."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy import stats

from tunebench.study.power import POWER, paired_power

MOST = 1000
"""Numbers above this one are no advice and are not given."""
EQUIVALENCE_TAIL = 0.95
"""Two one-sided tests at 5 % each: a 90 % interval inside the margins."""
WILCOXON_EFFICIENCY = 3.0 / math.pi
"""Asymptotic efficiency of Wilcoxon's test against Student's for normal differences (Hodges and Lehmann 1956)."""


def seeds_to_resolve(difference: float, deviation: float, power: float = POWER) -> int | None:
    """Paired seeds at which a difference is shown with the wanted power; ``None`` above a thousand or if it is 0."""
    return _smallest(lambda seeds: paired_power(difference, deviation, seeds) >= power, difference, deviation)


def seeds_to_equivalence(difference: float, deviation: float, margin: float, power: float = POWER) -> int | None:
    """Paired seeds at which the interval fits into ``±margin`` with the wanted power; ``None`` if it never would.

    The distance left is that from the difference to the nearer margin; the interval's half-width and its scatter must
    fit into it (Schuirmann 1987, normal approximation with Student's quantiles).
    """
    room = margin - abs(difference)
    if not room > 0.0:
        return None

    def fits(seeds: int) -> bool:
        quantiles = stats.t.ppf(EQUIVALENCE_TAIL, seeds - 1) + stats.t.ppf(0.5 + 0.5 * power, seeds - 1)
        return float(quantiles) * deviation / math.sqrt(seeds) <= room

    return _smallest(fits, room, deviation)


def workloads_to_resolve(mean: float, deviation: float, smallest: int, power: float = POWER) -> int | None:
    """Workloads at which Wilcoxon's test shows a mean log ratio with the wanted power; ``None`` above a thousand.

    Args:
        mean: mean over workloads of the log ratio of errors.
        deviation: its standard deviation over workloads.
        smallest: number below which the test cannot reject.
        power: wanted probability.
    """
    found = _smallest(
        lambda number: paired_power(mean, deviation, max(int(number * WILCOXON_EFFICIENCY), 2)) >= power,
        mean,
        deviation,
    )
    return None if found is None else max(found, smallest)


def _smallest(enough: Callable[[int], bool], effect: float, deviation: float) -> int | None:
    """The smallest number from 2 to `MOST` that is enough, by bisection."""
    if effect == 0.0 or not math.isfinite(effect) or not math.isfinite(deviation):
        return None
    if deviation == 0.0:
        return 2
    if not enough(MOST):
        return None
    low, high = 1, MOST
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
