"""A trial's curve: rows of `CURVE_COLUMNS`, kept by the trial and written whole as Parquet."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tunebench.engine.task import Evaluation
from tunebench.study.files import replacing
from tunebench.study.record import CURVES, SHORTER_CURVES, Metric, Readout, Split

_SCHEMA = pa.schema(
    [
        ("trial", pa.string()),
        ("step", pa.int64()),
        ("wall_s", pa.float64()),
        ("device_s", pa.float64()),
        ("split", pa.string()),
        ("metric", pa.string()),
        ("readout", pa.string()),
        ("value", pa.float64()),
    ]
)


def curve_rows(trial_id: str, evaluation: Evaluation) -> list[tuple[object, ...]]:
    """Rows of one evaluation in the order of `CURVE_COLUMNS`."""
    head = (trial_id, evaluation.step, evaluation.wall_s, evaluation.device_s)
    rows: list[tuple[object, ...]] = [
        (*head, Split.TRAIN.value, Metric.LOSS.value, Readout.RAW.value, evaluation.train_loss),
        (*head, Split.TRAIN.value, Metric.LEARNING_RATE.value, Readout.RAW.value, evaluation.learning_rate),
    ]
    rows += [
        (*head, split, metric, readout, value)
        for split, by_readout in evaluation.errors.items()
        for readout, metrics in by_readout.items()
        for metric, value in metrics.items()
    ]
    return rows


def write_curve(run: Path, trial_id: str, rows: list[tuple[object, ...]]) -> None:
    """Write a trial's whole curve; readers see the old file or the new one, never half of it."""
    path = run / CURVES / f"{trial_id}.parquet"
    columns = [
        pa.array(column, type=field.type) for column, field in zip(zip(*rows, strict=True), _SCHEMA, strict=True)
    ]
    with replacing(path) as partial:
        pq.write_table(pa.Table.from_arrays(columns, schema=_SCHEMA), partial)


def set_aside_curve(run: Path, trial_id: str, horizon: int) -> None:
    """Keep the curve of a shorter horizon apart from that of the longer one which the trial begins."""
    path = run / CURVES / f"{trial_id}.parquet"
    aside = run / SHORTER_CURVES / f"{trial_id}.h{horizon}.parquet"
    if path.exists() and not aside.exists():  # else an attempt that died before its checkpoint did
        aside.parent.mkdir(exist_ok=True)
        path.replace(aside)
