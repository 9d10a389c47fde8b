"""Validation error along training, over the seeds of an arm's best configuration."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import numpy as np
import pandas as pd

from analysis.load import Run
from analysis.selection import best_candidate, chosen_readout, confirm_candidates
from analysis.statistics import Floats
from analysis.step_costs import step_time, time_axis
from tunebench.study.record import Metric, Readout, Split, TrialRecord


@dataclass(frozen=True, kw_only=True)
class LearningCurve:
    """Median, lowest and highest validation force MAE (eV/Å) over seeds, every array of shape (evaluations,).

    Attributes:
        device_s: device-seconds at each step, by the workload's `TimeAxis`: calibrated, or the median of those spent.
        seeds: ended seeds of the configuration.
        drawn_seeds: how many of them the curve shows: those that finished, or all when none did.
    """

    step: Floats
    device_s: Floats
    middle: Floats
    low: Floats
    high: Floats
    seeds: int
    drawn_seeds: int


def learning_curve(run: Run, workload: str, optimizer: str) -> LearningCurve | None:
    """Learning curve of an arm's best configuration in the readout that counts; ``None`` before there is one."""
    best = best_candidate(confirm_candidates(run, workload, optimizer), run.study.objective)
    if best is None:
        return None
    shown = [best.trials[seed] for seed in best.finished or tuple(best.trials)]
    rows = [_rows(run, trial) for trial in shown]
    values = pd.concat([row["value"] for row in rows], axis=1).sort_index()
    times = pd.concat([row["device_s"] for row in rows], axis=1).sort_index()
    if values.empty:
        return None
    steps = values.index.to_numpy(dtype=np.float64)
    costs = [step_time(run, trial) for trial in shown] if time_axis(run, workload).calibrated else []
    step_s = [cost.median_s for cost in costs if cost is not None]
    return LearningCurve(
        step=steps,
        device_s=steps * median(step_s) if step_s else times.median(axis=1).to_numpy(dtype=np.float64),
        middle=values.median(axis=1).to_numpy(dtype=np.float64),
        low=values.min(axis=1).to_numpy(dtype=np.float64),
        high=values.max(axis=1).to_numpy(dtype=np.float64),
        seeds=len(best.trials),
        drawn_seeds=len(shown),
    )


def _rows(run: Run, trial: TrialRecord) -> pd.DataFrame:
    readout = chosen_readout(trial, run.study.objective) or Readout.RAW.value
    own = run.curve(trial.key.trial_id)
    mine = own[(own["split"] == Split.VAL) & (own["metric"] == Metric.FORCES_MAE) & (own["readout"] == readout)]
    return mine.drop_duplicates("step", keep="last").set_index("step")[["value", "device_s"]].astype(np.float64)
