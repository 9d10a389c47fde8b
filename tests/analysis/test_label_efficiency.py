from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from analysis.label_efficiency import first_crossing, label_efficiency, labels_needed
from analysis.label_groups import label_groups
from analysis.load import load
from analysis.ranking import rank
from tests.analysis.synthetic_run import Plan, write_run
from tunebench.study.spec import Labels

INF = math.inf


def seeds(error: float, spread: float = 0.0) -> dict[int, float]:
    return {seed: error * math.exp(spread * (seed - 2)) for seed in range(5)}


def test_crossing_by_hand() -> None:
    fractions = np.array([0.1, 0.5, 1.0])
    assert first_crossing(fractions, np.array([3.0, 1.0, -1.0])) == pytest.approx(0.75)
    assert first_crossing(fractions, np.array([-1.0, 1.0, -1.0])) == pytest.approx(0.1)
    assert first_crossing(fractions, np.array([3.0, 2.0, 1.0])) is None
    assert first_crossing(fractions, np.array([INF, -1.0, -2.0])) == 0.5


def test_labels_needed_by_hand() -> None:
    """Paired seeds cancel: at 0.5 the error is e times the mark, at 1 it is 1 / e of it."""
    found = labels_needed({0.5: seeds(math.e, 0.1), 1.0: seeds(1.0 / math.e, 0.1)}, seeds(1.0, 0.1))
    assert found.fraction == pytest.approx(0.75)
    assert (found.low, found.high) == pytest.approx((0.75, 0.75))
    assert not found.censored


def test_scatter_widens_the_interval_and_ends_beyond_the_data_are_open() -> None:
    mark = seeds(1.0)
    found = labels_needed({0.1: seeds(1.5, 0.1), 0.5: seeds(1.1, 0.1), 1.0: seeds(0.95, 0.1)}, mark)
    assert found.fraction is not None
    assert found.low is not None
    assert found.low < found.fraction < 1.0
    assert found.high is None
    never = labels_needed({0.1: seeds(2.0), 1.0: seeds(1.5)}, mark)
    assert (never.fraction, never.low, never.high) == (None, None, None)
    always = labels_needed({0.1: seeds(0.5), 1.0: seeds(0.4)}, mark)
    assert (always.fraction, always.low, always.high, always.censored) == (0.1, None, 0.1, True)


def test_failed_seeds_are_no_proof_of_anything() -> None:
    failing = {**seeds(0.5), 0: INF, 1: INF}
    found = labels_needed({0.5: failing, 1.0: seeds(0.5)}, seeds(1.0))
    assert found.fraction == 1.0
    assert found.high == 1.0


def test_interval_of_the_needed_fraction_covers_it() -> None:
    """Log error falls linearly with the fraction; the true answer is 0.5."""
    generator = np.random.default_rng(6)
    held, studies = 0, 400
    for _ in range(studies):
        common = generator.normal(size=5)
        errors = {
            fraction: dict(enumerate(np.exp(0.5 - fraction + 0.05 * (common + generator.normal(size=5)))))
            for fraction in (0.25, 0.5, 0.75, 1.0)
        }
        found = labels_needed(errors, dict(enumerate(np.exp(0.05 * (common + generator.normal(size=5))))))
        held += (found.low is None or found.low <= 0.5) and (found.high is None or found.high >= 0.5)
    assert 0.93 <= held / studies <= 0.975


def test_curves_have_intervals_and_the_baseline_needs_all_its_labels() -> None:
    errors = {
        "adamw": {0.5: seeds(2.0, 0.01), 1.0: seeds(1.0, 0.01)},
        "soap": {0.5: seeds(0.9, 0.01), 1.0: seeds(0.5, 0.01)},
    }
    found = label_efficiency({0.5: "half", 1.0: "all"}, errors, "adamw")
    assert [point.fraction for point in found.curves["soap"]] == [0.5, 1.0]
    assert found.curves["soap"][0].interval is not None
    assert found.needed["adamw"].fraction == 1.0
    assert found.needed["soap"].censored


def test_only_workloads_that_differ_in_labels_alone_belong_together(tmp_path: Path) -> None:
    plan = Plan(arms={"adamw": (0.03, 0.031, 0.032)}, workloads=("ethanol-nequip", "ethanol-allegro"))
    study = load(write_run(tmp_path / "run", plan)).study
    first, second = study.workloads
    assert label_groups(study.workloads) == ()
    half = second.model_copy(update={"labels": Labels(force_fraction=0.5)})
    assert label_groups([first, half]) == ({1.0: "ethanol-nequip", 0.5: "ethanol-allegro"},)
    longer = half.model_copy(update={"max_steps": 999})
    assert label_groups([first, longer]) == ()


def test_ranking_of_a_run_has_its_label_efficiency(tmp_path: Path) -> None:
    arms = {"adamw": (0.030, 0.031, 0.032, 0.033, 0.034), "soap": (0.020, 0.021, 0.022, 0.023, 0.024)}
    plan = Plan(arms=arms, workloads=("all", "half"), force_fractions={"half": 0.5})
    (found,) = rank(load(write_run(tmp_path / "run", plan))).labels
    assert found.workloads == {0.5: "half", 1.0: "all"}
    assert found.needed["soap"].fraction == 0.5
    assert found.needed["soap"].censored
