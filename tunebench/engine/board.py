"""TensorBoard files: one log directory per trial, and the HPARAMS tab that compares all of them.

The experiment summary (all hyperparameters, all metrics) is written once beside the trials; a trial writes its own
hyperparameters when it starts, its scalars on the true step axis, and its status when it ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams import summary_v2 as hp  # `api` needs TensorFlow in TensorBoard 2.21
from torch.utils.tensorboard import SummaryWriter

from tunebench.engine.task import Evaluation
from tunebench.study.record import BUILDING, TENSORBOARD, Metric, Readout, Reason, TrialKey

OBJECTIVE_TAG = "val/objective"
FINAL_OBJECTIVE_TAG = "final/objective"

_READ_WITHIN_S = 60.0  # TensorBoard looks for new events every 5 s


def write_experiment(run: Path, hyperparameters: Iterable[str]) -> None:
    """Describe the columns of the HPARAMS tab, once per run."""
    folder = run / TENSORBOARD
    if folder.exists() and any(folder.glob("events.*")):
        return
    columns = [hp.HParam(name) for name in ("workload", "optimizer", "stage", "seed_index", *sorted(hyperparameters))]
    metrics = [hp.Metric(FINAL_OBJECTIVE_TAG, display_name="final objective"), hp.Metric(OBJECTIVE_TAG)]
    with whole_events(run, folder) as writer:
        _add_summary(writer, hp.hparams_config_pb(hparams=columns, metrics=metrics))


@contextmanager
def whole_events(run: Path, folder: Path) -> Iterator[SummaryWriter]:
    """A writer of events that replace those of `folder` at once when the block ends well; a kill leaves no half.

    A TensorBoard that shows the folder forgets what it has read of it before.

    Args:
        run: the run directory, where they are built.
        folder: log directory of one of TensorBoard's runs.

    Raises:
        OSError: they cannot be written; those of before stay.
    """
    with TemporaryDirectory(dir=run, prefix=BUILDING) as building:
        with SummaryWriter(building, purge_step=0) as writer:
            yield writer
        (events,) = Path(building).iterdir()
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names and never goes back. Without its data
        # server it stays for ever with a file that was deleted before it had seen the next one.
        read = [file for file in folder.glob("events.*") if time.time() - file.stat().st_mtime > _READ_WITHIN_S]
        events.replace(folder / f"events.out.tfevents.{time.time_ns()}")
        for file in read:
            file.unlink()


class TrialBoard:
    """Writes one trial's events.

    Resuming with `purge_step` hides the events that a killed attempt wrote beyond its last checkpoint.
    """

    def __init__(self, run: Path, key: TrialKey, hyperparameters: dict[str, Any], resumed_step: int) -> None:
        # also from step 0: a first attempt may have been killed between its first events and its first checkpoint
        self._writer = SummaryWriter(str(run / TENSORBOARD / key.trial_id), purge_step=resumed_step + 1)
        session = {
            "workload": key.workload,
            "optimizer": key.optimizer,
            "stage": key.stage.value,
            "seed_index": key.seed_index,
            **{name: "none" if value is None else value for name, value in hyperparameters.items()},
        }
        group = f"{key.workload}.{key.optimizer}.{key.stage}.c{key.config_index:03d}"
        _add_summary(self._writer, hp.hparams_pb(session, trial_id=group, start_time_secs=time.time()))
        self._writer.flush()

    def add(self, evaluation: Evaluation) -> None:
        """Write an evaluation's scalars: SPLIT/METRIC/READOUT, val/objective, train/loss, train/learning_rate."""
        for split, by_readout in evaluation.errors.items():
            for readout, metrics in by_readout.items():
                for metric, value in metrics.items():
                    if metric != Metric.OBJECTIVE:
                        self._writer.add_scalar(f"{split}/{metric}/{readout}", value, evaluation.step)
                    elif readout == Readout.RAW:
                        self._writer.add_scalar(OBJECTIVE_TAG, evaluation.objective, evaluation.step)
        self._writer.add_scalar("train/loss", evaluation.train_loss, evaluation.step)
        self._writer.add_scalar("train/learning_rate", evaluation.learning_rate, evaluation.step)
        self._writer.flush()

    def suspend(self) -> None:
        """Close the file of a trial that has not ended; it may go on elsewhere."""
        self._writer.close()

    def close(self, last: Evaluation | None, reason: Reason) -> None:
        """Write the final metric, infinite where the trial diverged, and the session's end."""
        if last is not None:
            self._writer.add_scalar(FINAL_OBJECTIVE_TAG, last.objective, last.step)
        ended_well = reason in (Reason.FINISHED, Reason.STOPPED_ASHA)
        status = api_pb2.STATUS_SUCCESS if ended_well else api_pb2.STATUS_FAILURE
        _add_summary(self._writer, _session_end(status))
        self._writer.close()


def _add_summary(writer: Any, summary: Summary) -> None:
    writer._get_file_writer().add_summary(summary)  # torch has no public way to add a plugin's summary


def _session_end(status: int) -> Summary:
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time.time())
    data = plugin_data_pb2.HParamsPluginData(session_end_info=info)
    summary = Summary()
    summary.value.add(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(data),
        tensor=metadata.NULL_TENSOR,
    )
    return summary
