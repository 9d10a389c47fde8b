"""The AlgoPerf v0.5 score (external tuning), recomputed from evaluation logs in proof of the arithmetic of `analysis`.

Rules: Dahl et al. 2023 (arXiv:2306.07179) and the public scorer of mlcommons/submissions_algorithms, whose quirks are
kept: a study's time is that of the trial with the fewest evaluations, ties going to the lowest trial number, and the
profile is integrated by a trapezoid rule over 100 points.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis.statistics import median

TARGET_FACTOR = 4.0
"""A workload counts as missed beyond this multiple of the fastest time, and profiles end there."""
_POINTS = 100


def study_times(evaluations: pd.DataFrame, targets: Mapping[str, Mapping[str, Any]]) -> pd.Series[float]:
    """Seconds to the target by (submission, workload, study), ``inf`` where no trial reached it.

    Args:
        evaluations: one row per evaluation in order of time, columns submission, study, workload, trial,
            accumulated_submission_time (s) and validation.
        targets: by workload ``direction`` (min or max) and ``validation_target``.
    """
    frame = evaluations[evaluations["workload"].isin(list(targets))].copy()
    trial = ["submission", "workload", "study", "trial"]
    frame["index"] = frame.groupby(trial).cumcount()
    goal = frame["workload"].map({name: float(target["validation_target"]) for name, target in targets.items()})
    lower = frame["workload"].map({name: target["direction"] == "min" for name, target in targets.items()})
    value = frame["validation"]
    reached = frame[(lower & (value <= goal)) | (~lower & (value >= goal))]
    first = reached.sort_values(["index", "trial"]).drop_duplicates(trial[:3]).set_index(trial[:3])
    times = first["accumulated_submission_time"].astype(np.float64)
    every = pd.MultiIndex.from_frame(frame[trial[:3]].drop_duplicates())
    return times.reindex(every, fill_value=np.inf)


def workload_times(times: pd.Series[float], base: list[str], held_out: Mapping[str, str]) -> pd.DataFrame:
    """Median over studies in seconds, shape (submissions, base workloads), after the rules on held-out variants.

    A variant is missed with its base; every workload is missed beyond `TARGET_FACTOR` times the fastest submission; a
    base is missed with its variant.

    Args:
        times: as `study_times` returns them.
        base: base workloads.
        held_out: variant -> its base workload.
    """
    medians = times.groupby(level=["submission", "workload"]).agg(lambda group: median(group.to_numpy()))
    table = medians.unstack("workload").astype(np.float64)
    table = table.reindex(columns=[*base, *held_out]).fillna(np.inf)
    for variant, origin in held_out.items():
        table.loc[np.isinf(table[origin]), variant] = np.inf
    table = table.where(table <= TARGET_FACTOR * table.min(), np.inf)
    for variant, origin in held_out.items():
        table.loc[np.isinf(table[variant]), origin] = np.inf
    return table[base]


def scores(table: pd.DataFrame) -> dict[str, float]:
    """Score in [0, 1] by submission (higher is better): area under the performance profile up to `TARGET_FACTOR`.

    Args:
        table: seconds to target, shape (submissions, workloads), ``inf`` where missed; no column is all ``inf``.
    """
    ratios = (table / table.min()).to_numpy(dtype=np.float64)
    taus = np.linspace(1.0, TARGET_FACTOR, _POINTS, dtype=np.float64)
    profile = (ratios[:, :, None] <= taus).mean(axis=1)
    areas = np.trapezoid(profile, taus, axis=1) / (TARGET_FACTOR - 1.0)
    return dict(zip(map(str, table.index), areas.tolist(), strict=True))
