"""Sentinels: configurations that early stopping may not touch, drawn before anything is known of them (rule F13)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from tunebench.study.seeds import named_seed
from tunebench.study.spec import Asha

SMALLEST_SHARE = 0.15
FEWEST = 8


def sentinel_count(asha: Asha | None, trials: int) -> int:
    """Sentinels of an arm with so many trials: what the study says, else 15 % of them, at least 8, at most all."""
    if asha is None:
        return 0
    wanted = max(math.ceil(SMALLEST_SHARE * trials), FEWEST) if asha.sentinels == "auto" else asha.sentinels
    return min(int(wanted), trials)


def sentinel_configurations(asha: Asha | None, trials: int, root: int, workload: str) -> frozenset[int]:
    """Indices of the configurations that are sentinels, the same in every arm of a workload.

    Args:
        asha: how the study stops; None has no sentinels.
        trials: configurations of an arm.
        root: the study's seed; the draw has the named seed ``sentinels``.
        workload: its name.
    """
    order = _order(trials, root, workload)
    return frozenset(order[: sentinel_count(asha, trials)])


def grown_sentinels(
    asha: Asha | None, sizes: Mapping[int, int], root: int, workload: str, *, budget: int = 1
) -> frozenset[int]:
    """Indices of the sentinels of an arm that a cap cut short, or that was extended, or both.

    At its start an arm has as many as an arm of a study with so few configurations would have, drawn among its own: all
    those of the full study would leave a dear arm nothing to search. Each extension adds sentinels for its share of all
    configurations, drawn among the new ones. So an arm has its share of sentinels at any time, and who was drawn stays
    one. An audit starts with the sentinels of the arm that it audits, and each extension gives it as many as that.

    Args:
        asha: how the study stops; None has no sentinels.
        sizes: configurations of the arm by those that it would have without a cap, at the start and after each
            extension.
        root: the study's seed; the draw has the named seed ``sentinels``.
        workload: its name.
        budget: how many times the configurations of another arm an audit has.
    """
    found: set[int] = set()
    wanted_before = has_before = 0
    for wanted, has in sorted(sizes.items()):
        if has_before:
            new = [index for index in _order(wanted, root, workload) if has_before <= index < has]
        else:
            new = [index for index in _order(wanted // budget, root, workload) if index < has // budget]
        share = (wanted - wanted_before) / wanted
        found.update(new[: math.ceil(share * sentinel_count(asha, has // budget))])
        wanted_before, has_before = wanted, has
    return frozenset(found)


def _order(trials: int, root: int, workload: str) -> list[int]:
    draw = np.random.default_rng(named_seed(root, "sentinels", workload))
    return [int(index) for index in draw.permutation(trials)]
