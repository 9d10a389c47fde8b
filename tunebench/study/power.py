"""What difference between two arms the planned seeds can tell from chance."""

from __future__ import annotations

import math

from scipy import optimize, stats

POWER = 0.8
"""Probability with which a planned or wanted number of seeds shows a difference."""
LEVEL = 0.05


def paired_power(difference: float, deviation: float, seeds: int, level: float = LEVEL) -> float:
    """Probability that a paired t interval over seeds leaves out 0 on the right side: the theoretical limit.

    Args:
        difference: true mean difference.
        deviation: standard deviation of the paired differences, the same unit, above 0.
        seeds: number of pairs, two or more.
        level: probability that the interval leaves out a difference of 0.
    """
    critical = stats.t.ppf(1.0 - 0.5 * level, seeds - 1)
    return float(stats.nct.sf(critical, seeds - 1, abs(difference) / deviation * math.sqrt(seeds)))


def smallest_difference(seeds: int, power: float = POWER, level: float = LEVEL) -> float:
    """The smallest true difference of two arms that `seeds` paired seeds resolve, in seed standard deviations.

    For a two-sided paired t test. Errors of two arms with one seed are taken as independent, so their difference has
    sqrt(2) seed standard deviations; seeds that both arms share make it smaller. Infinite below two seeds.

    Args:
        seeds: pairs.
        power: probability to see the difference.
        level: probability to see one that is not there.
    """
    if seeds < 2:
        return math.inf

    def excess(shift: float) -> float:
        return paired_power(shift, math.sqrt(seeds), seeds, level) - power  # the other tail adds less than 1e-6

    shift = optimize.brentq(excess, 0.0, 40.0)  # two seeds need 16, and scipy's tails are exact this far
    return float(shift * math.sqrt(2.0 / seeds))
