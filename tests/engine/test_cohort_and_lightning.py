"""The cohort engine against the lightning engine: same task, same curve, same weights, same checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from nequip.data import AtomicDataDict
from torch.utils.data import DataLoader

from benchmarks.engine_agreement import nudging
from tests.engine.conftest import MakeTask, Reports
from tests.engine.test_cohort import (
    CrystalTrials,
    assert_same_slot,
    assert_same_to_rounding,
    assert_same_trial,
    checkpoint,
    crystal_trials,
    measured,
    run_cohort,
)
from tunebench.engine.batches import task_frames
from tunebench.engine.checkpoints import FINAL, checkpoint_folder
from tunebench.engine.errors import split_errors
from tunebench.engine.lightning import run_trial
from tunebench.engine.nequip_config import training_module
from tunebench.engine.task import Evaluation, TrialTask
from tunebench.study.record import ERROR_PARTS, Reason, Stage
from tunebench.study.search_space import available_optimizers
from tunebench.study.spec import Family

# Most agree to 1e-13 or better. Two engines sum in different orders, and SOAP makes more of that.
ROUNDING = {"soap": 1e-8, "soap_muon": 1e-8}
Mixed = dict[tuple[Family, str], tuple[TrialTask, list[Evaluation]]]
SETTINGS: dict[str, Any] = {"steps": 24, "evaluation_steps": (2, 12, 24), "stage": Stage.CONFIRM}
COMPARED = {Family.NEQUIP: available_optimizers(), Family.ALLEGRO: ("adamw", "schedule_free", "muon", "soap")}


@pytest.fixture(scope="module")
def trials(tmp_path_factory: pytest.TempPathFactory) -> CrystalTrials:
    return crystal_trials(tmp_path_factory.mktemp("crystals"))


@pytest.fixture(scope="module")
def mixed(trials: CrystalTrials) -> Mixed:
    """Trials of every optimizer after one cohort of each family, with their reports."""
    found: Mixed = {}
    for family, optimizers in COMPARED.items():
        tasks = [trials.task(name, index=index, family=family, **SETTINGS) for index, name in enumerate(optimizers)]
        reports = run_cohort(trials.cohort(len(tasks), tasks[0]), tasks)
        found |= {(family, task.key.optimizer): (task, reports[task.key.trial_id]) for task in tasks}
    return found


def lightning(task: TrialTask) -> list[Evaluation]:
    reports = Reports()
    run_trial(task, reports)
    return reports


def assert_same_weights(found: TrialTask, expected: TrialTask, relative: float) -> None:
    """Weights and averages in the last checkpoints, relative to the largest of each tensor."""
    one, other = checkpoint(found)["module"], checkpoint(expected)["module"]
    assert one.keys() == other.keys()
    for name, value in other.items():
        if torch.is_tensor(value) and value.is_floating_point() and value.numel():
            difference = (one[name] - value).abs().max()
            assert difference <= relative * value.abs().max(), (name, float(difference))
        else:
            assert torch.equal(one[name], value) if torch.is_tensor(value) else one[name] == value


@pytest.mark.parametrize(("family", "optimizer"), [(family, name) for family in COMPARED for name in COMPARED[family]])
def test_a_cohort_of_all_optimizers_trains_each_as_the_lightning_engine_does(
    trials: CrystalTrials, mixed: Mixed, family: Family, optimizer: str
) -> None:
    task, found = mixed[family, optimizer]
    other = trials.task(optimizer, index=task.key.config_index, family=family, **SETTINGS)
    expected = lightning(other)
    assert expected[-1].errors.keys() == {"val", "test", "ood:strained"}
    assert all(len(readouts) == 2 for readouts in expected[-1].errors.values())
    assert_same_to_rounding(found, expected, ROUNDING.get(optimizer, 1e-10))
    assert_same_weights(task, other, 100 * ROUNDING.get(optimizer, 1e-12))
    one, another = parts_of(task), parts_of(other)
    values = [part.pop("value") for part in one], [part.pop("value") for part in another]
    assert one == [{**part, "trial": task.key.trial_id} for part in another]
    assert values[0] == pytest.approx(values[1], rel=ROUNDING.get(optimizer, 1e-10))


def parts_of(task: TrialTask) -> list[dict[str, Any]]:
    return pq.read_table(task.run / ERROR_PARTS / f"{task.key.trial_id}.parquet").to_pylist()


def test_errors_of_the_parts_of_a_split_add_up_to_those_of_the_whole(trials: CrystalTrials, mixed: Mixed) -> None:
    task, reports = mixed[Family.NEQUIP, "soap"]
    rows = parts_of(task)
    assert set(trials.data.splits["ood:strained"].config_types) == {"", "2 atoms", "4 atoms"}
    for split, readouts in reports[-1].errors.items():
        for readout, metrics in readouts.items():
            own = [row for row in rows if (row["split"], row["readout"]) == (split, readout)]
            assert bool(own) == (split != "val")  # seen while it selects
            for part in {row["part"] for row in own}:
                for metric in {row["metric"] for row in own if row["part"] == part and row["metric"].endswith("mae")}:
                    parts = [row for row in own if (row["part"], row["metric"]) == (part, metric)]
                    mean = np.average([row["value"] for row in parts], weights=[row["labels"] for row in parts])
                    assert mean == pytest.approx(metrics[metric], rel=1e-9), (split, part, metric)
    assert {row["name"] for row in rows if row["part"] == "element"} == {"C", "Si"}


def test_what_is_compared_is_clipped_and_half_labelled_and_weighs_stress(trials: CrystalTrials) -> None:
    usual = trials.task("sgd", steps=6, evaluation_steps=(6,))
    unclipped = trials.task("sgd", steps=6, evaluation_steps=(6,), clip_global_norm=None)
    losses = [lightning(task)[-1].train_loss for task in (usual, unclipped)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)
    assert task_frames(usual, "train").labelled.sum() == 6
    assert usual.workload.loss.stress > 0
    assert usual.data.has_stress


@pytest.mark.parametrize("optimizer", ["soap", "soap_muon"])
def test_soap_amplifies_one_ulp_in_the_weights_to_rounding_only(trials: CrystalTrials, optimizer: str) -> None:
    settings: dict[str, Any] = {"steps": 12, "evaluation_steps": (1, 2, 6, 12)}
    task = trials.task(optimizer, **settings)
    expected = lightning(task)
    with nudging(1):
        found = lightning(trials.task(optimizer, **settings))
    departures = [abs(one.train_loss / other.train_loss - 1) for one, other in zip(found, expected, strict=True)]
    assert 0.0 < max(departures) < 1e-9


def test_in_float32_molecules_train_as_under_lightning_to_the_same_precision(
    make_task: MakeTask, trials: CrystalTrials
) -> None:
    optimizers = ("adamw", "schedule_free", "soap")
    tasks = [make_task(name, name=f"cohort-{name}") for name in optimizers]
    found = run_cohort(trials.cohort(3, tasks[0]), tasks)
    for name, task in zip(optimizers, tasks, strict=True):
        expected = lightning(make_task(name, name=f"lightning-{name}"))
        assert "stress_mae" not in expected[-1].errors["val"]["raw"]
        for one, other in zip(found[task.key.trial_id], expected, strict=True):
            assert one.step == other.step
            assert one.train_loss == pytest.approx(other.train_loss, rel=1e-4)
            assert one.objective == pytest.approx(other.objective, rel=1e-3)


# --- going on elsewhere ----------------------------------------------------------------------------------------------

MOVED = ("adamw", "schedule_free", "muon", "soap_muon")
MOVES: dict[str, Any] = {"steps": 10, "evaluation_steps": (4, 10)}
MOVES_SOAP: dict[str, Any] = {"precondition_frequency": 3}


def moving(trials: CrystalTrials, optimizer: str) -> TrialTask:
    return trials.task(optimizer, **MOVES, **(MOVES_SOAP if "soap" in optimizer else {}))


def clocked(trials: CrystalTrials) -> TrialTask:
    """A neighbour that reports at every step, so that things can happen in between the subject's reports."""
    return trials.task("sgd", index=1, steps=10, evaluation_steps=range(1, 11))


@pytest.mark.parametrize("optimizer", MOVED)
def test_a_slot_that_is_saved_between_evaluations_goes_on_in_another_cohort_bit_for_bit(
    trials: CrystalTrials, optimizer: str
) -> None:
    whole = moving(trials, optimizer)
    expected = run_cohort(trials.cohort(3, whole), [whole])[whole.key.trial_id]

    task, clock = moving(trials, optimizer), clocked(trials)
    name, cohort = task.key.trial_id, trials.cohort(3, task)
    states = {}

    def save(reporter: str, report: Evaluation) -> None:
        if reporter == clock.key.trial_id and report.step == 6:
            states[6] = cohort.state(name)
            cohort.leave(name)

    run_cohort(cohort, [task, clock], save)
    assert (states[6].step, states[6].loss_count) == (6, 2.0)

    elsewhere = trials.cohort(3, task)
    for index, neighbour in enumerate(("adamw", optimizer)):
        elsewhere.join(trials.task(neighbour, index=2 + index, steps=10, evaluation_steps=(10,)))
    missed = elsewhere.join(task, states[6])
    assert missed is not None
    assert measured(missed) == measured(expected[0])
    assert_same_slot(elsewhere.state(name), states[6])
    assert_same_trial(run_cohort(elsewhere)[name], task, expected[1:], whole)


@pytest.mark.parametrize("optimizer", MOVED)
def test_a_trial_of_a_cohort_that_died_goes_on_from_its_last_evaluation_bit_for_bit(
    trials: CrystalTrials, optimizer: str
) -> None:
    whole = moving(trials, optimizer)
    expected = run_cohort(trials.cohort(3, whole), [whole])[whole.key.trial_id]

    task, clock = moving(trials, optimizer), clocked(trials)
    dying = trials.cohort(3, task)
    for joining in (clock, task):
        dying.join(joining)
    steps = 0
    while steps < 7:
        for name, report in dying.advance():
            steps = report.step
            dying.go_on(name)
    del dying

    cohort = trials.cohort(3, task)
    cohort.join(trials.task(optimizer, index=2, steps=10, evaluation_steps=(10,)))
    missed = cohort.join(task)
    assert missed is not None
    assert measured(missed) == measured(expected[0])
    last = run_cohort(cohort)[task.key.trial_id]
    assert [report.attempts for report in last] == [2]
    assert_same_trial(last, task, expected[1:], whole)


@pytest.mark.parametrize(
    ("family", "optimizer"), [*((Family.NEQUIP, name) for name in MOVED), (Family.ALLEGRO, "adamw")]
)
def test_a_checkpoint_of_either_engine_goes_on_in_the_other(
    trials: CrystalTrials, family: Family, optimizer: str
) -> None:
    settings: dict[str, Any] = {**MOVES, "family": family, **(MOVES_SOAP if "soap" in optimizer else {})}
    slots = 3 if family is Family.NEQUIP else len(COMPARED[family])
    whole = trials.task(optimizer, **settings)
    expected = lightning(whole)

    to_cohort = trials.task(optimizer, **settings)
    with pytest.raises(SystemExit):
        run_trial(to_cohort, Reports(stop_after=1))
    cohort = trials.cohort(slots, to_cohort)
    missed = cohort.join(to_cohort)
    assert missed is not None
    assert missed.step == 4
    found = run_cohort(cohort)[to_cohort.key.trial_id]

    to_lightning = trials.task(optimizer, **settings)
    cohort = trials.cohort(slots, to_lightning)
    cohort.join(to_lightning)
    cohort.advance()
    cohort.leave(to_lightning.key.trial_id)
    resumed = lightning(to_lightning)
    assert [report.step for report in resumed] == [4, 10]

    for task, reports in ((to_cohort, [missed, *found]), (to_lightning, resumed)):
        assert_same_to_rounding(reports, expected, ROUNDING.get(optimizer, 1e-10))
        assert_same_weights(task, whole, 100 * ROUNDING.get(optimizer, 1e-12))
        assert reports[-1].attempts == 2


@pytest.mark.parametrize("optimizer", ["adamw", "schedule_free"])
def test_the_final_checkpoint_of_a_cohort_opens_with_nequips_own_tools_and_holds_the_averaged_weights(
    mixed: Mixed, optimizer: str
) -> None:
    from nequip.model import ModelFromCheckpoint

    task, reports = mixed[Family.NEQUIP, optimizer]
    assert reports[-1].outcome is Reason.FINISHED
    file = checkpoint_folder(task.run, task.key.trial_id) / FINAL
    model = ModelFromCheckpoint(str(file), compile_mode="eager")["sole_model"]
    loader: DataLoader[Any] = DataLoader(
        task_frames(task, "test"), batch_size=32, collate_fn=AtomicDataDict.batched_from_list
    )
    errors = split_errors(model, loader, stress=True)
    measured_last = reports[-1].errors["test"]
    assert errors == pytest.approx(measured_last[task.averaged], rel=1e-6)
    assert errors != pytest.approx(measured_last["raw"], rel=1e-6)


def test_the_final_checkpoint_of_every_neighbour_tells_of_its_own_trial(mixed: Mixed) -> None:
    for task, _ in mixed.values():
        saved = torch.load(
            checkpoint_folder(task.run, task.key.trial_id) / FINAL, map_location="cpu", weights_only=False
        )
        own = training_module(task)
        assert saved["hyper_parameters"]["optimizer"] == own["optimizer"], task.key.trial_id
        assert saved["hyper_parameters"]["info_dict"]["training_module"]["optimizer"] == own["optimizer"]
        assert "optimizer_states" not in saved
