"""The gap between in and out of distribution, and errors of the parts of a split, in runs whose truth is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from analysis.error_parts import part_tables
from analysis.load import load
from analysis.ood_gap import OodGap, ood_gaps
from analysis.ranking import rank
from analysis.statistics import Interval
from tests.analysis.synthetic_run import OOD_PER_TEST, Plan, write_run
from tunebench.study.record import ERROR_PARTS, PART_COLUMNS, Metric, Stage

ARMS = {"adamw": (0.05, 0.052, 0.049, 0.051, 0.05), "soap": (0.04, 0.041, math.inf, 0.039, 0.04)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("ood") / "run", Plan(arms=ARMS))


def gaps_of(run: Path) -> dict[tuple[str, Metric], OodGap]:
    return {(gap.optimizer, gap.metric): gap for gap in rank(load(run)).workloads[0].gaps}


def test_a_gap_is_the_ratio_of_the_two_errors_of_the_same_model(run: Path) -> None:
    gap = gaps_of(run)["adamw", Metric.FORCES_MAE]
    assert gap.factor == pytest.approx(OOD_PER_TEST)
    assert gap.interval is not None
    assert (gap.interval.low, gap.interval.high) == pytest.approx((OOD_PER_TEST, OOD_PER_TEST))
    assert (gap.split, gap.n_seeds, gap.n_failed) == ("ood:hot", 5, 0)


def test_a_failed_seed_has_no_gap_and_is_counted(run: Path) -> None:
    gap = gaps_of(run)["soap", Metric.FORCES_MAE]
    assert gap.factor == pytest.approx(OOD_PER_TEST)
    assert (gap.n_seeds, gap.n_failed) == (4, 1)


def test_the_interval_of_a_gap_is_that_of_the_logarithms(run: Path) -> None:
    """Errors that grow by unlike factors: their geometric mean over three seeds, and Student's t on the logs."""
    arm = rank(load(run)).workloads[0].arms[0]
    factors = {0: 1.5, 1: 2.0, 2: 3.0}
    errors = tuple(
        replace(s, values={seed: 0.04 * (1.0 if s.split == "test" else factor) for seed, factor in factors.items()})
        for s in arm.errors
    )
    gap = next(g for g in ood_gaps([replace(arm, errors=errors)]) if g.metric is Metric.FORCES_MAE)
    assert gap.factor == pytest.approx(9.0 ** (1.0 / 3.0))
    assert gap.interval == Interval(low=pytest.approx(0.87576, abs=1e-5), high=pytest.approx(4.94056, abs=1e-5))


def test_the_tables_show_the_parts_of_the_readout_that_counts(run: Path) -> None:
    trials = [trial for trial in load(run).trials if trial.key.stage is Stage.CONFIRM and trial.result]
    for trial in trials:
        rows = [
            (trial.key.trial_id, "test", readout, part, name, "forces_mae", value, 12)
            for readout, factor in (("ema", 1.0), ("raw", 9.0))
            for part, name, value in (("config_type", "", 0.01 * factor), ("element", "Cu", 0.02 * factor))
        ]
        file = run / ERROR_PARTS / f"{trial.key.trial_id}.parquet"
        file.parent.mkdir(exist_ok=True)
        pd.DataFrame(rows, columns=list(PART_COLUMNS)).to_parquet(file, index=False)
    (run / ERROR_PARTS / f"{trials[0].key.trial_id}.parquet").write_bytes(b"PAR1")
    loaded = load(run)
    types, elements = part_tables(loaded, "ethanol-nequip", rank(loaded).workloads[0].arms)
    assert types.columns == ("optimizer", "test (none)")
    assert {row[0]: row[1] for row in types.rows} == {"adamw": "10.0", "soap": "10.0"}
    assert {row[0]: row[1] for row in elements.rows} == {"adamw": "20.0", "soap": "20.0"}
    assert trials[0].key.trial_id in types.note
