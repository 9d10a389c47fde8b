"""Where a trial stood, from its checkpoint and by training it again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.engine.test_cohort import CrystalTrials
from tunebench.curvature.measure import measure_point
from tunebench.curvature.preconditioners import preconditioner
from tunebench.curvature.record import (
    CurvatureRecord,
    CurvatureSettings,
    read_record,
    record_files,
    summary_rows,
    write_record,
)
from tunebench.curvature.snapshots import checkpoint_snapshot, trained_snapshots
from tunebench.engine.lightning import run_trial
from tunebench.engine.task import Evaluation, TrialTask
from tunebench.study.errors import RunError
from tunebench.study.record import Readout
from tunebench.study.spec import Engine

SETTINGS = CurvatureSettings(frames=4, chunk_frames=2, probes=2, steps=4, trace_products=3)


def ignore(_: Evaluation) -> None: ...


@pytest.fixture(scope="module")
def finished(trials: CrystalTrials) -> TrialTask:
    """A trial of schedule-free AdamW at its horizon of eight steps, trained by the lightning engine."""
    task = trials.task("schedule_free")
    run_trial(task, ignore)
    return task


def files_of(run: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}


@pytest.mark.parametrize("engine", [Engine.LIGHTNING, Engine.COHORT])
def test_a_trial_trained_again_stands_where_its_checkpoint_says_and_its_run_stays_as_it_was(
    finished: TrialTask, engine: Engine
) -> None:
    before = files_of(finished.run)
    middle, end = trained_snapshots(finished, [3, 8], engine)
    kept = checkpoint_snapshot(finished)
    assert files_of(finished.run) == before
    assert (middle.step, end.step, kept.step) == (3, 8, 8)
    for name, weight in kept.optimizer.weights.items():
        torch.testing.assert_close(end.optimizer.weights[name], weight, rtol=1e-6, atol=1e-8)
        assert not torch.equal(middle.optimizer.weights[name], weight)


def test_a_schedule_free_trial_stands_at_its_averaged_weights(finished: TrialTask) -> None:
    found = checkpoint_snapshot(finished)
    assert found.readout is Readout.SCHEDULE_FREE
    assert any(not torch.equal(found.weights[name], found.optimizer.weights[name]) for name in found.weights)


def test_a_point_holds_both_spectra_and_comes_back_from_its_file(finished: TrialTask, tmp_path: Path) -> None:
    point = measure_point(finished, checkpoint_snapshot(finished), SETTINGS)
    assert (point.step, point.frames) == (8, 4)
    assert 0 < point.live <= point.parameters
    assert point.hessian.products == 2 * 4 + 3
    assert point.preconditioned is not None
    record = CurvatureRecord(
        trial="crystals.schedule_free.tune.c000.s0",
        workload="crystals",
        optimizer="schedule_free",
        stage="tune",
        retrained=False,
        device="cpu",
        settings=SETTINGS,
        points=(point,),
    )
    write_record(tmp_path, record)
    (back,) = map(read_record, record_files(tmp_path))
    assert summary_rows(back) == summary_rows(record)
    assert [row["operator"] for row in summary_rows(back)] == ["H", "preconditioned H"]
    assert back.settings == SETTINGS
    assert back.points[0].preconditioner == point.preconditioner


def test_equal_seeds_measure_equal_numbers(finished: TrialTask) -> None:
    snapshot = checkpoint_snapshot(finished)
    first, second = (measure_point(finished, snapshot, SETTINGS) for _ in range(2))
    other = measure_point(finished, snapshot, replace(SETTINGS, seed=1))
    assert first.hessian.spectrum.largest == second.hessian.spectrum.largest
    assert first.hessian.spectrum.largest != other.hessian.spectrum.largest


@pytest.mark.parametrize("optimizer", ["muon", "soap", "soap_muon", "lamb", "sgd"])
def test_the_preconditioner_of_a_trial_covers_all_its_weights(trials: CrystalTrials, optimizer: str) -> None:
    task = trials.task(optimizer)
    (snapshot,) = trained_snapshots(task, [3], Engine.LIGHTNING)
    found = preconditioner(snapshot.optimizer)
    total = sum(weight.numel() for weight in snapshot.weights.values())
    assert sum(part.parameters for part in found.parts if part.kind != "orthogonalised direction") == total
    image = found.root(
        {name: torch.ones_like(weight, dtype=torch.float64) for name, weight in snapshot.weights.items()}
    )
    assert all(bool(torch.isfinite(value).all()) for value in image.values())


@pytest.mark.parametrize("steps", [[], [0, 2], [5, 3], [9]])
def test_steps_outside_the_horizon_are_refused(trials: CrystalTrials, steps: list[int]) -> None:
    with pytest.raises(RunError, match="allowed: ascending, from 1 to 8"):
        list(trained_snapshots(trials.task(), steps, Engine.COHORT))


def test_a_trial_that_diverges_on_the_way_is_said_to(trials: CrystalTrials) -> None:
    with pytest.raises(RunError, match="found DIVERGED at step"):
        list(trained_snapshots(trials.task("sgd", learning_rate=1e12), [8], Engine.LIGHTNING))


def test_a_trial_without_a_checkpoint_is_refused(trials: CrystalTrials) -> None:
    with pytest.raises(RunError, match=r"found no last\.pt, allowed: a trial with a checkpoint"):
        checkpoint_snapshot(trials.task())


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 9}', '{"schema_version": 1}'])
def test_a_file_that_is_no_record_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "curvature").mkdir()
    (tmp_path / "curvature" / "trial.json").write_text(content, encoding="utf-8")
    with pytest.raises(RunError, match=r"trial\.json: .*found"):
        read_record(tmp_path / "curvature" / "trial.json")


@pytest.mark.parametrize(("name", "value"), [("probes", 0), ("trace_products", 2), ("seed", -1)])
def test_settings_that_measure_nothing_are_refused(name: str, value: int) -> None:
    with pytest.raises(RunError, match=f"curvature: {name}: found {value}, allowed"):
        CurvatureSettings(**{name: value})
