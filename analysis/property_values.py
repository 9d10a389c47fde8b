"""What the properties of an arm's models are, beside what they should be, in their own units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.arm_result import ArmResult
from analysis.levels import Level, level_of
from analysis.load import Run
from analysis.model_metrics import About, entries_of, rows_of_arms

CURVE_DIFFERENCE = ".rmse"


@dataclass(frozen=True, kw_only=True)
class QuantityValues:
    """One scalar of one property over the models of a workload.

    Attributes:
        reference: what it should be.
        values: by optimizer and seed index of the selected configuration; a failed property has none.
        models: by optimizer, how many have the property, failed ones included.
    """

    entry: str
    quantity: str
    about: About
    unit: str
    reference: float
    values: dict[str, dict[int, float]]
    models: dict[str, int]

    def level(self, optimizer: str) -> Level | None:
        """Over the seeds that have a value; None where none has."""
        values = np.array(list(self.values.get(optimizer, {}).values()), dtype=np.float64)
        return level_of(values, self.models.get(optimizer, 0) - len(values))


def quantity_values(run: Run, workload: str, arms: Sequence[ArmResult]) -> tuple[QuantityValues, ...]:
    """Every scalar that has a reference, in the order of the study; differences of curves are errors, no values."""
    abouts = entries_of(run, workload)
    found: dict[tuple[str, str], QuantityValues] = {}
    for optimizer, models in rows_of_arms(run, workload, arms).items():
        for model in models:
            for row in model.plain:
                if row.reference is None or row.quantity.endswith(CURVE_DIFFERENCE) or row.entry not in abouts:
                    continue
                known = found.setdefault(
                    (row.entry, row.quantity),
                    QuantityValues(
                        entry=row.entry,
                        quantity=row.quantity,
                        about=abouts[row.entry],
                        unit=row.unit,
                        reference=row.reference,
                        values={},
                        models={},
                    ),
                )
                known.models[optimizer] = known.models.get(optimizer, 0) + 1
                if row.value is not None:
                    known.values.setdefault(optimizer, {})[model.trial.key.seed_index] = row.value
    return tuple(sorted(found.values(), key=lambda one: list(abouts).index(one.entry)))
