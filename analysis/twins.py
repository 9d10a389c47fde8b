"""Fine-tuned against from scratch: workloads that differ in their initial weights, optimizer by optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from analysis.levels import Level, level_of
from analysis.load import Run
from analysis.model_metrics import model_metrics, unmeasured
from analysis.property_values import QuantityValues, quantity_values
from analysis.ranking import Ranking, WorkloadRanking
from analysis.seed_intervals import Estimate, estimate, interval_of, p_value, widened
from analysis.statistics import MINIMUM_RUNS, Floats, Interval
from analysis.workload_tests import holm
from tunebench.study.record import Metric, Split
from tunebench.study.spec import Study, Workload

_MAY_DIFFER = ("name", "init", "model")
_TEST_ERRORS = {
    Metric.FORCES_MAE: ("test force MAE", "meV/Å"),
    Metric.ENERGY_PER_ATOM_MAE: ("test energy MAE", "meV/atom"),
    Metric.STRESS_MAE: ("test stress MAE", "meV/Å³"),
}
_MILLI = 1000.0

Seeds = Mapping[int, float]


@dataclass(frozen=True, kw_only=True)
class TwinError:
    """One error of one optimizer, lower is better.

    Attributes:
        tuned, scratch: of the two workloads.
        difference: fine-tuned minus from scratch, negative where fine-tuning is better; ``None`` where failures or
            fewer than three seeds leave none that can be judged.
        interval: its 95 % interval over seeds. p: two-sided, adjusted by Holm over all rows of the pair.
    """

    error: str
    unit: str
    optimizer: str
    tuned: Level | None
    scratch: Level | None
    difference: float | None
    interval: Interval | None
    p: float | None


@dataclass(frozen=True, kw_only=True)
class TwinValue:
    """One scalar of a property under one optimizer, in its own unit."""

    quantity: str
    unit: str
    reference: float
    optimizer: str
    tuned: Level | None
    scratch: Level | None


@dataclass(frozen=True, kw_only=True)
class Twins:
    """A workload that starts from a trained model beside one on the same data that does not.

    Attributes:
        incomplete: one line for each model that lacks properties.
    """

    tuned: str
    scratch: str
    incomplete: tuple[str, ...]
    errors: tuple[TwinError, ...]
    values: tuple[TwinValue, ...]


def twins(run: Run, ranking: Ranking) -> tuple[Twins, ...]:
    """All pairs of a study: the same data, loss, labels, batches and horizon, a model of the same family and cutoff."""
    by_name = {workload.workload: workload for workload in ranking.workloads}
    return tuple(_twins(run, by_name[tuned], by_name[scratch]) for tuned, scratch in twin_names(run.study))


def twin_names(study: Study) -> list[tuple[str, str]]:
    """Names of fine-tuned workloads and of their twins from scratch."""
    started = [workload for workload in study.workloads if workload.init is not None]
    others = [workload for workload in study.workloads if workload.init is None]
    return [(one.name, other.name) for one, other in product(started, others) if _alike(one, other)]


def _alike(one: Workload, other: Workload) -> bool:
    same = all(getattr(one, key) == getattr(other, key) for key in Workload.model_fields if key not in _MAY_DIFFER)
    kinds = {(w.model.family, w.model.r_max_angstrom, w.model.dtype) for w in (one, other)}
    return same and len(kinds) == 1


def _twins(run: Run, tuned: WorkloadRanking, scratch: WorkloadRanking) -> Twins:
    ours, theirs = _errors(run, tuned), _errors(run, scratch)
    rows = [
        _error(*key, optimizer, seeds, theirs[key][optimizer])
        for key in ours
        if key in theirs
        for optimizer, seeds in ours[key].items()
        if optimizer in theirs[key]
    ]
    adjusted = iter(holm([row.p for row in rows if row.p is not None]))
    return Twins(
        tuned=tuned.workload,
        scratch=scratch.workload,
        incomplete=tuple(line for one in (tuned, scratch) for line in unmeasured(run, one.workload, one.arms)),
        errors=tuple(row if row.p is None else replace(row, p=next(adjusted)) for row in rows),
        values=tuple(_values(*(quantity_values(run, one.workload, one.arms) for one in (tuned, scratch)))),
    )


def _errors(run: Run, workload: WorkloadRanking) -> dict[tuple[str, str], dict[str, Seeds]]:
    """Errors by name and unit, optimizer and seed: on the test split, elsewhere, and of properties."""
    found: dict[tuple[str, str], dict[str, Seeds]] = {}
    for metric, (name, unit) in _TEST_ERRORS.items():
        summaries = {arm.optimizer: arm.summary(Split.TEST, metric) for arm in workload.arms}
        measured = {optimizer: summary.values for optimizer, summary in summaries.items() if summary is not None}
        if measured:
            found[name, unit] = {o: {s: _MILLI * e for s, e in own.items()} for o, own in measured.items()}
    for other in model_metrics(run, workload.workload, workload.arms):
        found[other.name, other.unit] = dict(other.values)
    return found


def _error(name: str, unit: str, optimizer: str, tuned: Seeds, scratch: Seeds) -> TwinError:
    ours, theirs = (np.array(list(seeds.values()), dtype=np.float64) for seeds in (tuned, scratch))
    difference = _difference(ours, theirs)
    return TwinError(
        error=name,
        unit=unit,
        optimizer=optimizer,
        tuned=level_of(ours),
        scratch=level_of(theirs),
        difference=None if difference is None else float(difference.centre),
        interval=None if difference is None else interval_of(difference),
        p=None if difference is None else float(p_value(difference)),
    )


def _difference(first: Floats, second: Floats) -> Estimate | None:
    """First minus second of independent runs, by Welch; None where failures or too few runs leave no error."""
    if min(len(first), len(second)) < MINIMUM_RUNS:
        return None
    own, other = estimate(first), estimate(second)
    apart = widened(own, np.square(other.error), float(other.degrees))
    centre = own.centre - other.centre if np.isfinite(own.centre) and np.isfinite(other.centre) else None
    return None if centre is None or not np.isfinite(apart.error) else replace(apart, centre=np.asarray(centre))


def _values(tuned: Sequence[QuantityValues], scratch: Sequence[QuantityValues]) -> Iterator[TwinValue]:
    others = {(other.entry, other.quantity): other for other in scratch}
    for one in tuned:
        other = others.get((one.entry, one.quantity))
        if other is None or other.reference != one.reference:
            continue
        for optimizer in one.models:
            yield TwinValue(
                quantity=f"{one.entry} {one.quantity}",
                unit=one.unit,
                reference=one.reference,
                optimizer=optimizer,
                tuned=one.level(optimizer),
                scratch=other.level(optimizer),
            )
