"""Errors of finished confirm trials by configuration type and by element: read, and as tables of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet

from analysis.arm_result import ArmResult
from analysis.load import Run
from analysis.page_tables import MEV, Table
from analysis.selection import chosen_readout, finished_trials
from analysis.statistics import iqm
from analysis.wording import ABSENT, milli
from tunebench.study.record import ERROR_PARTS, PART_COLUMNS, Metric, Part, TrialRecord

UNNAMED = "(none)"
_MOST_COLUMNS = 12
_TITLES = {
    Part.CONFIG_TYPE: "Force errors by configuration type",
    Part.ELEMENT: "Force errors by element",
}


def read_parts(run: Path, trial_ids: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Rows of these trials, columns `PART_COLUMNS`, and one line for each file that cannot be read.

    A trial without a file has no rows: it has not finished, or its run is older than these files.
    """
    tables, damages = [], []
    for trial_id in trial_ids:
        file = run / ERROR_PARTS / f"{trial_id}.parquet"
        if not file.is_file():
            continue
        try:
            tables.append(pyarrow.parquet.read_table(file, columns=list(PART_COLUMNS)).to_pandas())
        except (pyarrow.ArrowException, KeyError, OSError) as error:
            damages.append(f"{ERROR_PARTS}/{file.name}: {' '.join(str(error).split())[:160]}")
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(PART_COLUMNS)), damages


def part_tables(run: Run, workload: str, arms: Sequence[ArmResult]) -> list[Table]:
    """Force MAE of each arm's selected configuration on every part of every split that is opened once.

    Of many parts those with the largest error of any arm are shown; the files hold all.
    """
    trials = {arm.optimizer: finished_trials(run, workload, arm.optimizer, arm.config_index) for arm in arms}
    rows, damages = read_parts(run.path, [trial.key.trial_id for own in trials.values() for trial in own])
    forces = rows[rows["metric"] == Metric.FORCES_MAE.value]
    tables = [_table(run, forces[forces["part"] == part.value], part, trials, damages) for part in Part]
    return [table for table in tables if table.rows]


def _table(
    run: Run, rows: pd.DataFrame, part: Part, trials: dict[str, tuple[TrialRecord, ...]], damages: list[str]
) -> Table:
    errors = {name: _errors(run, rows, own) for name, own in trials.items()}
    worst: dict[tuple[str, str], float] = {}
    for own in errors.values():
        for place, value in own.items():
            worst[place] = max(value, worst.get(place, 0.0))
    shown = sorted(sorted(worst, key=lambda place: -worst[place])[:_MOST_COLUMNS])
    left = f" {len(worst) - len(shown)} parts with smaller errors are not shown." if len(worst) > len(shown) else ""
    unread = f" Unreadable: {'; '.join(damages)}." if damages else ""
    return Table(
        title=_TITLES[part],
        note=f"MAE in {MEV}, interquartile mean over the seeds that finished, lower is better. `RUN/{ERROR_PARTS}` has "
        f"all metrics and readouts.{left}{unread}",
        columns=("optimizer", *(f"{split} {name or UNNAMED}" for split, name in shown)),
        rows=tuple(
            (optimizer, *(milli(own[place]) if place in own else ABSENT for place in shown))
            for optimizer, own in errors.items()
            if own
        ),
    )


def _errors(run: Run, rows: pd.DataFrame, trials: Sequence[TrialRecord]) -> dict[tuple[str, str], float]:
    """IQM over seeds by split and name, each seed with the readout that counts for it."""
    readouts = {trial.key.trial_id: chosen_readout(trial, run.study.objective) for trial in trials}
    own = rows[rows["trial"].map(readouts) == rows["readout"]]
    return {
        (str(split), str(name)): float(iqm(values.to_numpy(dtype=np.float64)))
        for (split, name), values in own.groupby(["split", "name"], sort=True)["value"]
    }
