"""What `tunebench properties` does, as library calls, and how it shows what it found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tunebench.engine.checkpoints import FINAL, REFINED
from tunebench.properties.rows import PropertyRow, write_rows
from tunebench.study.record import Readout
from tunebench.study.spec import StudyError
from tunebench.workloads.errors import WorkloadError


def evaluate_model(
    model: str, plan_file: Path, out: Path | None = None, device: str = "cpu", readout: Readout | None = None
) -> list[PropertyRow]:
    """Rows of all properties of a plan for one model, written to a file where one is named.

    Args:
        model: ``emt``, or the path of a checkpoint or package.
        plan_file: a property plan.
        out: Parquet file, or JSON by its ending.
        device: ``cpu`` or ``cuda``.
        readout: which weights of a confirm trial; left out, those its final checkpoint evaluates with.

    Raises:
        StudyError: the plan is not valid.
        RunError: the model or the reference's calculator cannot be had.
    """
    from tunebench.properties.calculators import calculator_named
    from tunebench.properties.evaluate import evaluate, references_of
    from tunebench.properties.plan import load_plan

    plan, base = load_plan(plan_file), plan_file.parent
    calculator = calculator_named(model, device, readout=readout)
    try:
        references = references_of(plan, base, device)
    except WorkloadError as error:
        raise StudyError(plan_file, error.key, error.found, error.allowed) from error
    rows = list(evaluate(calculator, plan, references, model=model_name(model, readout), base=base))
    if out:
        write_rows(out, rows)
    return rows


def model_name(model: str, readout: Readout | None = None) -> str:
    """A trial's id for its checkpoints, else the file's name without its ending, else a teacher's name.

    Weights that a readout names are named after it: ``TRIAL.refined``.
    """
    path = Path(model)
    readout = readout or (Readout.REFINED if path.name == REFINED else None)
    name = path.resolve().parent.name if path.name in (FINAL, REFINED) else path.name.split(".")[0]
    return f"{name}.{readout}" if readout else name


def rows_table(rows: Sequence[PropertyRow]) -> Table:
    """One line a scalar: value, reference, error; a failed property has one line with its reason."""
    table = Table(box=None, pad_edge=False)
    for name in ("entry", "quantity"):
        table.add_column(name)
    for name in ("value", "±", "reference", "error"):
        table.add_column(name, justify="right")
    table.add_column("unit")
    told: set[str] = set()
    for row in rows:
        if not row.failed:
            table.add_row(*_cells(row))
        elif row.entry not in told:
            table.add_row(row.entry, f"failed: {row.reason}")
            told.add(row.entry)
    return table


def _cells(row: PropertyRow) -> tuple[str, ...]:
    numbers: tuple[Any, ...] = (row.value, row.standard_error, row.reference, row.error)
    texts = ("" if number is None else f"{number:.5g}" for number in numbers)
    return (row.entry, row.quantity, *texts, row.unit)
