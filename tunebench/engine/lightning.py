"""The `lightning` engine: one trial, NequIP's training module, Lightning's Trainer, this process.

Training is one pass over a precomputed order of batches that ends at the horizon, so a trial resumes at any
evaluation step without touching Lightning's loop state, and sees the batches `nequip-train` would see.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning
import torch
from nequip.data import AtomicDataDict
from nequip.utils.global_state import set_global_state
from torch.utils.data import DataLoader

from tunebench.engine.batches import on_device, task_frames
from tunebench.engine.book import TrialBook
from tunebench.engine.checkpoints import FINAL
from tunebench.engine.error_parts import PartRow, RunningParts, SplitParts
from tunebench.engine.errors import split_errors
from tunebench.engine.graphs import synchronize
from tunebench.engine.modules import trial_module
from tunebench.engine.nequip_config import info_dict, training_module
from tunebench.engine.promise import check_groups
from tunebench.engine.readouts import readout_weights
from tunebench.engine.refinement import add_refinement
from tunebench.engine.task import Errors, Evaluation, Report, TrialTask
from tunebench.optim.matrix_view import trainable_parameters
from tunebench.optim.packing import Tensors
from tunebench.optim.realised import BrokenPromise, realised_groups
from tunebench.study.files import replacing
from tunebench.study.record import Readout, Reason, Split, Stage
from tunebench.workloads.frames import PreparedFrames
from tunebench.workloads.order import batch_order

_FINITE_CHECK_EVERY = {"cpu": 1, "cuda": 16}  # reading the loss waits for a GPU


def run_trial(task: TrialTask, report: Report, beat: Callable[[], None] = lambda: None) -> Evaluation:
    """Train one trial to its end, or from its last checkpoint to its end, one horizon after the other.

    What is decided on is written (curve, TensorBoard, checkpoint) before it is reported; the last report carries the
    outcome. `report` may stop the trial with `SystemExit`, which leaves a checkpoint.

    Args:
        task: the trial.
        report: takes every evaluation.
        beat: called after every step and every batch of an evaluation.

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
    trial = _Trial(task, report, beat)
    reason: Reason | None = Reason.CRASHED
    try:
        outcome = trial.train()
        while outcome is None and (longer := trial.task.lengthened):
            trial.book.close(None)
            trial = _Trial(longer, report, beat)
            outcome = trial.train()
        reason = outcome
    except SystemExit:
        reason = None  # paused or stopped, which only the driver knows; it writes the end of a stopped trial
        raise
    finally:
        trial.book.close(reason)
    return trial.book.last


class _Ended(Exception):
    """Leaves Lightning's loop after the last report."""


class _Trial(lightning.Callback):
    """State of a running trial, and the Lightning callback that evaluates it."""

    def __init__(self, task: TrialTask, report: Report, beat: Callable[[], None]) -> None:
        self.book, self.report, self.beat = TrialBook(task), report, beat
        self.task = task = self.book.task
        config = training_module(task)
        self.module = trial_module(task, config, info_dict(task, config))
        self.optimizer: Any = None
        self.restored = self.book.take_checkpoint()
        self.step = self.book.last.step
        self.training_since: float | None = None  # None while the device does anything but training steps
        self.frames: dict[str, PreparedFrames] = {}

    def train(self) -> Reason | None:
        """Train until the horizon or an early end, which is reported; None where a longer horizon follows."""
        if self.restored:  # the driver may have missed it
            self.report(self.book.last)
        try:
            if self.book.last.outcome is None and not self.book.horizon_is_over:
                self._fit()
        except _Ended:
            pass
        except (torch.OutOfMemoryError, MemoryError) as error:
            self._end(Reason.OOM, (str(error) or "out of memory").splitlines()[0])
        if self.book.last.outcome is None and not self.book.horizon_is_over:
            raise RuntimeError(f"{self.task.key.trial_id}: training stopped at step {self.step} of its horizon")
        return self.book.last.outcome

    def _fit(self) -> None:
        workload = self.task.workload
        trainer = lightning.Trainer(
            accelerator="gpu" if self.task.device == "cuda" else "cpu",
            devices=1,
            max_steps=self.task.horizon - self.step,
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
        self.book.groups = realised_groups(self.optimizer)
        try:
            check_groups(self.task, self.book.groups, self.module.model)
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
        self.beat()
        if self.step % _FINITE_CHECK_EVERY[self.task.device] == 0:
            loss = outputs["loss"].item()
            if not math.isfinite(loss):
                self._end(Reason.DIVERGED, f"training loss {loss} at step {self.step}")
                raise _Ended
        if self.step in self.task.evaluation_steps:
            self._book_training()
            self._evaluate(trainer)
            self.training_since = self._now()
        elif self.book.note_is_due:
            self._book_training()
            self.book.note(self.step)
            self.training_since = self._now()

    def _evaluate(self, trainer: Any) -> None:
        parts: list[PartRow] = []
        errors = self._errors(parts)
        last = self.book.evaluated(
            self.step,
            errors,
            train_loss=self.module.mean_loss(),
            learning_rate=trainer.optimizers[0].param_groups[0]["lr"],
            save=lambda: self._state(trainer),
            refinement=add_refinement(self.task, self.step, errors, parts, self.module.model, self._weights, self.beat),
            parts=parts,
        )
        try:
            self.report(last)
        except SystemExit:
            self.book.keep(lambda: self._state(trainer))
            raise
        if last.outcome not in (None, Reason.FINISHED):
            raise _Ended

    def _weights(self, readout: Readout) -> Tensors:
        """Copies of the weights of a readout, by name."""
        with readout_weights(self.module, self.optimizer, readout):
            return {name: p.detach().clone() for name, p in trainable_parameters(self.module.model).items()}

    def _errors(self, parts: list[PartRow]) -> Errors:
        """Errors on the validation split with both readouts, and at the horizon on the splits opened once.

        Those of the parts of the latter are added to `parts`.
        """
        at_horizon = self.step == self.task.workload.max_steps
        splits = ("val", *(self.task.final_splits if at_horizon else ()))
        errors: Errors = {split: {} for split in splits}
        for readout in (Readout.RAW, self.task.averaged):
            with readout_weights(self.module, self.optimizer, readout):
                for split in splits:
                    errors[split][readout.value] = self._split_errors(split, readout, parts)
        return errors

    def _split_errors(self, split: str, readout: Readout, parts: list[PartRow]) -> dict[str, float]:
        workload = self.task.workload
        loader: DataLoader[Any] = DataLoader(
            self._frames(split),
            batch_size=workload.evaluation_batch_size,
            collate_fn=AtomicDataDict.batched_from_list,
        )
        batches = (self._evaluated(batch) for batch in loader)
        stress = self.task.weighs_stress
        if split == Split.VAL:
            return split_errors(self.module, batches, stress=stress)
        running = RunningParts(SplitParts.of(self.task.data, split, stress=stress))
        errors = split_errors(self.module, batches, stress=stress, watch=running.add)
        parts += running.table(readout.value)
        return errors

    def _evaluated(self, batch: AtomicDataDict.Type) -> AtomicDataDict.Type:
        """A batch that is about to be evaluated; the one before it is done."""
        self.beat()
        return on_device(batch, self.module.device)

    def _frames(self, split: str) -> PreparedFrames:
        if split not in self.frames:
            self.frames[split] = task_frames(self.task, split)
        return self.frames[split]

    def _state(self, trainer: Any) -> dict[str, Any]:
        if self.book.last.outcome is Reason.FINISHED and self.task.key.stage is Stage.CONFIRM:
            with replacing(
                self.book.folder / FINAL
            ) as partial:  # before the checkpoint that says the trial is finished
                trainer.save_checkpoint(partial, weights_only=True)
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        }

    def _end(self, reason: Reason, message: str) -> None:
        """Report an end between two evaluations."""
        self._book_training()
        self.report(self.book.ended(self.step, reason, message))

    def _book_training(self) -> None:
        """Add the training since the last evaluation to the device-seconds."""
        if self.training_since is not None:
            self.book.device_s += self._now() - self.training_since
            self.training_since = None

    def _now(self) -> float:
        synchronize(torch.device(self.task.device))
        return time.perf_counter()


def _quiet_lightning() -> None:
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    warnings.filterwarnings("ignore", module=r"nequip\..*")
