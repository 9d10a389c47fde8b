from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from nequip.data import AtomicDataDict
from torch.utils.data import DataLoader

from tests.engine.conftest import MakeTask, Reports
from tunebench.engine.batches import task_frames
from tunebench.engine.checkpoints import FINAL, checkpoint_folder, load_checkpoint
from tunebench.engine.errors import split_errors
from tunebench.engine.lightning import run_trial
from tunebench.properties.calculators import calculator_from
from tunebench.study.record import CURVES, Readout, Reason, Stage
from tunebench.study.search_space import Treats, available_optimizers
from tunebench.workloads.structure_files import read_prepared

COLUMNS = ["step", "split", "metric", "readout", "value"]


def trained(task):
    """Runs a trial to its end; returns reports, last checkpoint and curve."""
    reports = Reports()
    run_trial(task, reports)
    return reports, load_checkpoint(checkpoint_folder(task.run, task.key.trial_id)), curve(task)


def curve(task) -> pd.DataFrame:
    return pd.read_parquet(task.run / CURVES / f"{task.key.trial_id}.parquet")


def assert_same_state(first, second) -> None:
    """Every tensor and number of two checkpoint sections is identical to the last bit."""
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_state(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for left, right in zip(first, second, strict=True):
            assert_same_state(left, right)
    else:
        assert first == second


@pytest.mark.parametrize("family", ["nequip", "allegro"])
@pytest.mark.parametrize("optimizer", available_optimizers())
def test_a_resumed_trial_equals_an_uninterrupted_one_bit_for_bit(make_task: MakeTask, optimizer: str, family: str):
    _, whole, whole_curve = trained(make_task(optimizer, family=family, name="whole"))
    task = make_task(optimizer, family=family, name="killed")
    with pytest.raises(SystemExit):
        run_trial(task, Reports(stop_after=1))
    reports, resumed, resumed_curve = trained(task)

    assert [report.step for report in reports] == [4, 8]
    assert reports[-1].attempts == 2
    for section in ("module", "optimizer", "scheduler"):
        assert_same_state(whole[section], resumed[section])
    pd.testing.assert_frame_equal(whole_curve[COLUMNS], resumed_curve[COLUMNS], check_exact=True)


def test_a_trial_does_not_depend_on_what_its_process_trained_before(make_task: MakeTask):
    _, first, _ = trained(make_task("soap", name="first"))
    trained(make_task("muon", family="allegro", name="between"))
    _, second, _ = trained(make_task("soap", name="second"))
    assert_same_state(first["module"], second["module"])


def test_errors_are_measured_exactly_at_the_evaluation_steps_with_both_readouts(make_task: MakeTask):
    reports, _, rows = trained(make_task(evaluation_steps=(3, 7, 8)))
    assert [report.step for report in reports] == [3, 7, 8]
    assert reports[-1].outcome is Reason.FINISHED
    validation = rows[(rows.split == "val") & (rows.metric == "forces_mae")]
    assert list(zip(validation.step, validation.readout, strict=True)) == [
        (step, readout) for step in (3, 7, 8) for readout in ("raw", "ema")
    ]
    raw, averaged = (validation[validation.readout == r].value.to_numpy() for r in ("raw", "ema"))
    assert (raw != averaged).all()


def test_schedule_free_reads_out_its_own_average(make_task: MakeTask):
    reports, _, _ = trained(make_task("schedule_free"))
    errors = reports[-1].errors["val"]
    assert set(errors) == {Readout.RAW, Readout.SCHEDULE_FREE}
    assert errors["raw"]["forces_mae"] != errors["schedule_free"]["forces_mae"]


def test_training_lowers_the_loss(make_task: MakeTask):
    reports, _, _ = trained(make_task(steps=100, evaluation_steps=(20, 80, 100), learning_rate=1e-2))
    assert reports[-1].train_loss < 0.5 * reports[0].train_loss


def test_only_the_confirm_stage_opens_the_test_splits_and_only_at_the_horizon(make_task: MakeTask):
    tune, _, _ = trained(make_task(name="tune"))
    confirm, _, _ = trained(make_task(name="confirm", stage=Stage.CONFIRM))
    assert [set(report.errors) for report in tune] == [{"val"}, {"val"}]
    assert [set(report.errors) for report in confirm] == [{"val"}, {"val", "test", "ood:hot"}]


def test_a_loss_that_explodes_ends_the_trial_as_diverged(make_task: MakeTask):
    reports = Reports()
    run_trial(make_task("sgd", steps=40, evaluation_steps=(20, 40), learning_rate=1e12), reports)
    assert reports[-1].outcome is Reason.DIVERGED
    assert "step" in reports[-1].message
    assert reports[-1].step < 40


def test_a_trial_over_its_time_limit_ends_as_timed_out(make_task: MakeTask):
    reports = Reports()
    run_trial(replace(make_task(), time_limit_s=1e-6), reports)
    assert [(report.step, report.outcome) for report in reports] == [(4, Reason.TIMED_OUT)]


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_a_trial_with_few_or_no_force_labels_trains_to_finite_weights(make_task: MakeTask, fraction: float):
    reports, checkpoint, _ = trained(make_task(force_fraction=fraction))
    assert reports[-1].outcome is Reason.FINISHED
    assert all(torch.isfinite(value).all() for value in checkpoint["module"].values() if torch.is_tensor(value))
    assert ("forces_mae" in reports[-1].errors["val"]["raw"]) == (round(fraction * 4) > 0)


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free"])
def test_the_final_checkpoint_opens_with_nequips_own_tools_and_holds_the_averaged_weights(
    make_task: MakeTask, optimizer: str
):
    from nequip.model import ModelFromCheckpoint

    task = make_task(optimizer, stage=Stage.CONFIRM)
    reports, _, _ = trained(task)
    file = checkpoint_folder(task.run, task.key.trial_id) / FINAL
    model = ModelFromCheckpoint(str(file), compile_mode="eager")["sole_model"]
    loader = DataLoader(task_frames(task, "test"), batch_size=32, collate_fn=AtomicDataDict.batched_from_list)
    errors = split_errors(model, loader, stress=False)
    for metric, value in errors.items():
        assert value == pytest.approx(reports[-1].errors["test"][task.averaged][metric], rel=1e-6)
    calculator = calculator_from(file)
    frames = read_prepared(task.data.splits["test"].path)
    misses = [np.abs(calculator.get_forces(frame) - frame.get_forces()).ravel() for frame in frames]
    assert np.concatenate(misses).mean() == pytest.approx(errors["forces_mae"], rel=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "changes", "treats", "line"),
    [
        ("soap", {"max_precondition_dim": 1}, Treats.MATRICES, "soap: found soap on 0 blocks (0.00 % of the weights)"),
        ("muon", {}, Treats.ALL, "muon: found muon on 10 matrix and 1 merged blocks (99."),
    ],
)
def test_a_trial_whose_rule_treats_other_weights_than_promised_ends_before_its_first_step(
    make_task: MakeTask, optimizer: str, changes: dict, treats: Treats, line: str
):
    reports = Reports()
    run_trial(replace(make_task(optimizer, **changes), treats=treats), reports)
    assert [(report.step, report.outcome) for report in reports] == [(0, Reason.MISMATCHED)]
    assert reports[0].message.startswith(line)
    assert sum(row["share"] for row in reports[0].groups) == pytest.approx(1.0)


def test_every_report_carries_the_realised_groups(make_task: MakeTask):
    reports, _, _ = trained(make_task("soap", fctp_view="flat"))
    for report in reports:
        assert [(row["rule"], row["view"]) for row in report.groups] == [("soap", "matrix"), ("adam", "vector")]


def test_a_lack_of_memory_before_the_first_step_books_no_device_seconds(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
):
    def no_memory(*arguments: object) -> None:
        raise MemoryError("cannot allocate")

    monkeypatch.setattr("tunebench.engine.lightning.batch_order", no_memory)
    reports = Reports()
    run_trial(make_task(), reports)
    assert [(report.outcome, report.device_s) for report in reports] == [(Reason.OOM, 0.0)]
    assert reports[0].message == "cannot allocate"


def test_a_kill_before_the_final_checkpoint_repeats_the_last_stretch_and_writes_it(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
):
    task = make_task(stage=Stage.CONFIRM)
    folder = checkpoint_folder(task.run, task.key.trial_id)

    class Killed(BaseException):
        pass

    def killed(*arguments: object, **options: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("lightning.Trainer.save_checkpoint", killed)
        with pytest.raises(Killed):
            run_trial(task, Reports())
    assert not (folder / FINAL).exists()
    reports, _, _ = trained(task)
    assert reports[-1].outcome is Reason.FINISHED
    assert (folder / FINAL).exists()


def test_a_checkpoint_that_a_failing_disk_emptied_starts_the_trial_anew(make_task: MakeTask):
    task = make_task()
    with pytest.raises(SystemExit):
        run_trial(task, Reports(stop_after=1))
    (checkpoint_folder(task.run, task.key.trial_id) / "last.pt").write_bytes(b"")
    reports, _, _ = trained(task)
    assert [report.step for report in reports] == [4, 8]
