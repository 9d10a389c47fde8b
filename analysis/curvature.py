"""What was measured of the loss's curvature, as a table. It explains optimizers and never ranks them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from analysis.load import Run
from analysis.page_tables import Table
from analysis.wording import ABSENT, MINUS, number, percent
from tunebench.curvature.record import CurvaturePoint, CurvatureRecord, OperatorRecord, read_record, record_files
from tunebench.study.errors import RunError

EXPLAINS = (
    "Curvature explains how an optimizer sees the loss; no verdict and no rank on this page rests on it. A sharper "
    "minimum can be the better one: sharpness depends on how weights are scaled, and optimizers that orthogonalise "
    "their updates have been reported to end in minima several times sharper and more accurate. What a preconditioner "
    "changes is read within a row pair, H against its own preconditioned H; P has the unit of a gradient in the Adam "
    "family and another one elsewhere, so largest eigenvalue and trace of the preconditioned H compare along one arm "
    "and not between arms. Condition and spread have no unit."
)


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Records of a run, and one line per file that could not be read."""

    records: tuple[CurvatureRecord, ...]
    unreadable: tuple[str, ...]


def curvature_of(run: Run) -> Curvature:
    """What `tunebench curvature` has left in a run."""
    records, unreadable = [], []
    for file in record_files(run.path):
        try:
            records.append(read_record(file))
        except RunError as error:
            unreadable.append(str(error))
    return Curvature(records=tuple(records), unreadable=tuple(unreadable))


def curvature_table(curvature: Curvature) -> Table:
    """One row per checkpoint and operator."""
    return Table(
        title="Spectra",
        note="Of the Hessian H of the training loss, forces included, in float64, and of P^-1/2 H P^-1/2 with the "
        "optimizer's own P, on the weights that the loss depends on. Ends are Ritz values with their residual bounds. "
        "Condition: largest |Ritz value| over the mean |eigenvalue|, 1 if flat, with its standard error over random "
        "vectors. Negative: share of the mean |eigenvalue| that negative ones make up. Spread: deviation of log10 "
        "|Ritz value|, weighted by curvature. Damped: share of P's eigenvalues that its damping makes up half of.",
        columns=(
            "trial",
            "step",
            "operator",
            "loss",
            "largest",
            "least",
            "trace",
            "condition",
            "negative",
            "spread, decades",
            "damped",
            "products",
        ),
        rows=tuple(
            (
                record.trial,
                str(point.step),
                name,
                number(point.loss, 3),
                *_row(operator),
                damped,
                str(operator.products),
            )
            for record in curvature.records
            for point in record.points
            for name, operator, damped in _operators(point)
        ),
    )


def _operators(point: CurvaturePoint) -> list[tuple[str, OperatorRecord, str]]:
    plain = [("H", point.hessian, ABSENT)]
    if point.preconditioned is None:
        return plain
    parts = point.preconditioner["parts"]
    parameters = sum(part["parameters"] for part in parts)
    damped = sum(part["damped_share"] * part["parameters"] for part in parts) / parameters
    return [*plain, ("preconditioned H", point.preconditioned, percent(damped))]


def _row(operator: OperatorRecord) -> tuple[str, ...]:
    found = operator.spectrum
    trace, error = found.trace if math.isnan(operator.trace) else (operator.trace, operator.trace_error)
    condition, condition_error = found.condition
    ends = [f"{_signed(end.value)} ± {number(end.bound, 1)}" for end in (found.largest, found.least)]
    return (
        *ends,
        f"{_signed(trace)} ± {_signed(error, 2)}",
        f"{_signed(condition)} ± {_signed(condition_error, 2)}",
        ABSENT if math.isnan(found.negative_share) else percent(found.negative_share),
        _signed(found.spread_decades, 2),
    )


def _signed(value: float, digits: int = 3) -> str:
    """A number with a true minus sign; a dash where it is not known."""
    if math.isnan(value):
        return ABSENT
    return number(value, digits).replace("-", MINUS, 1) if value < 0 else number(value, digits)


def missing_preconditioners(curvature: Curvature) -> list[str]:
    """One line per checkpoint whose optimizer has no linear preconditioner."""
    return [
        f"{record.trial} at step {point.step}: {point.preconditioner['missing']}"
        for record in curvature.records
        for point in record.points
        if point.preconditioned is None
    ]
