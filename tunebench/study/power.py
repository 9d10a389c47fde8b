"""What difference between two arms the planned seeds can tell from chance."""

from __future__ import annotations

import math

from scipy import optimize, stats

ASSUMED_SEED_SD = 0.05
"""Seed-to-seed standard deviation of an arm's error as a share of the error, where the study has measured none."""
POWER = 0.8
LEVEL = 0.05


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
    critical = stats.t.ppf(1.0 - level / 2.0, seeds - 1)

    def excess(shift: float) -> float:
        return float(stats.nct.sf(critical, seeds - 1, shift) - power)  # the other tail adds less than 1e-6

    shift = optimize.brentq(excess, 0.0, 40.0)  # two seeds need 16, and scipy's tails are exact this far
    return float(shift * math.sqrt(2.0 / seeds))
