"""Error against device-seconds: fast but worse and slow but better optimizers are both answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from analysis.statistics import Floats


@dataclass(frozen=True, kw_only=True)
class ParetoPoint:
    """One arm: its error (eV/Å, lower is better) and the device-seconds of one full training run.

    Attributes:
        calibrated: device-seconds are solo step time times steps; else they are what confirm trials really spent on
            steps up to the horizon.
        alone: those are seconds of steps made alone, which tell optimizers apart; a slot's share of a cohort's step
            does not.
        on_front: no other arm is at least as good in both and better in one.
        dominated_by: arms that are.
    """

    optimizer: str
    error: float
    device_s: float
    calibrated: bool
    alone: bool
    on_front: bool
    dominated_by: tuple[str, ...]


def pareto_front(
    errors: Mapping[str, float], device_s: Mapping[str, float], *, calibrated: bool, alone: bool
) -> tuple[ParetoPoint, ...]:
    """Points of all arms with a cost, cheapest first.

    Args:
        errors: error by optimizer, ``inf`` where it failed.
        device_s: device-seconds of a full run by optimizer.
        calibrated: whether those seconds are steps times solo step times.
        alone: whether they are of steps made alone, not shares of a cohort's steps.
    """
    names = sorted((name for name in errors if name in device_s), key=lambda name: (device_s[name], errors[name], name))
    table = np.array([[errors[name], device_s[name]] for name in names], dtype=np.float64).reshape(len(names), 2)
    dominates = _dominates(table)
    return tuple(
        ParetoPoint(
            optimizer=name,
            error=errors[name],
            device_s=device_s[name],
            calibrated=calibrated,
            alone=alone,
            on_front=not dominates[:, place].any() and np.isfinite(errors[name]).item(),
            dominated_by=tuple(names[other] for other in np.flatnonzero(dominates[:, place])),
        )
        for place, name in enumerate(names)
    )


def dominated(table: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Whether another row is at least as good in both columns (lower is better) and better in one, shape (rows,)."""
    return np.asarray(_dominates(table).any(axis=0))


def _dominates(table: Floats) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Whether row i is at least as good as row j in both columns and better in one, shape (rows, rows)."""
    no_worse = (table[:, None, :] <= table[None, :, :]).all(axis=-1)
    better = (table[:, None, :] < table[None, :, :]).any(axis=-1)
    return np.asarray(no_worse & better)
