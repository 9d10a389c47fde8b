"""Out-of-distribution errors and errors of physical properties, in one form: a number a seed, lower is better.

An error of a property is |value - reference|. Frequencies that are numbered (``X.1``, ``mode.7``) are one metric, their
mean absolute error. A property that failed, or whose trial left no model, is ``inf``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from analysis.arm_result import ArmResult
from analysis.load import Run
from analysis.model_rows import ModelRows, model_rows
from analysis.selection import confirm_candidates
from tunebench.properties.rows import PropertyRow
from tunebench.study.record import OOD_PREFIX, Metric, Split

_OOD_UNITS = {Metric.FORCES_MAE: "eV/Å", Metric.ENERGY_PER_ATOM_MAE: "eV/atom"}


class About(StrEnum):
    """What a metric is about: another distribution than the training's, or a regime of physical properties."""

    OOD = "ood"
    MOLECULE = "molecule"
    CRYSTAL = "crystal"
    LIQUID = "liquid"


@dataclass(frozen=True, kw_only=True)
class ModelMetric:
    """One error of the models of a workload.

    Attributes:
        name: for example ``ood:hot forces_mae`` or ``cu-elastic C11``.
        entry: of the property, or the split.
        unit: of the values.
        values: by optimizer and seed index of the selected configuration; ``inf`` where it failed.
        refined: likewise, of the refined weights.
    """

    name: str
    about: About
    entry: str
    unit: str
    values: dict[str, dict[int, float]]
    refined: dict[str, dict[int, float]]


@dataclass(frozen=True, kw_only=True)
class EntryFailures:
    """How often an entry failed for the models of one arm's selected configuration.

    Attributes:
        models: seeds that ended and whose entry is known. failed: of them.
        reasons: why, by trial.
    """

    entry: str
    about: About
    optimizer: str
    models: int
    failed: int
    reasons: dict[str, str]


def model_metrics(run: Run, workload: str, arms: Sequence[ArmResult]) -> tuple[ModelMetric, ...]:
    """All metrics of a workload beside its test errors: other distributions first, then properties by section."""
    rows = rows_of_arms(run, workload, arms)
    return (*_ood_metrics(arms), *_property_metrics(run, workload, rows))


def rows_of_arms(run: Run, workload: str, arms: Sequence[ArmResult]) -> dict[str, tuple[ModelRows, ...]]:
    """Rows of the models of each arm's selected configuration, ended trials only, by optimizer."""
    if not run.study.properties:
        return {}
    found = {}
    for arm in arms:
        chosen = [c for c in confirm_candidates(run, workload, arm.optimizer) if c.config_index == arm.config_index]
        found[arm.optimizer] = model_rows(run.path, [trial for c in chosen for trial in c.trials.values()])
    return found


def unmeasured(run: Run, workload: str, arms: Sequence[ArmResult]) -> tuple[str, ...]:
    """One line for each model of a selected configuration that lacks an entry, or whose rows cannot be read."""
    wanted = set(entries_of(run, workload))
    lines: list[str] = []
    for models in rows_of_arms(run, workload, arms).values():
        for model in models:
            lines += model.unreadable
            if not model.failed and wanted - {row.entry for row in model.plain}:
                lines.append(f"the properties of {model.trial.key.trial_id} are not complete")
    return tuple(lines)


def entries_of(run: Run, workload: str) -> dict[str, About]:
    """Entries of the properties of a workload, with the regime of their section."""
    return {
        entry: About(section.regime.value)
        for section in run.study.properties
        if not section.workloads or workload in section.workloads
        for entry in section.properties
    }


def entry_failures(run: Run, workload: str, arms: Sequence[ArmResult]) -> tuple[EntryFailures, ...]:
    """Failures of every entry and arm; a trial that left no model has failed in all."""
    rows = rows_of_arms(run, workload, arms)
    return tuple(
        _failures(entry, about, optimizer, models)
        for entry, about in entries_of(run, workload).items()
        for optimizer, models in rows.items()
    )


def _failures(entry: str, about: About, optimizer: str, models: Sequence[ModelRows]) -> EntryFailures:
    reasons, known = {}, 0
    for model in models:
        own = [row for row in model.plain if row.entry == entry]
        known += bool(own) or model.failed
        if model.failed:
            reasons[model.trial.key.trial_id] = f"its training ended as {model.trial.reason}"
        elif reason := next((row.reason for row in own if row.failed), ""):
            reasons[model.trial.key.trial_id] = reason
    return EntryFailures(
        entry=entry, about=about, optimizer=optimizer, models=known, failed=len(reasons), reasons=reasons
    )


def _ood_metrics(arms: Sequence[ArmResult]) -> list[ModelMetric]:
    splits = sorted({s.split for arm in arms for s in arm.errors if s.split.startswith(OOD_PREFIX)})
    return [
        ModelMetric(
            name=f"{split} {metric}",
            about=About.OOD,
            entry=split,
            unit=_OOD_UNITS[metric],
            values={arm.optimizer: _seeds(arm, split, metric) for arm in arms},
            refined={},
        )
        for split in splits
        for metric in _OOD_UNITS
    ]


def _seeds(arm: ArmResult, split: str, metric: Metric) -> dict[int, float]:
    """An arm's errors by seed; one whose seeds all failed has been measured on no such split, and failed there too."""
    summary = arm.summary(split, metric)
    if summary is not None:
        return summary.values
    test = arm.summary(Split.TEST, Metric.FORCES_MAE)
    return {seed: error for seed, error in test.values.items() if math.isinf(error)} if test else {}


def _property_metrics(run: Run, workload: str, rows: Mapping[str, Sequence[ModelRows]]) -> list[ModelMetric]:
    metrics = []
    for entry, about in entries_of(run, workload).items():
        plain = {name: {m.trial.key.seed_index: _errors(m.plain, entry) for m in own} for name, own in rows.items()}
        refined = {name: {m.trial.key.seed_index: _errors(m.refined, entry) for m in own} for name, own in rows.items()}
        failed = {name: [m.trial.key.seed_index for m in own if m.failed] for name, own in rows.items()}
        units = _units(row for own in rows.values() for model in own for row in model.plain if row.entry == entry)
        for quantity, unit in units.items():
            values = {name: _column(seeds, quantity) for name, seeds in plain.items()}
            for name, seeds in failed.items():
                values[name] |= dict.fromkeys(seeds, math.inf)
            metrics.append(
                ModelMetric(
                    name=f"{entry} {quantity}",
                    about=about,
                    entry=entry,
                    unit=unit,
                    values={name: dict(sorted(own.items())) for name, own in values.items()},
                    refined={name: column for name, own in refined.items() if (column := _column(own, quantity))},
                )
            )
    return metrics


def _column(seeds: Mapping[int, Mapping[str, float]], quantity: str) -> dict[int, float]:
    return {seed: errors[quantity] for seed, errors in seeds.items() if quantity in errors}


def pooled(quantity: str) -> str:
    """The metric that a quantity is part of: ``X.2`` is one of the modes, ``bands.rmse`` stands for itself."""
    return "modes" if quantity.rpartition(".")[2].isdigit() else quantity


def _units(rows: Iterable[PropertyRow]) -> dict[str, str]:
    units: dict[str, str] = {}
    for row in rows:
        if row.reference is not None:
            units.setdefault(pooled(row.quantity), row.unit)
    return units


def _errors(rows: Sequence[PropertyRow], entry: str) -> dict[str, float]:
    """Error of an entry by metric; ``inf`` where it failed."""
    parts: dict[str, list[float]] = {}
    for row in rows:
        if row.entry == entry and row.failed:
            parts.setdefault(pooled(row.quantity), []).append(math.inf)
        elif row.entry == entry and row.error is not None:
            parts.setdefault(pooled(row.quantity), []).append(abs(row.error))
    return {name: float(np.mean(errors)) for name, errors in parts.items()}
