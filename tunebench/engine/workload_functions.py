"""A workload on a device: its data, and its model as functions of the weights of many slots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.func import vmap

from tunebench.engine.batches import task_frames
from tunebench.engine.error_parts import SplitParts
from tunebench.engine.functional import OUTPUTS, FunctionalModel, functional_model
from tunebench.engine.fused import Evaluate, LossGradient, SlotFunction, quickest, unfuse
from tunebench.engine.loss import LossWeights
from tunebench.engine.padding import BatchShape, PaddingPlan, padding_plan
from tunebench.engine.resident import ResidentFrames, StaticBatches, assemble, resident_frames, static_batches
from tunebench.engine.task import TrialTask
from tunebench.optim.packing import Tensors
from tunebench.study.record import Split

_NOT_READ = ("atomic_numbers", "pbc")
_EDGES_IN = {"cpu": 1, "cuda": 32}
"""Edges of a training batch are a multiple of this, so that `long_sums_in_parts` finds parts of a good length."""

Called = Callable[..., Any]


class WorkloadFunctions:
    """Data that stay on the device, and functions of stacked weights that are traced once for every shape.

    Args:
        task: any trial of the workload; only what all trials of the workload share is read.
        model: a model of the workload on the CPU; it visits the device to be traced.
        cache: folder for traces and compiled graphs; None keeps none.
        compiled: compile the functions with Inductor where they agree with the plain graphs and are faster.
        prepare: called before whatever is traced or compiled, which may take a thousand steps' time.

    Attributes:
        padding: shapes of the training batches and what they waste.
        has_stress: stresses are trained or judged.
    """

    def __init__(
        self,
        task: TrialTask,
        model: torch.nn.Module,
        cache: Path | None,
        *,
        compiled: bool,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.workload, self.device, self.model = task.workload, torch.device(task.device), model
        self.has_stress = task.weighs_stress
        self._task, self._cache, self._compiled, self._prepare = task, cache, compiled, prepare
        self._frames: dict[str, ResidentFrames] = {}
        self._batches: dict[str, StaticBatches] = {}
        self._models: dict[BatchShape, FunctionalModel] = {}
        self._predictions: dict[tuple[BatchShape, int], tuple[Called, tuple[str, ...]]] = {}
        self.padding: PaddingPlan = padding_plan(
            self.frames(Split.TRAIN).sizes, self.workload.batch_size, edges_in=_EDGES_IN[self.device.type]
        )

    def frames(self, split: str) -> ResidentFrames:
        """A split's frames on the device."""
        if split not in self._frames:
            cutoff = self.workload.model.r_max_angstrom
            found = task_frames(self._task, split)
            self._frames[split] = resident_frames(found, cutoff, self.device, leave_out=_NOT_READ)
        return self._frames[split]

    def batches(self, split: str) -> StaticBatches:
        """A split in batches of one shape, for evaluation: where it pays, the one that the validation split has."""
        if split not in self._batches:
            usual = None if split == Split.VAL else self.batches(Split.VAL).shape
            at_once = self._evaluated_at_once()
            self._batches[split] = static_batches(self.frames(split), at_once, masked=False, usual=usual)
        return self._batches[split]

    def _evaluated_at_once(self) -> int:
        """Frames of a batch of any split: what divides the validation split evenly, in as few batches as allowed.

        Padding is computed like frames: 40 frames in batches of 32 would take as long as 64.
        """
        frames, most = len(self.frames(Split.VAL)), self.workload.evaluation_batch_size
        batches = math.ceil(frames / most)
        return math.ceil(frames / batches) if batches > 1 else most

    def parts(self, split: str) -> SplitParts:
        """How a split falls into parts."""
        return SplitParts.of(self._task.data, split, stress=self.has_stress)

    def slot_constants(self) -> Tensors:
        """What the model reads beside its weights and may differ between trials, as one trial has it.

        Raises:
            Untraceable: the model cannot be written as a function of its weights.
        """
        traced = self._model(self.padding.usual)
        return {name: traced.held[name].detach().to(self.device) for name in traced.slot_constants}

    def loss_gradient(
        self, shape: BatchShape, weights: Tensors, constants: Tensors, gathered: Callable[[Iterable[str]], Tensors]
    ) -> tuple[Called, tuple[str, ...]]:
        """Losses and gradients of slots with a batch each, and the keys of a batch that are read.

        Args:
            shape: of the batches.
            weights: an example with the layout of all later calls.
            constants: likewise.
            gathered: makes an example of the batches from the keys.
        """
        function = LossGradient(self._model(shape), LossWeights.of(self.workload.loss))
        example = weights, constants, gathered(function.batch_keys)
        frequent = shape == self.padding.usual  # misfits are one batch in a thousand, which pays for no compilation
        return self._called(function, example, compiled=self._compiled and frequent), function.batch_keys

    def prediction(self, split: str, weights: Tensors, constants: Tensors) -> tuple[Called, tuple[str, ...]]:
        """Predictions of slots on one batch of a split for all, and the keys of a batch that are read.

        Args:
            split: whose batches.
            weights: an example with the layout of all later calls with so many slots.
            constants: likewise.
        """
        batches = self.batches(split)
        key = batches.shape, len(next(iter(weights.values())))
        if key not in self._predictions:
            function = Evaluate(self._traced(batches[0]))
            batch = {name: batches[0][name].contiguous() for name in function.batch_keys}
            compiled = self._compiled and split == Split.VAL  # the others are read once, at the end
            called = self._called(function, (weights, constants, batch), compiled=compiled)
            self._predictions[key] = called, function.batch_keys
        return self._predictions[key]

    def training_batches(
        self, indices: torch.Tensor, labelled: torch.Tensor, shape: BatchShape, keys: Iterable[str]
    ) -> dict[str, torch.Tensor]:
        """Each slot's own batch.

        Args:
            indices: frames, int64 (slots, batch).
            labelled: frames whose forces the slot knows, (slots, frames).
            shape: padded shape of a batch.
            keys: of the batch that are wanted.
        """
        gather = partial(assemble, self.frames(Split.TRAIN), shape=shape)
        batch = vmap(lambda chosen, known: gather(chosen, labelled=known))(indices, labelled)
        return {key: batch[key] for key in keys}

    def _called(self, function: SlotFunction, example: tuple[Tensors, Tensors, Tensors], *, compiled: bool) -> Called:
        self._prepare()
        return (quickest if compiled else unfuse)(function, example, self._cache)

    def _model(self, shape: BatchShape) -> FunctionalModel:
        if shape not in self._models:
            indices = torch.arange(shape.frames - 1, device=self.device)
            self._models[shape] = self._traced(assemble(self.frames(Split.TRAIN), indices, shape))
        return self._models[shape]

    def _traced(self, example: Mapping[str, torch.Tensor]) -> FunctionalModel:
        outputs = OUTPUTS if self.has_stress else OUTPUTS[:2]
        self._prepare()
        model = self.model.to(self.device)
        try:
            return functional_model(model, example, outputs, self._cache)
        finally:
            model.to("cpu")
