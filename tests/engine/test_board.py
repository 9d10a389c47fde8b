from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from tensorboard.plugins.hparams import api_pb2, metadata

from tunebench.engine.board import FINAL_OBJECTIVE_TAG, OBJECTIVE_TAG, TrialBoard, write_experiment
from tunebench.engine.task import Evaluation
from tunebench.study.record import TENSORBOARD, Reason, Stage, TrialKey

KEY = TrialKey(workload="ethanol", optimizer="lamb", stage=Stage.CONFIRM, config_index=3, seed_index=1)
HYPERPARAMETERS = {"learning_rate": 0.01, "clamp": None, "nesterov": True, "kind": "a", "frequency": 10}


def evaluation(step: int, value: float) -> Evaluation:
    metrics = {"forces_mae": value, "objective": 10 * value}
    return Evaluation(
        step=step,
        objective=9 * value,
        errors={"val": {"raw": metrics, "ema": {"forces_mae": 0.9 * value, "objective": 9 * value}}},
        wall_s=1.0,
        device_s=0.5,
        train_loss=100 * value,
        learning_rate=0.01,
        attempts=1,
    )


def board(run: Path, resumed_step: int = 0) -> TrialBoard:
    return TrialBoard(run, KEY, HYPERPARAMETERS, resumed_step)


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    """(step, value) of a tag as TensorBoard shows them."""
    return [(event.step, pytest.approx(event.value)) for event in events(run / TENSORBOARD / KEY.trial_id).Scalars(tag)]


def hparams(folder: Path, tag: str) -> Any:
    """The content of one of the HPARAMS plugin's summaries."""
    content = events(folder).SummaryMetadata(tag).plugin_data.content
    if tag == metadata.EXPERIMENT_TAG:
        return metadata.parse_experiment_plugin_data(content)
    if tag == metadata.SESSION_START_INFO_TAG:
        return metadata.parse_session_start_info_plugin_data(content)
    return metadata.parse_session_end_info_plugin_data(content)


def plain(value: Any) -> Any:
    """The number, string or truth value inside a protobuf value."""
    return getattr(value, value.WhichOneof("kind"))


def test_scalars_stand_at_their_true_steps(tmp_path: Path) -> None:
    trial = board(tmp_path)
    for step, value in ((3, 0.5), (4, 0.25), (400, 0.125)):
        trial.add(evaluation(step, value))
    trial.close(evaluation(400, 0.125), Reason.FINISHED)
    assert scalars(tmp_path, "val/forces_mae/raw") == [(3, 0.5), (4, 0.25), (400, 0.125)]
    assert scalars(tmp_path, "val/forces_mae/ema") == [(3, 0.45), (4, 0.225), (400, 0.1125)]
    assert scalars(tmp_path, OBJECTIVE_TAG) == [(3, 4.5), (4, 2.25), (400, 1.125)]
    assert scalars(tmp_path, "train/loss") == [(3, 50.0), (4, 25.0), (400, 12.5)]
    assert scalars(tmp_path, "train/learning_rate") == [(step, 0.01) for step in (3, 4, 400)]
    assert scalars(tmp_path, FINAL_OBJECTIVE_TAG) == [(400, 1.125)]


def test_evaluations_are_visible_while_the_trial_runs(tmp_path: Path) -> None:
    trial = board(tmp_path)
    trial.add(evaluation(4, 0.5))
    assert scalars(tmp_path, OBJECTIVE_TAG) == [(4, 4.5)]
    trial.close(None, Reason.CRASHED)


@pytest.mark.parametrize(("resumed_step", "kept"), [(4, [(4, 4.5)]), (0, [])])
def test_a_resumed_trial_hides_what_the_killed_attempt_wrote_beyond_its_checkpoint(
    tmp_path: Path, resumed_step: int, kept: list[tuple[int, float]]
) -> None:
    killed = board(tmp_path)
    for step, value in ((4, 0.5), (8, 70.0), (12, 80.0)):
        killed.add(evaluation(step, value))
    resumed = board(tmp_path, resumed_step)
    resumed.add(evaluation(8, 0.25))
    resumed.close(evaluation(8, 0.25), Reason.FINISHED)
    assert scalars(tmp_path, OBJECTIVE_TAG) == [*kept, (8, 2.25)]


def test_the_hyperparameters_are_there_from_the_start(tmp_path: Path) -> None:
    trial = board(tmp_path)
    start = hparams(tmp_path / TENSORBOARD / KEY.trial_id, metadata.SESSION_START_INFO_TAG)
    assert {name: plain(value) for name, value in start.hparams.items()} == {
        "workload": "ethanol",
        "optimizer": "lamb",
        "stage": "confirm",
        "seed_index": 1,
        "learning_rate": 0.01,
        "clamp": "none",
        "nesterov": True,
        "kind": "a",
        "frequency": 10,
    }
    assert start.start_time_secs > 0
    trial.close(None, Reason.CRASHED)


def test_seeds_of_one_configuration_form_a_group(tmp_path: Path) -> None:
    board(tmp_path).close(None, Reason.CRASHED)
    start = hparams(tmp_path / TENSORBOARD / KEY.trial_id, metadata.SESSION_START_INFO_TAG)
    assert start.group_name == "ethanol.lamb.confirm.c003"


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (reason, "STATUS_SUCCESS" if reason in (Reason.FINISHED, Reason.STOPPED_ASHA) else "STATUS_FAILURE")
        for reason in Reason
    ],
)
def test_the_session_ends_with_its_status(tmp_path: Path, reason: Reason, status: str) -> None:
    trial = board(tmp_path)
    folder = tmp_path / TENSORBOARD / KEY.trial_id
    with pytest.raises(KeyError):
        hparams(folder, metadata.SESSION_END_INFO_TAG)
    trial.close(None, reason)
    end = hparams(folder, metadata.SESSION_END_INFO_TAG)
    assert api_pb2.Status.Name(end.status) == status
    assert end.end_time_secs > 0


def test_a_diverged_objective_can_be_written(tmp_path: Path) -> None:
    trial = board(tmp_path)
    trial.close(evaluation(4, math.inf), Reason.DIVERGED)
    assert scalars(tmp_path, FINAL_OBJECTIVE_TAG) == [(4, math.inf)]


def test_the_experiment_is_described_once(tmp_path: Path) -> None:
    write_experiment(tmp_path, {"learning_rate", "clamp"})
    folder = tmp_path / TENSORBOARD
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    write_experiment(tmp_path, {"learning_rate", "clamp"})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    assert len(files) == 1
    experiment = hparams(folder, metadata.EXPERIMENT_TAG)
    assert [column.name for column in experiment.hparam_infos] == [
        "workload",
        "optimizer",
        "stage",
        "seed_index",
        "clamp",
        "learning_rate",
    ]
    assert [metric.name.tag for metric in experiment.metric_infos] == [FINAL_OBJECTIVE_TAG, OBJECTIVE_TAG]


def test_tensorboard_finds_the_experiment_and_each_trial_as_a_run(tmp_path: Path) -> None:
    write_experiment(tmp_path, {"learning_rate"})
    trial = board(tmp_path)
    trial.add(evaluation(4, 0.5))
    trial.close(evaluation(4, 0.5), Reason.FINISHED)
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path / TENSORBOARD)).Reload()
    assert set(multiplexer.Runs()) == {".", KEY.trial_id}
    assert OBJECTIVE_TAG in multiplexer.Runs()[KEY.trial_id]["scalars"]
