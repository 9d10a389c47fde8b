"""Sentinels: configurations that early stopping may not touch, drawn before anything is known of them (rule F13)."""

from __future__ import annotations

import math

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
    order = np.random.default_rng(named_seed(root, "sentinels", workload)).permutation(trials)
    return frozenset(int(index) for index in order[: sentinel_count(asha, trials)])
