"""Property rows and curves of a run's confirmed models, trial by trial; the files are those of `tunebench run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet

from analysis.properties import load_properties
from tunebench.properties.rows import PropertyRow
from tunebench.study.errors import RunError
from tunebench.study.record import PROPERTIES, Readout, Reason, TrialRecord

CURVES = ".curves.parquet"
_KEPT_FILES = 4096


@dataclass(frozen=True, kw_only=True)
class ModelRows:
    """Rows of one trial's models.

    Attributes:
        trial: the trial.
        plain: of the weights that rank; empty where nothing is computed yet. refined: of the refined ones.
        unreadable: one line for each file that cannot be read.
    """

    trial: TrialRecord
    plain: tuple[PropertyRow, ...] = ()
    refined: tuple[PropertyRow, ...] = ()
    unreadable: tuple[str, ...] = field(default=())

    @property
    def failed(self) -> bool:
        """Whether the trial left no model, so that all its properties count as failed."""
        return self.trial.reason is not Reason.FINISHED


def model_rows(run: Path, trials: Sequence[TrialRecord]) -> tuple[ModelRows, ...]:
    """Rows of ended trials, in their order."""
    return tuple(_rows_of(run, trial) for trial in trials)


def curves_of(run: Path, model: str) -> pd.DataFrame:
    """Points of a model's curves, columns of `CurvePoint`; empty where there are none that can be read."""
    file = run / PROPERTIES / f"{model}{CURVES}"
    try:
        points: pd.DataFrame = pyarrow.parquet.read_table(file).to_pandas()
    except (pyarrow.ArrowException, OSError):
        return pd.DataFrame()
    return points


def _rows_of(run: Path, trial: TrialRecord) -> ModelRows:
    found: dict[str, tuple[PropertyRow, ...]] = {}
    unreadable = []
    for name, model in (("plain", trial.key.trial_id), ("refined", f"{trial.key.trial_id}.{Readout.REFINED}")):
        file = run / PROPERTIES / f"{model}.parquet"
        if not file.is_file():
            continue
        try:
            found[name] = _read(file, file.stat().st_mtime_ns)
        except RunError as error:
            unreadable.append(str(error))
    return ModelRows(trial=trial, **found, unreadable=tuple(unreadable))


@lru_cache(maxsize=_KEPT_FILES)
def _read(file: Path, stamp: int) -> tuple[PropertyRow, ...]:
    del stamp  # a file that changed is another one
    return load_properties(file)
