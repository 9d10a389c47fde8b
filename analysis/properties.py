"""Rows of physical properties as `tunebench properties` writes them: read, checked, failures counted."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import pyarrow
import pyarrow.parquet

from analysis.failure_rates import FailureRate, failure_rate
from tunebench.properties.rows import PropertyRow
from tunebench.study.errors import RunError

COLUMNS: dict[str, tuple[type, ...]] = {
    name: get_args(kind) or (kind,) for name, kind in get_type_hints(PropertyRow).items()
}
"""Columns of a file of rows and the types that a cell of them may have; `PropertyRow` says what they mean."""


@dataclass(frozen=True, kw_only=True)
class PropertyFailures:
    """How often a property of a plan failed among models.

    Attributes:
        entry: name in the plan.
        property: kind.
        rate: of models.
        reasons: why, by model.
    """

    entry: str
    property: str
    rate: FailureRate
    reasons: dict[str, str]


def load_properties(file: Path) -> tuple[PropertyRow, ...]:
    """Read rows of properties, Parquet or JSON.

    Raises:
        RunError: the file is missing or damaged, or a row is none; the line names file, row and column.
    """
    try:
        plain = json.loads(file.read_text(encoding="utf-8")) if file.suffix == ".json" else _parquet(file)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        found = " ".join(str(error).split())[:200]
        raise RunError(f"{file}: found {found}, allowed: rows that `tunebench properties` wrote") from error
    if not isinstance(plain, list):
        raise RunError(f"{file}: found {type(plain).__name__}, allowed: a list of rows")
    return tuple(_row(file, number, row) for number, row in enumerate(plain))


def failures(rows: Iterable[PropertyRow]) -> tuple[PropertyFailures, ...]:
    """Failures by entry, in the order in which the entries first occur; a model counts once an entry."""
    failed: dict[tuple[str, str], dict[str, str | None]] = {}
    for row in rows:
        models = failed.setdefault((row.entry, row.property), {})
        if row.failed:
            models[row.model] = row.reason
        else:
            models.setdefault(row.model, None)
    return tuple(_failures(entry, kind, models) for (entry, kind), models in failed.items())


def _failures(entry: str, kind: str, models: dict[str, str | None]) -> PropertyFailures:
    reasons = {model: reason for model, reason in models.items() if reason is not None}
    rate = failure_rate(len(reasons), len(models))
    return PropertyFailures(entry=entry, property=kind, rate=rate, reasons=reasons)


def _parquet(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(file).to_pylist()
    return rows


def _row(file: Path, number: int, row: Any) -> PropertyRow:
    if not isinstance(row, dict) or row.keys() != COLUMNS.keys():
        found = sorted(row) if isinstance(row, dict) else row
        raise RunError(f"{file}: row {number}: found {found}, allowed: {', '.join(COLUMNS)}")
    for name, kinds in COLUMNS.items():
        value = float(row[name]) if float in kinds and type(row[name]) is int else row[name]
        if not isinstance(value, kinds):
            raise RunError(f"{file}: row {number}: {name}: found {value!r}, allowed: {_words(kinds)}")
        row[name] = value
    if row["failed"] != (row["value"] is None):
        raise RunError(f"{file}: row {number}: value: found {row['value']}, allowed: a number, or none where failed")
    return PropertyRow(**row)


def _words(kinds: tuple[type, ...]) -> str:
    return " or ".join("nothing" if kind is NoneType else kind.__name__ for kind in kinds)
