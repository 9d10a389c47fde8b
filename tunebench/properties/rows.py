"""The rows in which properties are handed to the analysis, and the files that hold them.

This module is the contract between computing properties and analysing them. It imports neither Ray nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tunebench.study.files import replacing


@dataclass(frozen=True, kw_only=True)
class PropertyRow:
    """One scalar of one property of one model.

    Attributes:
        model: who was measured: a trial's id, a file, a teacher's name.
        entry: name of the property in its plan, for example ``cu-elastic``.
        property: kind, for example ``elastic``.
        quantity: the scalar, for example ``C11``; ``CURVE.rmse`` is the root mean square difference of a curve from
            the reference's, whose reference is 0.
        value: measured; None for a failed property.
        standard_error: of the value, where the calculation has one.
        reference: what the value should be; None where nothing is known.
        reference_standard_error: of the reference.
        error: value - reference; None where either is missing.
        unit: of all of these.
        failed: the property could not be computed of this model.
        reason: why it failed, or why there is no reference; empty otherwise.
        settings_hash: hexadecimal sha256 of the settings and the structure; rows with different ones do not compare.
    """

    model: str
    entry: str
    property: str
    quantity: str
    value: float | None
    standard_error: float | None
    reference: float | None
    reference_standard_error: float | None
    error: float | None
    unit: str
    failed: bool
    reason: str
    settings_hash: str

    def to_plain(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One point of one curve of one model.

    Attributes:
        model, entry: as in `PropertyRow`.
        curve: name, for example ``bands``.
        branch: which of the curves over the same axis, from 0; -1 for a mark on the axis, which has no y.
        mark: name of a place on the axis, for example a high-symmetry point; empty for a point.
        x, y: coordinates.
        x_unit, y_unit: their units.
    """

    model: str
    entry: str
    curve: str
    branch: int
    mark: str
    x: float
    y: float | None
    x_unit: str
    y_unit: str

    def to_plain(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return asdict(self)


def write_rows(file: Path, rows: Sequence[PropertyRow]) -> None:
    """Write rows as Parquet, or as JSON where the file's name ends so, replacing the file at once.

    Raises:
        OSError: it cannot be written.
    """
    plain = [row.to_plain() for row in rows]
    with replacing(file) as partial:
        if file.suffix == ".json":
            partial.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            _write_parquet(partial, plain, PropertyRow)


def write_curves(file: Path, points: Sequence[CurvePoint]) -> None:
    """Write points of curves as Parquet, replacing the file at once.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(file) as partial:
        _write_parquet(partial, [point.to_plain() for point in points], CurvePoint)


def _write_parquet(file: Path, plain: list[dict[str, Any]], kind: type[PropertyRow | CurvePoint]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"str": pa.string(), "bool": pa.bool_(), "int": pa.int64()}
    columns = [pa.field(column.name, types.get(str(column.type), pa.float64())) for column in fields(kind)]
    pq.write_table(pa.Table.from_pylist(plain, schema=pa.schema(columns)), file)
