"""The `lightning` engine: one trial, NequIP's training module, Lightning's Trainer, this process.

Training is one pass over a precomputed order of batches that ends at the horizon, so a trial resumes at any
evaluation step without touching Lightning's loop state, and sees the batches `nequip-train` would see.
"""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from dataclasses import replace
from typing import Any

import lightning
import torch
from nequip.data import AtomicDataDict
from nequip.utils.global_state import set_global_state
from torch.utils.data import DataLoader

from tunebench.engine.batches import on_device, task_frames
from tunebench.engine.board import TrialBoard
from tunebench.engine.checkpoints import FINAL, checkpoint_folder, load_checkpoint, save_checkpoint
from tunebench.engine.curves import curve_rows, write_curve
from tunebench.engine.errors import split_errors
from tunebench.engine.loss import LossWeights
from tunebench.engine.modules import build_module
from tunebench.engine.nequip_config import info_dict, training_module
from tunebench.engine.promise import check_groups
from tunebench.engine.readouts import readout_weights
from tunebench.engine.task import Errors, Evaluation, Report, TrialTask
from tunebench.optim.realised import BrokenPromise, realised_groups
from tunebench.study.files import replacing
from tunebench.study.objective import objective_value, selected_readout
from tunebench.study.record import Metric, Readout, Reason, Split, Stage
from tunebench.workloads.frames import PreparedFrames
from tunebench.workloads.order import batch_order

_FINITE_CHECK_EVERY = {"cpu": 1, "cuda": 16}  # reading the loss waits for a GPU


def run_trial(task: TrialTask, report: Report) -> Evaluation:
    """Train one trial to its end, or from its last checkpoint to its end.

    Every evaluation is written (curve, TensorBoard, checkpoint) before it is reported; the last report carries the
    outcome. `report` may stop the trial with `SystemExit`.

    Returns:
        The last report.

    Raises:
        WorkloadError: the data or the model's arguments are refused.
        Exception: whatever broke the training apart from divergence, lack of memory, the time limit and update rules
            that treat other weights than the search space promises.
    """
    set_global_state()
    torch.set_num_threads(task.threads)
    _quiet_lightning()
    trial = _Trial(task, report)
    reason = Reason.CRASHED
    try:
        reason = trial.train()
    except SystemExit:
        reason = Reason.STOPPED_ASHA
        raise
    finally:
        trial.board.close(trial.last, reason)
    return trial.last


class _Ended(Exception):
    """Leaves Lightning's loop after the last report."""


class _Trial(lightning.Callback):
    """State of a running trial, and the Lightning callback that evaluates it."""

    def __init__(self, task: TrialTask, report: Report) -> None:
        self.task, self.report = task, report
        self.began = time.perf_counter()
        self.folder = checkpoint_folder(task.run, task.key.trial_id)
        config = training_module(task)
        weights = LossWeights.of(task.workload.loss)
        self.module = build_module(config, weights, task.averaged, info_dict(task, config))
        self.optimizer: Any = None
        self.groups: list[dict[str, Any]] = []
        self.restored = load_checkpoint(self.folder)
        self.last = _evaluation_before(self.restored)
        self.step = self.last.step
        self.device_s = self.last.device_s
        self.earlier_wall_s = self.last.wall_s
        self.attempts = self.last.attempts + 1
        self.rows = [tuple(row) for row in self.restored["rows"]] if self.restored else []
        self.training_since: float | None = None  # None while the device does anything but training steps
        self.frames: dict[str, PreparedFrames] = {}
        self.board = TrialBoard(task.run, task.key, task.hyperparameters, self.step)

    def train(self) -> Reason:
        """Train until the horizon or an early end, which is reported."""
        if self.restored:  # the driver may have missed it
            self.report(self.last)
        try:
            if self.last.outcome is None:
                self._fit()
        except _Ended:
            pass
        except (torch.OutOfMemoryError, MemoryError) as error:
            self._end(Reason.OOM, (str(error) or "out of memory").splitlines()[0])
        if self.last.outcome is None:
            raise RuntimeError(f"{self.task.key.trial_id}: training stopped at step {self.step} of its horizon")
        return self.last.outcome

    def _fit(self) -> None:
        workload = self.task.workload
        trainer = lightning.Trainer(
            accelerator="gpu" if self.task.device == "cuda" else "cpu",
            devices=1,
            max_steps=workload.max_steps - self.step,
            max_epochs=1,
            gradient_clip_val=workload.clip_global_norm,
            callbacks=[self],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            inference_mode=False,
        )
        frames = self._frames(Split.TRAIN)
        order = batch_order(len(frames), workload.batch_size, workload.max_steps, self.task.seeds.order)
        loader: DataLoader[Any] = DataLoader(
            frames, batch_sampler=order[self.step :], collate_fn=AtomicDataDict.batched_from_list
        )
        trainer.fit(self.module, train_dataloaders=loader)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the optimizer and restore the checkpoint, now that the optimizer exists."""
        self.optimizer = trainer.optimizers[0]
        self.groups = realised_groups(self.optimizer)
        try:
            check_groups(self.task, self.groups, self.module.model)
        except BrokenPromise as error:
            self._end(Reason.MISMATCHED, str(error))
            raise _Ended from error
        if self.restored:
            self.module.load_state_dict(self.restored["module"])
            self.optimizer.load_state_dict(self.restored["optimizer"])
            trainer.lr_scheduler_configs[0].scheduler.load_state_dict(self.restored["scheduler"])
            self.restored = None
        self.training_since = self._now()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the step, look for divergence, evaluate where the study asks for it."""
        self.step += 1
        if self.step % _FINITE_CHECK_EVERY[self.task.device] == 0:
            loss = outputs["loss"].item()
            if not math.isfinite(loss):
                self._end(Reason.DIVERGED, f"training loss {loss} at step {self.step}")
                raise _Ended
        if self.step in self.task.evaluation_steps:
            self._book_training()
            self._evaluate(trainer)
            self.training_since = self._now()

    def _evaluate(self, trainer: Any) -> None:
        evaluation = self._measure(trainer)
        outcome, message = self._outcome(evaluation)
        self.last = replace(evaluation, outcome=outcome, message=message)
        self.rows += curve_rows(self.task.key.trial_id, self.last)
        write_curve(self.task.run, self.task.key.trial_id, self.rows)
        self.board.add(self.last)
        if outcome is not Reason.DIVERGED:
            self._save(trainer)
        self.report(self.last)
        if outcome not in (None, Reason.FINISHED):
            raise _Ended

    def _outcome(self, evaluation: Evaluation) -> tuple[Reason | None, str]:
        raw = evaluation.errors[Split.VAL][Readout.RAW][Metric.OBJECTIVE]
        if not math.isfinite(raw):
            return Reason.DIVERGED, f"validation error {raw} at step {self.step}"
        if self.step == self.task.workload.max_steps:
            return Reason.FINISHED, ""
        limit = self.task.time_limit_s
        if limit is not None and evaluation.wall_s > limit:
            return Reason.TIMED_OUT, f"{evaluation.wall_s:.0f} s at step {self.step}, allowed: {limit:g} s"
        return None, ""

    def _measure(self, trainer: Any) -> Evaluation:
        """Errors on the validation split with both readouts, and at the horizon on the splits opened once."""
        at_horizon = self.step == self.task.workload.max_steps
        splits = ("val", *(self.task.final_splits if at_horizon else ()))
        errors: Errors = {split: {} for split in splits}
        for readout in (Readout.RAW, self.task.averaged):
            with readout_weights(self.module, self.optimizer, readout):
                for split in splits:
                    errors[split][readout.value] = self._split_errors(split)
        objectives = {}
        for readout_name, metrics in errors["val"].items():
            objectives[readout_name] = objective_value(metrics, self.task.objective)
            metrics[Metric.OBJECTIVE.value] = objectives[readout_name]
        return Evaluation(
            step=self.step,
            objective=objectives[str(selected_readout(objectives, self.task.objective))],
            errors=errors,
            wall_s=self.wall_s,
            device_s=self.device_s,
            train_loss=self.module.mean_loss(),
            learning_rate=trainer.optimizers[0].param_groups[0]["lr"],
            attempts=self.attempts,
            groups=self.groups,
        )

    def _split_errors(self, split: str) -> dict[str, float]:
        workload = self.task.workload
        loader: DataLoader[Any] = DataLoader(
            self._frames(split),
            batch_size=workload.evaluation_batch_size,
            collate_fn=AtomicDataDict.batched_from_list,
        )
        batches = (on_device(batch, self.module.device) for batch in loader)
        weighed = workload.loss.stress > 0 or self.task.objective.stress > 0
        return split_errors(self.module, batches, stress=self.task.data.has_stress and weighed)

    def _frames(self, split: str) -> PreparedFrames:
        if split not in self.frames:
            self.frames[split] = task_frames(self.task, split)
        return self.frames[split]

    def _save(self, trainer: Any) -> None:
        if self.last.outcome is Reason.FINISHED and self.task.key.stage is Stage.CONFIRM:
            with replacing(self.folder / FINAL) as partial:  # before the checkpoint that says the trial is finished
                trainer.save_checkpoint(partial)
        save_checkpoint(
            self.folder,
            {
                "evaluation": json.dumps(self.last.to_plain()),
                "rows": self.rows,
                "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            },
        )

    def _end(self, reason: Reason, message: str) -> None:
        """Report an end between two evaluations."""
        self._book_training()
        self.last = replace(
            self.last,
            step=self.step,
            objective=math.inf,
            errors={},
            wall_s=self.wall_s,
            device_s=self.device_s,
            attempts=self.attempts,
            groups=self.groups,
            outcome=reason,
            message=message,
        )
        self.report(self.last)

    @property
    def wall_s(self) -> float:
        """Seconds since the trial began; earlier attempts count up to their last checkpoint."""
        return self.earlier_wall_s + time.perf_counter() - self.began

    def _book_training(self) -> None:
        """Add the training since the last evaluation to the device-seconds."""
        if self.training_since is not None:
            self.device_s += self._now() - self.training_since
            self.training_since = None

    def _now(self) -> float:
        if self.task.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _evaluation_before(checkpoint: dict[str, Any] | None) -> Evaluation:
    """What the checkpoint had measured; step 0 where there is none."""
    if checkpoint:
        return Evaluation.from_plain(json.loads(checkpoint["evaluation"]))
    return Evaluation(
        step=0,
        objective=math.inf,
        errors={},
        wall_s=0.0,
        device_s=0.0,
        train_loss=math.nan,
        learning_rate=math.nan,
        attempts=0,
    )


def _quiet_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", module=r"nequip\..*")
