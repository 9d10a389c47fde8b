from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.__main__ import BAD_INPUT, DONE, main
from analysis.algoperf import study_times, submissions, workload_times

INF = math.inf


def curve(submission: str, trial: int, seconds: list[float], validation: list[float | None]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "submission": submission,
            "workload": "wmt",
            "study": 0,
            "trial": trial,
            "accumulated_submission_time": seconds,
            "validation": np.array(validation, dtype=np.float64),
        }
    )


def test_trial_with_the_fewest_evaluations_counts_not_the_quickest() -> None:
    evaluations = pd.concat([curve("a", 1, [5.0, 6.0, 7.0], [9.0, 9.0, 1.0]), curve("a", 2, [20.0, 30.0], [9.0, 1.0])])
    times = study_times(evaluations, {"wmt": {"direction": "min", "validation_target": 2.0}})
    assert times["a", "wmt", 0] == 30.0


def test_missing_value_never_reaches_the_target() -> None:
    target = {"wmt": {"direction": "max", "validation_target": 2.0}}
    assert study_times(curve("a", 1, [1.0, 2.0], [None, 1.0]), target)["a", "wmt", 0] == INF


def test_score_by_hand() -> None:
    table = pd.DataFrame({"w": [1.0, 2.0, INF]}, index=["fast", "half", "missed"])
    found = {one.submission: one for one in submissions(table)}
    assert list(found) == ["fast", "half", "missed"]
    assert found["fast"].score == pytest.approx(1.0)
    assert found["missed"].score == 0.0
    # Ratio 2 is reached from the 34th of 100 points on: 66 full steps of 99 and half of the one before.
    assert found["half"].score == pytest.approx(66.5 / 99.0)
    assert found["half"].exact_score == pytest.approx(2.0 / 3.0)


def test_base_workload_is_missed_with_its_variant() -> None:
    index = pd.MultiIndex.from_product(
        [["a", "b"], ["base", "variant"], [0]], names=["submission", "workload", "study"]
    )
    times = pd.Series([10.0, 10.0, 20.0, 41.0], index=index)
    table = workload_times(times, ["base"], {"variant": "base"})
    assert table["base"].tolist() == [10.0, INF]


@pytest.mark.data
def test_published_scores_of_algoperf_are_reproduced(reference_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = reference_data / "algoperf_v05"
    published = json.loads((folder / "published_scores.json").read_text(encoding="utf-8"))["scores"]
    assert main(["algoperf", str(folder), "--json"]) == DONE
    found = {entry["submission"]: entry["score"] for entry in json.loads(capsys.readouterr().out)}
    expected = {entry["submission"]: entry["score"] for entry in published}
    assert len(expected) == 11
    assert {name: round(score, 4) for name, score in found.items()} == pytest.approx(expected, abs=1e-9)
    assert main(["algoperf", str(folder)]) == DONE
    assert capsys.readouterr().out.startswith("shampoo_submission     0.7784  ")


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, "targets.json: found "),
        ("[]", "found no workloads"),
        ('{"workloads": {}, "base_workloads": ["wmt"], "held_out_workloads": []}', "found no wmt"),
        ('{"workloads": {}, "base_workloads": [], "held_out_workloads": []}', "evals.parquet: found "),
    ],
)
def test_logs_that_cannot_be_scored_are_one_line(
    targets: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if targets is not None:
        (tmp_path / "targets.json").write_text(targets, encoding="utf-8")
    assert main(["algoperf", str(tmp_path)]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line
