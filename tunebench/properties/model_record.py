"""The file of one model's properties in a run directory, entry by entry, so that a kill costs one of them at most.

A model has one writer. Whoever reads sees whole entries: rows are written last, and with them an entry
is there.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tunebench.properties.evaluate import Outcome, compare, measure_one, references_of
from tunebench.properties.measured import Curve, Measured, PropertyFailure, Value
from tunebench.properties.of_study import Measurement
from tunebench.properties.registry import AnySettings
from tunebench.properties.rows import CurvePoint, PropertyRow, write_curves, write_rows
from tunebench.properties.time_limit import EntryClock
from tunebench.study.errors import RunError
from tunebench.study.files import replacing
from tunebench.study.record import PROPERTIES

if TYPE_CHECKING:
    from ase.calculators.calculator import Calculator

_log = logging.getLogger(__name__)
T = TypeVar("T")

CURVES_SUFFIX = ".curves.parquet"


def rows_file(run: Path, model: str) -> Path:
    """Where the rows of a model lie; a trial's id is the model that ranks, ``TRIAL.refined`` its refined weights."""
    return run / PROPERTIES / f"{model}.parquet"


def curves_file(run: Path, model: str) -> Path:
    """Where the curves of a model lie."""
    return run / PROPERTIES / f"{model}{CURVES_SUFFIX}"


def reference_name(section: int) -> str:
    """Name of a section's reference, as that of a model."""
    return f"reference-{section}"


class ModelRecord:
    """What is known of one model, written after every entry.

    Args:
        run: the run directory.
        model: name.
    """

    def __init__(self, run: Path, model: str) -> None:
        self._run, self._model = run, model
        self._rows: list[dict[str, Any]] = _table(rows_file(run, model))
        done = self.entries
        self._points = [point for point in _table(curves_file(run, model)) if point["entry"] in done]

    @property
    def entries(self) -> frozenset[str]:
        """Entries that are done, failed ones included."""
        return frozenset(row["entry"] for row in self._rows)

    @property
    def failed(self) -> frozenset[str]:
        """Of them, those that failed."""
        return frozenset(row["entry"] for row in self._rows if row["failed"])

    def add(self, rows: Sequence[PropertyRow], outcome: Outcome) -> None:
        """Write one entry more."""
        if isinstance(outcome, Measured):
            self._points += [point.to_plain() for point in curve_points(self._model, rows[0].entry, outcome)]
        self._rows += [row.to_plain() for row in rows]
        write_curves(curves_file(self._run, self._model), [CurvePoint(**point) for point in self._points])
        write_rows(rows_file(self._run, self._model), [PropertyRow(**row) for row in self._rows])


def measure_model(
    run: Path,
    model: str,
    measured: Sequence[Measurement],
    calculator: Callable[[], Calculator],
    beat: Callable[[str], None] = lambda entry: None,
    clock: EntryClock | None = None,
) -> None:
    """Compute what a model's record lacks; a model that cannot be opened fails in every entry.

    Args:
        run: the run directory, which holds the references.
        model: its name.
        measured: what is computed of it.
        calculator: opens it.
        beat: called before each entry.
        clock: ends this process where an entry takes longer than its section allows; without, nothing does.

    Raises:
        RunError: a reference cannot be read.
        WorkloadError: a structure cannot be had.
    """
    record = ModelRecord(run, model)
    opened = _Model(calculator)
    for part in measured:
        references = read_reference(run, part.section)
        for entry, settings in part.plan.properties.items():
            if entry in record.entries:
                continue
            beat(entry)
            outcome = _in_time(clock, entry, part.time_limit_s, partial(opened.measure, settings))
            record.add(compare(entry, settings, outcome, references.get(entry), model=model), outcome)
            if clock:
                clock.forget(entry)


def fail_model(run: Path, model: str, measured: Sequence[Measurement], reason: str) -> None:
    """Record what a model's record lacks as failed, where the process that computes it cannot be kept alive."""
    failure = PropertyFailure(reason)

    def fails() -> Calculator:
        raise RunError(str(failure))

    measure_model(run, model, measured, fails)


class _Model:
    """A model that is opened when its first property is computed."""

    def __init__(self, calculator: Callable[[], Calculator]) -> None:
        self._calculator = calculator
        self._opened: Calculator | PropertyFailure | None = None

    def measure(self, settings: AnySettings) -> Outcome:
        if self._opened is None:
            self._opened = _opened(self._calculator)
        return self._opened if isinstance(self._opened, PropertyFailure) else measure_one(self._opened, settings)


def _opened(calculator: Callable[[], Calculator]) -> Calculator | PropertyFailure:
    try:
        return calculator()
    except RunError as error:
        _log.warning("%s", error)
        return PropertyFailure(str(error))


def _in_time(
    clock: EntryClock | None, entry: str, limit_s: float | None, compute: Callable[[], T]
) -> T | PropertyFailure:
    """What is computed, or the failure of an entry over which an earlier process was ended."""
    if clock is None:
        return compute()
    ended = clock.overrun(entry, limit_s)
    if ended is not None:
        return ended
    with clock.over(entry, limit_s):
        return compute()


def curve_points(model: str, entry: str, measured: Measured) -> list[CurvePoint]:
    """Points and marks of all curves of an entry."""
    points = []
    for name, curve in measured.curves.items():
        of_curve: dict[str, Any] = {
            "model": model,
            "entry": entry,
            "curve": name,
            "x_unit": curve.x_unit,
            "y_unit": curve.y_unit,
        }
        columns = curve.y.reshape(len(curve.x), -1).T.tolist()
        x = curve.x.tolist()
        points += [
            CurvePoint(**of_curve, branch=branch, mark="", x=place, y=y)
            for branch, column in enumerate(columns)
            for place, y in zip(x, column, strict=True)
        ]
        points += [CurvePoint(**of_curve, branch=-1, mark=mark, x=place, y=None) for mark, place in curve.marks]
    return points


# --- references ------------------------------------------------------------------------------------------------------


def make_reference(run: Path, measured: Measurement, device: str = "cpu", clock: EntryClock | None = None) -> None:
    """Compute what a section's reference lacks, once for all models, and keep it with its curves.

    Args:
        run: the run directory.
        measured: the section and its plan.
        device: ``cpu`` or ``cuda``.
        clock: as for `measure_model`.

    Raises:
        RunError: the reference's calculator cannot be had.
        WorkloadError: a structure or a file cannot be had.
    """
    section, plan, limit_s = measured.section, measured.plan, measured.time_limit_s
    known = read_reference(run, section)
    for entry, settings in plan.properties.items():
        if entry in known:
            continue
        alone = plan.model_copy(update={"properties": {entry: settings}})
        found = _in_time(clock, entry, limit_s, partial(references_of, alone, device=device))
        known |= {entry: found} if isinstance(found, PropertyFailure) else found
        _write_reference(run, section, known)
        if clock:
            clock.forget(entry)
    name = reference_name(section)
    points = [p for e, m in known.items() if isinstance(m, Measured) for p in curve_points(name, e, m)]
    write_curves(curves_file(run, name), points)


def has_reference(run: Path, section: int) -> bool:
    """Whether a section's reference is complete."""
    return curves_file(run, reference_name(section)).is_file()


def read_reference(run: Path, section: int) -> dict[str, Outcome]:
    """What is known of a section's reference, by entry.

    Raises:
        RunError: the file is damaged.
    """
    file = run / PROPERTIES / f"{reference_name(section)}.json"
    if not file.is_file():
        return {}
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        return {entry: _outcome(part) for entry, part in plain.items()}
    except (ValueError, LookupError, TypeError) as error:
        raise RunError(f"{file}: found {error}, allowed: what this run wrote; delete it to compute it again") from error


def _write_reference(run: Path, section: int, outcomes: Mapping[str, Outcome]) -> None:
    plain = {entry: _plain(outcome) for entry, outcome in outcomes.items()}
    with replacing(run / PROPERTIES / f"{reference_name(section)}.json") as partial:
        partial.write_text(json.dumps(plain, allow_nan=False), encoding="utf-8")


def _plain(outcome: Outcome) -> dict[str, Any]:
    if isinstance(outcome, PropertyFailure):
        return {"failure": str(outcome)}
    curves = {
        name: {**vars(curve), "x": curve.x.tolist(), "y": curve.y.tolist()} for name, curve in outcome.curves.items()
    }
    return {"values": {name: asdict(value) for name, value in outcome.values.items()}, "curves": curves}


def _outcome(plain: Mapping[str, Any]) -> Outcome:
    if "failure" in plain:
        return PropertyFailure(plain["failure"])
    return Measured(
        values={name: Value(**value) for name, value in plain["values"].items()},
        curves={name: _curve(curve) for name, curve in plain["curves"].items()},
    )


def _curve(plain: Mapping[str, Any]) -> Curve:
    x, y = (np.array(plain[axis], dtype=np.float64) for axis in ("x", "y"))
    marks = tuple((str(name), float(place)) for name, place in plain["marks"])
    return Curve(x=x, y=y, x_unit=plain["x_unit"], y_unit=plain["y_unit"], marks=marks)


def _table(file: Path) -> list[dict[str, Any]]:
    """Rows of a file; none where it is absent, or was damaged and is computed again."""
    import pyarrow
    import pyarrow.parquet as pq

    if not file.is_file():
        return []
    try:
        rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        _log.warning("%s: cannot be read and is computed again: %s", file, error)
        return []
    return rows
