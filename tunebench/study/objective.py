"""The study's objective and its readout policy, the same for engines and analysis. Imports neither torch nor Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping

from tunebench.study.record import Readout
from tunebench.study.spec import Objective

QUANTITIES = ("energy_per_atom", "forces", "stress")


def objective_value(metrics: Mapping[str, float], objective: Objective) -> float:
    """Weighted sum of one split's errors with one readout; lower is better.

    A quantity without labels is absent from `metrics` and left out. Infinite where an error is not finite, or where
    nothing is left to sum.

    Args:
        metrics: metric -> value in eV/atom, eV/Å and eV/Å³.
        objective: weights and metric of the study.
    """
    weights = {name: float(getattr(objective, name)) for name in QUANTITIES}
    errors = {name: metrics.get(f"{name}_{objective.metric}") for name in QUANTITIES}
    terms = [weights[name] * value for name, value in errors.items() if value is not None and weights[name] > 0]
    total = math.fsum(terms) if all(map(math.isfinite, terms)) else math.inf
    return total if terms else math.inf


def selected_readout(objectives: Mapping[str, float], objective: Objective) -> str | None:
    """The readout that counts under the study's policy, alike for every arm (rule F8).

    Args:
        objectives: objective by readout: raw, and the arm's averaged one (EMA or schedule-free).
        objective: holds the policy; ``best`` is the readout with the lower objective.

    Returns:
        None where no allowed readout was measured.
    """
    averaged = {Readout.EMA.value, Readout.SCHEDULE_FREE.value}
    allowed = {"raw": {Readout.RAW.value}, "averaged": averaged, "best": {Readout.RAW.value, *averaged}}
    candidates = sorted(set(objectives) & allowed[objective.readout])
    return min(candidates, key=lambda readout: (objectives[readout], readout)) if candidates else None
