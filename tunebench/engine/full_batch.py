"""The training loss over a fixed set of frames at once, for what needs the same function at every call.

It is the loss of one batch that holds all the frames, gathered in chunks that fit into memory: means run over all
labels of the set, so how it is cut changes nothing but rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nequip.data import AtomicDataDict
from nequip.utils.global_state import set_global_state

from tunebench.engine.batches import on_device, task_frames
from tunebench.engine.loss import LossWeights, weighted_loss
from tunebench.engine.modules import trial_module
from tunebench.engine.nequip_config import training_module
from tunebench.engine.task import TrialTask
from tunebench.optim.matrix_view import trainable_parameters
from tunebench.optim.packing import Tensors

Frame = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LabelCounts:
    """Labels of a set of frames: energies, force components, stress components."""

    energies: int
    forces: int
    stress: int

    @classmethod
    def of(cls, batch: Mapping[str, torch.Tensor]) -> LabelCounts:
        """Labels of a batch; NaN is none."""
        keys = AtomicDataDict.TOTAL_ENERGY_KEY, AtomicDataDict.FORCE_KEY, AtomicDataDict.STRESS_KEY
        energies, forces, stress = (int((~torch.isnan(batch[key])).sum()) if key in batch else 0 for key in keys)
        return cls(energies=energies, forces=forces, stress=stress)

    def __add__(self, other: LabelCounts) -> LabelCounts:
        """Both together."""
        return LabelCounts(
            energies=self.energies + other.energies,
            forces=self.forces + other.forces,
            stress=self.stress + other.stress,
        )

    def share(self, chunk: LabelCounts, weights: LossWeights) -> LossWeights:
        """Weights under which the mean errors of a chunk are its part of the means over all."""
        return LossWeights(
            energy_per_atom=weights.energy_per_atom * chunk.energies / max(self.energies, 1),
            forces=weights.forces * chunk.forces / max(self.forces, 1),
            stress=weights.stress * chunk.stress / max(self.stress, 1),
        )


class FullBatch:
    """A model and the frames that its loss runs over.

    Args:
        model: NequIP's or Allegro's, alone or in a ModuleDict, in the wanted precision and on its device.
        frames: NequIP's keys, at least one frame; NaN labels are missing ones.
        loss: weights of the whole loss.
        chunk_frames: frames that go through the model together.
        beat: called after every chunk.

    Attributes:
        model: as given.
        parameters: its trainable parameters by name.
        counts: labels of all frames.
        frames: number of frames.

    Raises:
        ValueError: no frame, no energy label or no chunk size.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        frames: Sequence[Frame],
        loss: LossWeights,
        *,
        chunk_frames: int,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        if not frames or chunk_frames < 1:
            raise ValueError(f"full batch: found {len(frames)} frames in chunks of {chunk_frames}, allowed: at least 1")
        self.model, self.frames, self._beat = model, len(frames), beat
        self.parameters: Mapping[str, torch.nn.Parameter] = trainable_parameters(model)
        (self._forward,) = model.values() if isinstance(model, torch.nn.ModuleDict) else (model,)
        device = next(iter(self.parameters.values())).device
        chunks = [frames[first : first + chunk_frames] for first in range(0, len(frames), chunk_frames)]
        batches = [on_device(AtomicDataDict.batched_from_list(chunk), device) for chunk in chunks]
        counts = [LabelCounts.of(batch) for batch in batches]
        self.counts = sum(counts[1:], counts[0])
        self._chunks = [(batch, self.counts.share(own, loss)) for batch, own in zip(batches, counts, strict=True)]

    def chunk_losses(self) -> Iterator[torch.Tensor]:
        """Parts of the loss at the model's weights, zero-dimensional, with their graphs; their sum is the loss."""
        training = self.model.training
        self.model.train()  # NequIP keeps the graph of the forces in training mode only
        try:
            for batch, weights in self._chunks:
                yield weighted_loss(self._forward(dict(batch)), batch, weights)
                self._beat()
        finally:
            self.model.train(training)

    def loss_and_gradient(self) -> tuple[torch.Tensor, Tensors]:
        """The loss, zero-dimensional, and its gradient by name; zero for parameters that it does not reach."""
        total: torch.Tensor | None = None
        gradient = {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        for loss in self.chunk_losses():
            found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
            for (name, kept), part in zip(gradient.items(), found, strict=True):
                gradient[name] = kept if part is None else kept + part
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total, gradient

    def loss(self) -> float:
        """The loss at the model's weights."""
        return sum(float(loss.detach()) for loss in self.chunk_losses())

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy weights by name into the model, whatever their precision."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])


def full_batch(
    task: TrialTask,
    model: torch.nn.Module,
    split: str,
    *,
    chunk_frames: int,
    most: int | None = None,
    seed: int = 0,
    beat: Callable[[], None] = lambda: None,
) -> FullBatch:
    """The loss of a trial's workload over a split, its force labels masked as in training.

    Args:
        task: the trial.
        model: from `model_in`.
        split: whose frames.
        chunk_frames: frames that go through the model together.
        most: at most so many frames, drawn without repetition; None for all.
        seed: of the draw.
        beat: called after every chunk.
    """
    frames = task_frames(task, split)
    chosen = list(range(len(frames)))
    if most is not None and most < len(frames):
        chosen = sorted(np.random.default_rng(seed).permutation(len(frames))[:most].tolist())
    weights = LossWeights.of(task.workload.loss)
    return FullBatch(model, [frames[index] for index in chosen], weights, chunk_frames=chunk_frames, beat=beat)


def model_in(task: TrialTask, dtype: torch.dtype, like: torch.nn.Module) -> torch.nn.Module:
    """A trial's model on its device in another precision, with the weights and constants of `like`.

    Args:
        task: the trial.
        dtype: float32 or float64.
        like: the model of the trial's training module.
    """
    set_global_state()
    config = training_module(task)
    config["model"] = {**config["model"], "model_dtype": str(dtype).removeprefix("torch."), "compile_mode": "eager"}
    module = trial_module(task, config)
    model: torch.nn.Module = module.model
    model.load_state_dict(like.state_dict())
    return model.to(task.device)
