"""What a cohort keeps of its trials on the device: one row for each slot."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from tunebench.engine.batches import task_frames
from tunebench.engine.row_mask import RowMask
from tunebench.engine.slot_group import Flat
from tunebench.engine.tenant import SlotState, Tenant
from tunebench.engine.workload_functions import WorkloadFunctions
from tunebench.optim.matrix_view import trainable_parameters
from tunebench.optim.packing import Packing, Tensors
from tunebench.optim.rule import scalar
from tunebench.study.record import Split


@dataclass(kw_only=True)
class Place:
    """A trial in a slot.

    Attributes:
        slot: its row.
        tenant: the trial.
        step: finished steps.
        order: frames of each step, (horizon, batch).
        misfits: steps whose batch the usual shape does not hold, (horizon,).
        waiting: has reported and waits to be told to go on.
    """

    slot: int
    tenant: Tenant
    step: int
    order: NDArray[np.int64]
    misfits: NDArray[np.bool_]
    waiting: bool = False


@dataclass(eq=False)
class SlotRows:
    """Matrices with one row per slot, and a spare one for rows that no trial owns.

    Attributes:
        packing: how a row lays out the weights.
        weights, averages, grads: all weights of each slot.
        constants: what else the model reads and may differ between trials, by name, (rows, ...).
        labelled: training frames whose forces a trial knows, (rows, frames).
        orders: frames of each step, int32 (rows, horizon, batch).
        schedule: learning-rate factor of each step, float64 (rows, horizon + 1).
        steps: finished steps, int64.
        factors: learning-rate factor of this step.
        losses: of this step. loss_sum, loss_count: since the last evaluation.
        stepping: rows that this step changes.
        broken: rows that have had a loss that is not finite.
    """

    packing: Packing
    weights: Flat
    averages: Flat
    grads: Flat
    constants: Tensors
    labelled: torch.Tensor
    orders: torch.Tensor
    schedule: torch.Tensor
    steps: torch.Tensor
    factors: torch.Tensor
    losses: torch.Tensor
    loss_sum: torch.Tensor
    loss_count: torch.Tensor
    stepping: RowMask
    broken: torch.Tensor

    @classmethod
    def of(cls, functions: WorkloadFunctions, slots: int) -> SlotRows:
        """Empty rows for so many slots, and the spare one."""
        workload, device, rows = functions.workload, functions.device, slots + 1
        packing = Packing.elementwise(trainable_parameters(functions.model))

        def matrices() -> Flat:
            return {dtype: matrix.zero_() for dtype, matrix in packing.buffers(device, rows).items()}

        def column(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(rows, dtype=dtype, device=device)

        shape = rows, workload.max_steps, workload.batch_size
        frames = len(functions.frames(Split.TRAIN))
        return cls(
            packing=packing,
            weights=matrices(),
            averages=matrices(),
            grads=matrices(),
            constants={
                name: tensor.unsqueeze(0).repeat(rows, *[1] * tensor.ndim)
                for name, tensor in functions.slot_constants().items()
            },
            labelled=torch.ones(rows, frames, dtype=torch.bool, device=device),
            orders=torch.zeros(shape, dtype=torch.int32, device=device),
            schedule=torch.ones(rows, workload.max_steps + 1, dtype=torch.float64, device=device),
            steps=column(torch.int64),
            factors=column(torch.float64),
            losses=column(torch.float64),
            loss_sum=column(torch.float64),
            loss_count=column(torch.float64),
            stepping=RowMask(rows, device),
            broken=column(torch.bool),
        )

    def fill(self, slot: int, tenant: Tenant, order: NDArray[np.int64]) -> None:
        """Put a trial's state into a row."""
        for flat, named in ((self.weights, tenant.state.weights), (self.averages, tenant.state.averages)):
            joined = self.packing.joined({name: tensor.reshape(1, -1) for name, tensor in named.items()})
            for dtype, matrix in flat.items():
                matrix[slot].copy_(joined[dtype][0])
        own = dict(tenant.model.named_parameters()) | dict(tenant.model.named_buffers())
        for name, stacked in self.constants.items():
            stacked[slot] = own[name].detach()
        self.labelled[slot].copy_(torch.as_tensor(task_frames(tenant.task, Split.TRAIN).labelled))
        self.orders[slot].copy_(torch.as_tensor(order))
        self.schedule[slot].copy_(tenant.learning_rate_factors())
        self.steps[slot] = tenant.state.step
        self.loss_sum[slot], self.loss_count[slot] = tenant.state.loss_sum, tenant.state.loss_count
        self.broken[slot] = False

    def move(self, slot: int, to: int) -> None:
        """Copy a trial to another row."""
        flat = (*self.weights.values(), *self.averages.values(), *self.constants.values())
        columns = (self.steps, self.loss_sum, self.loss_count, self.broken)
        for stacked in (*flat, self.labelled, self.orders, self.schedule, *columns):
            stacked[to].copy_(stacked[slot])

    def state(self, place: Place, optimizer: Tensors) -> SlotState:
        """A copy of everything the next step of a trial depends on, on the CPU; `optimizer` is its rule's state."""
        return SlotState(
            step=place.step,
            weights=_on_cpu(self.packing.split(_row(self.weights, place.slot))),
            averages=_on_cpu(self.packing.split(_row(self.averages, place.slot))),
            optimizer=_on_cpu(optimizer),
            loss_sum=float(self.loss_sum[place.slot]),
            loss_count=float(self.loss_count[place.slot]),
        )

    def set_stepping(self, slots: Collection[int]) -> None:
        """Only these rows change from now on."""
        self.stepping.set([row in slots for row in range(len(self.steps))])

    def finish(self, decay: float) -> None:
        """Averages, counters and checks after the weights have moved.

        NequIP's averages start as a copy and decay slower early on (`EMAWeights.update_parameters`).
        """
        stepping = self.stepping.marked
        updates = (self.steps + 1).to(torch.float64)
        keep = torch.clamp((1 + updates) / (10 + updates), max=decay)
        share = torch.where(stepping, 1 - keep, torch.zeros_like(keep))
        for dtype, averages in self.averages.items():  # in place: memory cannot run out between weights and counters
            averages.lerp_(self.weights[dtype], scalar(share, averages).unsqueeze(1))
        self.loss_sum.add_(torch.where(stepping, self.losses, torch.zeros_like(self.losses)))
        self.loss_count.add_(stepping.to(torch.float64))
        self.broken.logical_or_(stepping & ~self.losses.isfinite())
        self.steps.add_(stepping.to(torch.int64))

    def take_mean_losses(self, slots: Sequence[int]) -> list[float]:
        """Mean training losses since the last call; NaN where no step was made."""
        chosen = torch.tensor(slots, dtype=torch.int64, device=self.loss_sum.device)
        sums = torch.stack([self.loss_sum[chosen], self.loss_count[chosen]]).tolist()
        for column in (self.loss_sum, self.loss_count):
            column.index_fill_(0, chosen, 0.0)
        return [total / count if count else math.nan for total, count in zip(*sums, strict=True)]


def _row(flat: Flat, slot: int) -> Flat:
    return {dtype: matrix[slot] for dtype, matrix in flat.items()}


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
