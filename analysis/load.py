"""A run directory as one frozen value; nothing in it is changed, finished or not."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow
import pyarrow.parquet

from tunebench.study.errors import RunError
from tunebench.study.extension import Ranges, read_extension
from tunebench.study.journal import read_afforded, read_trials
from tunebench.study.record import CURVE_COLUMNS, CURVES, ENVIRONMENT, JOURNAL, STUDY, Stage, TrialRecord
from tunebench.study.resolve import ResolvedStudy, load_run
from tunebench.study.spec import Fidelity, Study
from tunebench.study.step_times import Calibration, DeviceTimes, read_calibration

CURVE_NAMES = ("trial", "split", "metric", "readout")
"""Columns of the curves that hold names; they are categorical."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that analysis knows of a run.

    Attributes:
        path: the run directory.
        resolved: study, search spaces and schedules as they were frozen.
        trials: journal order; unfinished trials have no reason yet.
        afforded: where a cap on device-seconds limits the search, by arm and number of configurations wanted, how many
            are paid for.
        curves: one row per measurement, columns `CURVE_COLUMNS`; a step measured twice, after a restart, counts once.
        environment: `environment.json`, empty when absent.
        calibration: `calibration.json`, None when absent or damaged.
        damages: one line per file that could not be read.
    """

    path: Path
    resolved: ResolvedStudy
    trials: tuple[TrialRecord, ...]
    afforded: dict[str, dict[int, int]]
    curves: pd.DataFrame
    environment: dict[str, Any]
    calibration: Calibration | None
    damages: tuple[str, ...]

    @property
    def study(self) -> Study:
        """The study as it was frozen when the run started."""
        return self.resolved.study

    @property
    def widened(self) -> Ranges:
        """Ranges that were widened after the start, by optimizer and hyperparameter."""
        return read_extension(self.resolved, self.path).widened

    @property
    def workloads(self) -> tuple[str, ...]:
        """Names of the workloads in the order of the study file."""
        return tuple(workload.name for workload in self.study.workloads)

    @property
    def optimizers(self) -> tuple[str, ...]:
        """Names of the optimizers in the order of the study file."""
        return tuple(arm.name for arm in self.study.optimizers)

    @property
    def rivals(self) -> tuple[str, ...]:
        """Optimizers that are ranked: all but arms beside them, untuned ones and audits with a larger budget."""
        return tuple(arm.name for arm in self.study.optimizers if not arm.untuned and arm.budget == 1)

    def planned(self, workload: str, optimizer: str) -> int:
        """Configurations that the tune stage gives to an arm: what the study says, or what its device-seconds pay."""
        wanted = self.study.trials_of(optimizer)
        return self.afforded.get(f"{workload}/{optimizer}", {}).get(wanted, wanted)

    def fidelity(self, optimizer: str) -> Fidelity | None:
        """What a trial of an optimizer has done at a rung; None where nothing is stopped early."""
        asha = self.study.tune.asha
        return None if asha is None else asha.fidelity.under(self.resolved.schedules[optimizer])

    def rule_of(self, optimizer: str) -> str:
        """The update rule of an arm, whose name may be another; a name that is no arm's stands for itself."""
        return next((arm.rule for arm in self.study.optimizers if arm.name == optimizer), optimizer)

    def arm(self, workload: str, optimizer: str, stage: Stage | None = None) -> tuple[TrialRecord, ...]:
        """Trials of an arm in planned order, of one stage or of both."""
        own = self._by_arm.get((workload, optimizer), ())
        return own if stage is None else tuple(trial for trial in own if trial.key.stage is stage)

    def curve(self, trial_id: str) -> pd.DataFrame:
        """Rows of one trial's curves in the order they were written; empty where it has none."""
        rows: pd.DataFrame = self.curves.iloc[self._curve_rows.get(trial_id, [])]
        return rows

    @cached_property
    def reference(self) -> DeviceTimes | None:
        """The kind of device in whose seconds tuning budgets count: the first that has steps of all tune trials."""
        if self.calibration is None:
            return None
        spaces = self.resolved.spaces
        tuned = (trial for trial in self.trials if trial.key.stage is Stage.TUNE and trial.key.optimizer in spaces)
        return self.calibration.covering((spaces[t.key.optimizer], t.key.workload, t.params) for t in tuned)

    @cached_property
    def _by_arm(self) -> dict[tuple[str, str], tuple[TrialRecord, ...]]:
        arms: dict[tuple[str, str], list[TrialRecord]] = {}
        for trial in self.trials:
            arms.setdefault((trial.key.workload, trial.key.optimizer), []).append(trial)
        return {arm: tuple(trials) for arm, trials in arms.items()}

    @cached_property
    def _curve_rows(self) -> dict[Any, Any]:
        return dict(self.curves.groupby("trial", sort=False, observed=True).indices)


def load(path: Path) -> Run:
    """Read a run directory as it is now; a run in progress is read up to its last whole entry.

    Raises:
        RunError: there is no run here, or its journal cannot be read.
        StudyError: the frozen study is not valid, or was edited after the start.
    """
    for name in (STUDY, JOURNAL):
        if not (path / name).is_file():
            raise RunError(f"{path}: found no {name}, allowed: a run directory written by `tunebench run`")
    resolved = load_run(path)
    trials = tuple(read_trials(path))
    curves, curve_damages = _curves(path / CURVES, [trial.key.trial_id for trial in trials])
    environment, environment_damages = _environment(path / ENVIRONMENT)
    calibration, calibration_damages = _calibration(path, resolved)
    return Run(
        path=path,
        resolved=resolved,
        trials=trials,
        afforded={} if resolved.study.tune.device_seconds_per_arm is None else read_afforded(path),
        curves=curves,
        environment=environment,
        calibration=calibration,
        damages=(*curve_damages, *environment_damages, *calibration_damages),
    )


def _curves(folder: Path, trial_ids: list[str]) -> tuple[pd.DataFrame, list[str]]:
    tables, damages = [], []
    for trial_id in trial_ids:
        file = folder / f"{trial_id}.parquet"
        if not file.is_file():
            continue
        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                tables.append(opened.read(columns=list(CURVE_COLUMNS), use_threads=False).select(list(CURVE_COLUMNS)))
        except (pyarrow.ArrowException, KeyError, OSError) as error:
            damages.append(f"{CURVES}/{file.name}: {' '.join(str(error).split())[:160]}")
    if not tables:
        return pd.DataFrame(columns=list(CURVE_COLUMNS)), damages
    joined = pyarrow.concat_tables(tables, promote_options="permissive")
    for place, name in enumerate(CURVE_COLUMNS):
        if name in CURVE_NAMES:  # a few names, millions of rows
            joined = joined.set_column(place, name, joined[name].combine_chunks().dictionary_encode())
    curves: pd.DataFrame = joined.to_pandas()
    return curves.drop_duplicates(["trial", "step", "split", "metric", "readout"], keep="last"), damages


def _environment(file: Path) -> tuple[dict[str, Any], list[str]]:
    if not file.is_file():
        return {}, []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, [f"{ENVIRONMENT}: {error}"]
    if not isinstance(content, dict):
        return {}, [f"{ENVIRONMENT}: found {type(content).__name__}, allowed: a JSON object"]
    return content, []


def _calibration(path: Path, resolved: ResolvedStudy) -> tuple[Calibration | None, list[str]]:
    try:
        return read_calibration(path, resolved.hash), []
    except RunError as error:
        return None, [str(error)]
