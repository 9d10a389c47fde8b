"""Confirm results of a run or of somebody else's study, in one form: a seed of a configuration of an arm is a row.

The form of a CSV or Parquet file, in any order of columns:

=============  ========  ===========================================================================================
column         type      content
=============  ========  ===========================================================================================
workload       string    name of the workload
optimizer      string    name of the optimizer
seed           integer   seed index; equal indices of two arms mean equal initial weights, data order and labels
error          number    test force MAE, eV/Å; ``inf`` or empty for a failed run
config         integer   optional, number of the configuration; left out, 0
validation     number    validation objective that selects, lower is better; needed where an arm has several ``config``
device_s       number    optional, device-seconds of the run
=============  ========  ===========================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet

from analysis.comparison import Contender
from analysis.load import Run, load
from analysis.ranking import rank
from analysis.search_results import search_of, test_per_validation
from tunebench.study.errors import RunError
from tunebench.study.record import Metric, Split, Stage
from tunebench.study.spec import Sampler

REQUIRED = ("workload", "optimizer", "seed", "error")
OPTIONAL = ("config", "validation", "device_s")
TABLE_SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class ConfirmTable:
    """What one source says of its arms.

    Attributes:
        source: name of the run directory or file.
        contenders: workload -> optimizer -> errors by seed of the selected configuration.
        device_s: workload -> optimizer -> median device-seconds of a finished run, where known.
        identities: workload -> what makes it the same workload elsewhere; empty text where that is not known.
        seed_roots: workload -> what makes equal seed indices equal seeds elsewhere; empty text where not known.
        objections: workload -> what forbids a claim about it.
    """

    source: str
    contenders: dict[str, dict[str, Contender]]
    device_s: dict[str, dict[str, float]]
    identities: dict[str, str]
    seed_roots: dict[str, str]
    objections: dict[str, tuple[str, ...]]


def load_source(path: Path) -> ConfirmTable:
    """Read a run directory, or a file in the form above.

    Raises:
        RunError: neither of the two, or a file that does not follow the form.
        StudyError: the run's study is not valid.
    """
    if path.suffix in TABLE_SUFFIXES and path.is_file():
        return table_of_rows(_read(path), path)
    return table_of_run(load(path))


def table_of_run(run: Run) -> ConfirmTable:
    """The selected configurations of a run's arms, with their searches; errors are those that rank."""
    ranking = rank(run)
    contenders: dict[str, dict[str, Contender]] = {}
    for workload in ranking.workloads:
        factor = test_per_validation(run, workload.workload)
        arms = contenders.setdefault(workload.workload, {})
        for arm in workload.arms:
            summary = arm.summary(Split.TEST, Metric.FORCES_MAE)
            search = search_of(run, workload.workload, arm.optimizer, factor)
            arms[arm.optimizer] = Contender(
                optimizer=arm.optimizer,
                values=summary.values if summary else {},
                search=None if search is None else replace(search, source=run.path.name),
            )
    return ConfirmTable(
        source=run.path.name,
        contenders=contenders,
        device_s={w.workload: {point.optimizer: point.device_s for point in w.pareto} for w in ranking.workloads},
        identities={name: _identity(run, name) for name in run.workloads},
        seed_roots=dict.fromkeys(run.workloads, str(run.study.seed)),
        objections={
            w.workload: (
                *w.missing,
                *(check.name for check in ranking.checks if check.forbids_winner(w.workload)),
                *(("searched by TPE",) if run.study.tune.sampler is Sampler.TPE else ()),
            )
            for w in ranking.workloads
        },
    )


def table_of_rows(rows: pd.DataFrame, file: Path) -> ConfirmTable:
    """Select each arm's configuration by its mean validation objective and take its errors.

    Args:
        rows: a table in the form above.
        file: where it came from, for messages.

    Raises:
        RunError: a column is missing or has a value that is not allowed, or a row stands there twice.
    """
    rows = _checked(rows, file)
    contenders: dict[str, dict[str, Contender]] = {}
    seconds: dict[str, dict[str, float]] = {}
    for (workload, optimizer), arm in rows.groupby(["workload", "optimizer"], sort=True):
        own = arm[arm["config"] == _selected(arm, f"{file}: {workload}/{optimizer}")]
        values = {int(seed): float(error) for seed, error in zip(own["seed"], own["error"], strict=True)}
        contenders.setdefault(str(workload), {})[str(optimizer)] = Contender(optimizer=str(optimizer), values=values)
        cost = own.loc[np.isfinite(own["error"]), "device_s"].median()
        if np.isfinite(cost):
            seconds.setdefault(str(workload), {})[str(optimizer)] = float(cost)
    unknown = dict.fromkeys(contenders, "")
    return ConfirmTable(
        source=file.name,
        contenders=contenders,
        device_s=seconds,
        identities=unknown,
        seed_roots=unknown,
        objections=dict.fromkeys(contenders, ()),
    )


def _identity(run: Run, name: str) -> str:
    """Everything that defines a workload but its name, and the data its trials were measured on."""
    workload = next(workload for workload in run.study.workloads if workload.name == name)
    own = (trial for optimizer in run.optimizers for trial in run.arm(name, optimizer, Stage.CONFIRM))
    hashes = sorted({trial.data_hash for trial in own if trial.data_hash})
    return json.dumps([workload.model_dump(mode="json", exclude={"name", "data"}), hashes], sort_keys=True)


def _read(file: Path) -> pd.DataFrame:
    try:
        if file.suffix == ".csv":
            return pd.read_csv(file, dtype={"workload": "string", "optimizer": "string"})
        rows: pd.DataFrame = pyarrow.parquet.read_table(file).to_pandas()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        text = " ".join(str(error).split())[:160]
        raise RunError(f"{file}: found {text}, allowed: a table that can be read") from error
    return rows


def _checked(rows: pd.DataFrame, file: Path) -> pd.DataFrame:
    missing = [name for name in REQUIRED if name not in rows]
    if missing or not len(rows):
        found = f"no column {missing[0]}" if missing else "no rows"
        allowed = f"rows with {', '.join(REQUIRED)} and maybe {', '.join(OPTIONAL)}"
        raise RunError(f"{file}: found {found}, allowed: {allowed}")
    defaults: Mapping[str, float] = {"config": 0, "validation": np.nan, "device_s": np.nan}
    rows = rows.assign(**{name: value for name, value in defaults.items() if name not in rows})
    for name in ("seed", "config", "error", "validation", "device_s"):
        rows = rows.assign(**{name: _numbers(rows[name], name, file)})
    rows["error"] = rows["error"].fillna(np.inf)
    for name in ("seed", "config"):
        wrong = rows[(rows[name] % 1 != 0) | (rows[name] < 0)]
        if len(wrong):
            raise RunError(f"{file}: {name}: found {wrong[name].iloc[0]:g}, allowed: whole numbers of 0 or more")
    if (rows["error"] < 0.0).any():
        raise RunError(f"{file}: error: found {rows['error'].min():g}, allowed: 0 or more, inf or empty for a failure")
    for name in ("workload", "optimizer"):
        if rows[name].isna().any():
            raise RunError(f"{file}: {name}: found an empty cell, allowed: a name in every row")
    twice = rows[rows.duplicated(["workload", "optimizer", "config", "seed"])]
    if len(twice):
        row = twice.iloc[0]
        place = f"{row['workload']}/{row['optimizer']} config {row['config']:g} seed {row['seed']:g}"
        raise RunError(f"{file}: found {place} twice, allowed: every seed of a configuration once")
    return rows


def _numbers(values: pd.Series[float], name: str, file: Path) -> pd.Series[float]:
    try:
        return pd.to_numeric(values).astype(np.float64)
    except (ValueError, TypeError) as error:
        raise RunError(f"{file}: {name}: found {' '.join(str(error).split())[:120]}, allowed: numbers") from error


def _selected(arm: pd.DataFrame, place: str) -> float:
    """The configuration with the fewest failures, then the lowest mean validation objective."""
    configs = arm["config"].unique()
    if len(configs) == 1:
        return float(configs[0])
    if arm.loc[np.isfinite(arm["error"]), "validation"].isna().any():
        raise RunError(f"{place}: validation: found an empty cell, allowed: a number where an arm has several config")
    scored = arm.assign(failed=~np.isfinite(arm["error"])).groupby("config")
    table = pd.DataFrame({"failed": scored["failed"].sum(), "validation": scored["validation"].mean()})
    return float(table.sort_values(["failed", "validation"]).index[0])
