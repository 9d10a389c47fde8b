"""The AlgoPerf score (external tuning), recomputed from evaluation logs.

Rules: Dahl et al. 2023 (arXiv:2306.07179) and the public scorer of mlcommons/submissions_algorithms, whose quirks are
kept: a study's time is that of the trial with the fewest evaluations, ties going to the lowest trial number, and the
profile is integrated by a trapezoid rule over 100 points.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet

from analysis.profiles import LARGEST_RATIO, ratios, score, trapezoid_score
from analysis.statistics import median
from tunebench.study.errors import RunError

EVALUATIONS, TARGETS = "evals.parquet", "targets.json"
COLUMNS = ("submission", "study", "workload", "trial", "accumulated_submission_time", "validation")
_STUDY = ["submission", "workload", "study"]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Scores of one submission in [0, 1], higher is better.

    Attributes:
        score: as the public scorer computes it, by a trapezoid rule. exact_score: the integral itself.
        seconds: median time to target by base workload, ``inf`` where missed.
    """

    submission: str
    score: float
    exact_score: float
    seconds: dict[str, float]


def score_folder(folder: Path) -> tuple[Submission, ...]:
    """Score every submission in a folder with `evals.parquet` and `targets.json`, best first.

    Raises:
        RunError: a file is missing, cannot be read, or lacks something.
    """
    targets = _targets(folder / TARGETS)
    workloads, base = targets["workloads"], list(targets["base_workloads"])
    held_out = {name: workloads[name]["base_workload"] for name in targets["held_out_workloads"]}
    scored = {name: workloads[name] for name in [*base, *held_out]}
    times = study_times(_evaluations(folder / EVALUATIONS), scored)
    return submissions(workload_times(times, base, held_out))


def submissions(table: pd.DataFrame) -> tuple[Submission, ...]:
    """Scores from seconds to target, shape (submissions, workloads), ``inf`` where missed; best first."""
    ratio = ratios(table.to_numpy(dtype=np.float64))
    found = [
        Submission(submission=str(name), score=float(area), exact_score=float(exact), seconds=_row(table, place))
        for place, (name, area, exact) in enumerate(zip(table.index, trapezoid_score(ratio), score(ratio), strict=True))
    ]
    return tuple(sorted(found, key=lambda one: (-one.score, one.submission)))


def study_times(evaluations: pd.DataFrame, targets: Mapping[str, Mapping[str, Any]]) -> pd.Series[float]:
    """Seconds to the target by (submission, workload, study), ``inf`` where no trial reached it.

    Args:
        evaluations: one row per evaluation in order of time, with `COLUMNS`; seconds without evaluation and logging.
        targets: by workload ``direction`` (min or max) and ``validation_target``.
    """
    frame = evaluations[evaluations["workload"].isin(list(targets))].copy()
    frame["index"] = frame.groupby([*_STUDY, "trial"]).cumcount()
    goal = frame["workload"].map({name: float(target["validation_target"]) for name, target in targets.items()})
    lower = frame["workload"].map({name: target["direction"] == "min" for name, target in targets.items()})
    value = frame["validation"]
    reached = frame[(lower & (value <= goal)) | (~lower & (value >= goal))]
    first = reached.sort_values(["index", "trial"]).drop_duplicates(_STUDY).set_index(_STUDY)
    times = first["accumulated_submission_time"].astype(np.float64)
    every = pd.MultiIndex.from_frame(frame[_STUDY].drop_duplicates())
    return times.reindex(every, fill_value=np.inf)


def workload_times(times: pd.Series[float], base: Sequence[str], held_out: Mapping[str, str]) -> pd.DataFrame:
    """Median over studies in seconds, shape (submissions, base workloads), after the rules on held-out variants.

    A variant is missed with its base; every workload is missed beyond four times the fastest submission; a base is
    missed with its variant.

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
    table = table.where(table <= LARGEST_RATIO * table.min(), np.inf)
    for variant, origin in held_out.items():
        table.loc[np.isinf(table[variant]), origin] = np.inf
    return table[list(base)]


def _row(table: pd.DataFrame, place: int) -> dict[str, float]:
    return {str(name): float(value) for name, value in table.iloc[place].items()}


def _targets(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: found {_short(error)}, allowed: targets as JSON") from error
    for key in ("workloads", "base_workloads", "held_out_workloads"):
        if not isinstance(content, dict) or key not in content:
            raise RunError(f"{file}: found no {key}, allowed: workloads, base_workloads and held_out_workloads")
    scored = [*content["base_workloads"], *content["held_out_workloads"]]
    unknown = [name for name in scored if name not in content["workloads"]]
    if unknown:
        raise RunError(f"{file}: workloads: found no {unknown[0]}, allowed: an entry for each scored workload")
    return dict(content)


def _evaluations(file: Path) -> pd.DataFrame:
    try:
        evaluations: pd.DataFrame = pyarrow.parquet.read_table(file, columns=list(COLUMNS)).to_pandas()
    except (OSError, pyarrow.ArrowException) as error:
        raise RunError(f"{file}: found {_short(error)}, allowed: Parquet with {', '.join(COLUMNS)}") from error
    return evaluations


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
