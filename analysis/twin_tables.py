"""Fine-tuned workloads and their twins from scratch as tables of words, for the page."""

from __future__ import annotations

from analysis.levels import level_words
from analysis.page_tables import Table
from analysis.twins import TwinError, Twins
from analysis.wording import ABSENT, MINUS, number

_DIGITS = 3
_LEVEL = 0.05


def twin_tables(pair: Twins) -> list[Table]:
    """Errors and values of one pair; tables without a row are left out."""
    return [table for table in (_errors(pair), _values(pair)) if table.rows]


def _errors(pair: Twins) -> Table:
    return Table(
        title="Errors",
        note="Interquartile mean over the seeds of each workload's own selected configuration with its 95 % interval, "
        "lower is better; of a property |value minus reference|. Difference: fine-tuned minus from scratch, of "
        "independent seeds (Welch). It holds the luck of the seeds, not that of the two searches. p is adjusted by "
        "Holm over this table. Seeds of a fine-tuned workload share their initial weights.",
        columns=("error", "unit", "optimizer", "fine-tuned", "from scratch", "difference", "95 %", "p", "better"),
        rows=tuple(
            (
                row.error,
                row.unit,
                row.optimizer,
                level_words(row.tuned, _DIGITS),
                level_words(row.scratch, _DIGITS),
                _signed(row.difference),
                ABSENT if row.interval is None else f"[{_signed(row.interval.low)}, {_signed(row.interval.high)}]",
                number(row.p, 2),
                _better(row),
            )
            for row in pair.errors
        ),
    )


def _better(row: TwinError) -> str:
    if row.p is None or row.difference is None or row.p > _LEVEL:
        return "not shown"
    return "fine-tuned" if row.difference < 0.0 else "from scratch"


def _values(pair: Twins) -> Table:
    return Table(
        title="Values of properties",
        note="Interquartile mean over the seeds whose property did not fail, with its 95 % interval.",
        columns=("quantity", "unit", "reference", "optimizer", "fine-tuned", "from scratch"),
        rows=tuple(
            (
                row.quantity,
                row.unit,
                number(row.reference),
                row.optimizer,
                level_words(row.tuned),
                level_words(row.scratch),
            )
            for row in pair.values
        ),
    )


def _signed(value: float | None) -> str:
    return number(value, _DIGITS).replace("-", MINUS)
