"""The `cohort` engine: many trials of one workload in one device step.

Every trial has a slot: a row in matrices that hold all weights, averages, batch orders and counters. A step gathers
each slot's own batch from data that live on the device, takes all gradients in one vmapped call and lets each group of
slots follow its own update rule. Trials join and leave between any two steps; a slot that does not step is left exactly
as it is, whatever is computed for it.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nequip.utils.global_state import set_global_state
from numpy.typing import NDArray
from torch.func import vmap

from tunebench.engine.batches import task_frames
from tunebench.engine.errors import error_sums, metrics_of_sums, quantities
from tunebench.engine.functional import OUTPUTS, FunctionalModel, functional_model
from tunebench.engine.fused import Evaluate, LossGradient, fuse, unfuse
from tunebench.engine.graphs import Replayed
from tunebench.engine.loss import LossWeights
from tunebench.engine.nequip_config import training_module
from tunebench.engine.padding import BatchShape, PaddingPlan, fits, padding_plan
from tunebench.engine.resident import (
    ResidentFrames,
    StaticBatches,
    assemble,
    frame_labels,
    resident_frames,
    static_batches,
)
from tunebench.engine.slot_group import Flat, Member, SlotGroup, least_capacity, rule_key
from tunebench.engine.task import Errors, Evaluation, TrialTask
from tunebench.engine.tenant import ModuleShelf, SlotState, Tenant
from tunebench.optim.clipping import clip_by_global_norm
from tunebench.optim.matrix_view import trainable_parameters
from tunebench.optim.packing import Packing, Tensors
from tunebench.optim.rule import scalar
from tunebench.study.record import Readout, Reason, Split
from tunebench.workloads.order import batch_order

_log = logging.getLogger(__name__)

_FINITE_CHECK_EVERY = {"cpu": 1, "cuda": 16}  # reading the losses waits for a GPU
_EVALUATED_AT_ONCE = 8
_COMPILED_FROM = {"cpu": 5000, "cuda": 1000}  # steps; Inductor takes as long as thousands of plain ones
_SHRUNK_FROM = 5000  # steps left that pay for compiling a smaller step
_NOT_READ = ("atomic_numbers", "pbc")


@dataclass(kw_only=True)
class _Place:
    """A trial in a slot.

    Attributes:
        slot: its row.
        tenant: the trial.
        group: the slots of its rule.
        step: finished steps.
        order: frames of each step, (horizon, batch).
        misfits: steps whose batch the usual shape does not hold.
        waiting: has reported and waits to be told to go on.
    """

    slot: int
    tenant: Tenant
    group: SlotGroup
    step: int
    order: NDArray[np.int64]
    misfits: NDArray[np.bool_]
    waiting: bool = False


@dataclass(kw_only=True)
class _Parked:
    """A trial that memory keeps out of a slot; `tenant.state` is where it stands, `waiting` as in a slot."""

    tenant: Tenant
    waiting: bool


class Cohort:
    """Slots of one workload on one device.

    Args:
        task: any trial of the workload; only what all trials of the workload share is read.
        slots: trials that can be in training at once.
        cache: folder for traces and compiled graphs; None keeps none.
        compiled: compile the step with Inductor where it agrees with the plain graph; None does so where the horizon
            is long enough to pay for it.
        exact: compute no more rows than the power of two that covers the trials, for timing.

    Attributes:
        padding: shapes of the training batches and what they waste.

    Raises:
        Untraceable: the model cannot be written as a function of its weights.
        WorkloadError: the data or the model's arguments are refused.
    """

    def __init__(
        self,
        task: TrialTask,
        slots: int,
        *,
        cache: Path | None = None,
        compiled: bool | None = None,
        exact: bool = False,
    ) -> None:
        set_global_state()
        torch.backends.cuda.matmul.allow_tf32 = False  # batched products would be off by 1e-2
        self.workload, self.device = task.workload, torch.device(task.device)
        self.slots = slots
        self._task, self._cache, self._exact = task, cache, exact
        self._compiled = self.workload.max_steps >= _COMPILED_FROM[task.device] if compiled is None else compiled
        self._shelf = ModuleShelf()
        self._places: dict[str, _Place] = {}
        self._parked: list[_Parked] = []
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._evaluated_at_once = min(_EVALUATED_AT_ONCE, slots)
        self._groups: dict[Any, SlotGroup] = {}
        self._splits: dict[str, ResidentFrames] = {}
        self._batches: dict[str, StaticBatches] = {}
        self._functional: dict[BatchShape, FunctionalModel] = {}
        self._programs: dict[Any, Any] = {}
        train = self._resident(Split.TRAIN)
        self.padding: PaddingPlan = padding_plan(train.sizes, self.workload.batch_size)
        self._model = self._shelf.module(task, training_module(task))[0].model
        self._rows = self._empty_rows()
        self._labelled = torch.ones(slots + 1, len(train), dtype=torch.bool, device=self.device)
        self._constants: Tensors = {}
        self._since = time.perf_counter()

    def _empty_rows(self) -> _Rows:
        workload = self.workload
        return _Rows.of(self._model, self.slots, workload.max_steps, workload.batch_size, self.device)

    @property
    def trials(self) -> tuple[str, ...]:
        """Names of the trials that are in, those that memory keeps from stepping last."""
        return (*self._places, *(parked.tenant.name for parked in self._parked))

    @property
    def free(self) -> int:
        """Slots without a trial."""
        return self.slots - len(self._places) - len(self._parked)

    def join(self, task: TrialTask, state: SlotState | None = None) -> Evaluation | None:
        """Put a trial into a free slot; it steps from the next `advance` on.

        Args:
            task: the trial.
            state: where it goes on from, of any cohort of this workload; left out, its checkpoint or the beginning.

        Returns:
            The last report of a trial that goes on from a checkpoint, which the driver may have missed. One with an
            outcome has not joined.

        Raises:
            ValueError: no slot is free, or the trial is in already or of another workload.
        """
        name = task.key.trial_id
        if self.free < 1 or name in self.trials or task.workload != self.workload:
            found = "no free slot" if self.free < 1 else f"{name} of {task.workload.name}"
            raise ValueError(f"join: found {found}, allowed: a free slot and a new trial of {self.workload.name}")
        tenant = Tenant(task, self._shelf)
        if state is not None:
            tenant.state = state
        if tenant.book.last.outcome is not None:
            tenant.book.close(tenant.book.last.outcome)
            return tenant.book.last
        self._book_time()
        self._place(tenant)
        return tenant.book.last if tenant.book.last.step else None

    def leave(self, name: str, reason: Reason | None = None) -> None:
        """Take a trial out; its checkpoint stays.

        Args:
            name: of the trial.
            reason: why it ended; None for one that will go on elsewhere.
        """
        parked = self._parked_trial(name)
        if parked is not None:
            self._parked.remove(parked)
        tenant = parked.tenant if parked else self._vacate(name)
        tenant.book.close(reason)
        if self._parked and len(self._places) < self.slots:
            self._unpark(next((parked for parked in self._parked if not parked.waiting), self._parked[0]))

    def go_on(self, name: str) -> None:
        """Let a trial that has reported step again."""
        self._book_time()
        (self._parked_trial(name) or self._places[name]).waiting = False

    def advance(self) -> list[tuple[str, Evaluation]]:
        """Step until some trial has something to report; those trials wait for `go_on` or `leave`.

        A report with an outcome is the trial's last: it has left its slot. Without a trial to step nothing is returned.
        """
        while stepping := [place for place in self._places.values() if not place.waiting]:
            stepped, shortage = self._step(stepping)
            reports = self._diverged(stepped) + self._due(stepped)
            if shortage and self.slots > 1:
                self._halve()
            elif shortage:
                reports += [self._ended(place, Reason.OOM, shortage) for place in stepping]
            if reports:
                return reports
        return []

    def run(self, steps: int) -> None:
        """Step all trials that do not wait, and nothing else, for timing; returns when the device is done.

        Evaluation steps are steps like any other, and divergence goes unnoticed.

        Args:
            steps: of each trial.

        Raises:
            ValueError: a trial's horizon is nearer than that.
            torch.OutOfMemoryError: memory ran out.
        """
        stepping = [place for place in self._places.values() if not place.waiting]
        left = min((self.workload.max_steps - place.step for place in stepping), default=steps)
        if steps > left:
            raise ValueError(f"run: found {steps} steps, allowed: {left}, which the first to finish has left")
        for _ in range(steps):
            _, shortage = self._step(stepping)
            if shortage:
                raise torch.OutOfMemoryError(shortage)
        self._now()

    def state(self, name: str) -> SlotState:
        """A copy of everything the next step of a trial depends on, on the CPU."""
        parked = self._parked_trial(name)
        if parked is not None:
            return parked.tenant.state
        place, rows = self._places[name], self._rows
        return SlotState(
            step=place.step,
            weights=_on_cpu(rows.packing.split(_row(rows.weights, place.slot))),
            averages=_on_cpu(rows.packing.split(_row(rows.averages, place.slot))),
            optimizer=_on_cpu(place.group.state_of(place.slot)),
            loss_sum=float(rows.loss_sum[place.slot]),
            loss_count=float(rows.loss_count[place.slot]),
        )

    # --- joining -------------------------------------------------------------------------------------------------

    def _place(self, tenant: Tenant) -> None:
        taken = {place.slot for place in self._places.values()}
        slot = min(set(range(self.slots)) - taken)
        train = self._resident(Split.TRAIN)
        task = tenant.task
        order = self._order(task.seeds.order)
        self._rows.fill(slot, tenant, order)
        self._labelled[slot] = torch.as_tensor(task_frames(task, Split.TRAIN).labelled, device=self.device)
        for constant, stacked in self._slot_constants().items():
            stacked[slot] = _tensor(tenant.model, constant)
        group = self._joined_group(tenant, slot)
        self._places[tenant.name] = _Place(
            slot=slot,
            tenant=tenant,
            group=group,
            step=tenant.state.step,
            order=order,
            misfits=~fits(train.sizes, order, self.padding.usual),
        )

    def _order(self, seed: int) -> NDArray[np.int64]:
        """Frames of each step; trials share seeds, and drawing a long order takes a while."""
        if seed not in self._orders:
            frames, workload = len(self._resident(Split.TRAIN)), self.workload
            self._orders[seed] = np.array(batch_order(frames, workload.batch_size, workload.max_steps, seed))
        return self._orders[seed]

    def _joined_group(self, tenant: Tenant, slot: int) -> SlotGroup:
        key = rule_key(tenant.rule)
        group = self._groups.get(key)
        if group is None:
            group = SlotGroup(tenant.rule, least_capacity(self.slots, self.device), self.slots, self.device)
        elif None not in group.members:
            group = group.resized(2 * group.capacity)
        group.add(Member(slot, tenant.hyper), tenant.state.optimizer)
        self._replace_group(key, group)
        return group

    def _vacate(self, name: str) -> Tenant:
        """Free a trial's row."""
        self._book_time()
        place = self._places.pop(name)
        place.group.remove(place.slot)
        self._fit_group(place.group)
        return place.tenant

    def _fit_group(self, group: SlotGroup) -> None:
        """Halve a group that three quarters of its members have left; forget an empty one."""
        key, members = rule_key(group.rule), len(group.occupied())
        if not members:
            del self._groups[key]
        elif members <= group.capacity // 4:
            self._replace_group(key, group.resized(group.capacity // 2))

    def _halve(self) -> None:
        """Go on with half the slots where memory does not suffice; trials beyond them wait for a free one."""
        _log.warning(
            "%s: out of memory with %d slots, going on with %d", self.workload.name, self.slots, self.slots // 2
        )
        self._book_time()
        kept = []
        for place in sorted(self._places.values(), key=lambda place: place.waiting):
            place.tenant.state = self.state(place.tenant.name)
            kept.append(_Parked(tenant=place.tenant, waiting=place.waiting))
        self._parked = kept + self._parked
        self._places, self._groups, self._programs, self._constants = {}, {}, {}, {}
        self.slots //= 2
        del self._rows
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._rows = self._empty_rows()
        self._labelled = self._labelled[: self.slots + 1].clone()
        for parked in kept[: self.slots]:
            self._unpark(parked)

    def _unpark(self, parked: _Parked) -> None:
        self._parked.remove(parked)
        self._place(parked.tenant)
        self._places[parked.tenant.name].waiting = parked.waiting

    def _parked_trial(self, name: str) -> _Parked | None:
        return next((parked for parked in self._parked if parked.tenant.name == name), None)

    def _replace_group(self, key: Any, group: SlotGroup) -> None:
        before = self._groups.get(key)
        self._groups[key] = group
        for place in self._places.values():
            if place.group is before:
                place.group = group

    # --- stepping ------------------------------------------------------------------------------------------------

    def _step(self, stepping: Sequence[_Place]) -> tuple[list[_Place], str]:
        """One step of these trials; returns those that made it, and what is said where memory ran out before others."""
        misfits = [place for place in stepping if place.misfits[place.step]]
        fitting = [place for place in stepping if not place.misfits[place.step]]
        stepped: list[_Place] = []
        shortage = ""
        for places, shape in ((fitting, self.padding.usual), (misfits, self.padding.guaranteed)):
            if places and not shortage:
                made, shortage = self._step_together(places, shape)
                stepped += made
        return stepped, shortage

    def _step_together(self, places: Sequence[_Place], shape: BatchShape) -> tuple[list[_Place], str]:
        rows = self._rows
        bucket = self._bucket()
        self._gather_below(bucket)
        rows.set_stepping([place.slot for place in places])
        steps = {place.slot: place.step + 1 for place in places}
        moved: set[int] = set()
        shortage = ""
        try:
            self._gradient_program(shape, bucket)()
            for group in self._groups.values():
                group.set_stepping(list(steps))
                members = {member.slot for member in group.occupied()} & steps.keys()
                if members:
                    group.update(rows.weights, rows.grads, rows.steps, rows.factors, group.phase(steps))
                    moved |= members
        except torch.OutOfMemoryError as error:  # kept alive it would keep the memory of the frames it went through
            shortage = _first_line(error)
            rows.set_stepping(list(moved))  # the others make this step once there is room
        stepped = [place for place in places if place.slot in moved]
        if stepped:
            self._finish_program()()
        for place in stepped:
            place.step += 1
        return stepped, shortage

    def _bucket(self) -> int:
        """Rows that a step computes: all, or a quarter, a sixteenth, ... where few trials are left."""
        bucket, trials = self.slots, len(self._places)
        left = max(self.workload.max_steps - place.step for place in self._places.values())
        if self._exact:
            return min(bucket, 1 << (trials - 1).bit_length())
        if self._compiled and left < _SHRUNK_FROM:
            return bucket
        while bucket >= 4 and bucket // 4 >= trials:
            bucket //= 4
        return bucket

    def _gather_below(self, bucket: int) -> None:
        """Move trials to the rows that the step computes."""
        taken = {place.slot for place in self._places.values()}
        free = (slot for slot in range(bucket) if slot not in taken)
        for place in [place for place in self._places.values() if place.slot >= bucket]:
            to = next(free)
            for stacked in (*self._rows.per_slot(), self._labelled, *self._slot_constants().values()):
                stacked[to].copy_(stacked[place.slot])
            place.group.move(place.slot, to)
            place.slot = to

    def _gradient_program(self, shape: BatchShape, bucket: int) -> Replayed:
        key = "gradient", shape, bucket
        if key not in self._programs:
            function = LossGradient(self._functional_model(shape), LossWeights.of(self.workload.loss))
            example = (*self._weights_and_constants(bucket), self._gathered(shape, bucket, function.batch_keys))
            called = (fuse if self._compiled else unfuse)(function, example, self._cache)
            work = partial(self._gradients, called, function.batch_keys, shape, bucket)
            self._programs[key] = Replayed(work, self.device)
        program: Replayed = self._programs[key]
        return program

    def _gradients(self, function: Any, keys: Sequence[str], shape: BatchShape, bucket: int) -> None:
        """Losses and clipped gradients of the first `bucket` rows."""
        rows = self._rows
        with torch.no_grad():
            losses, grads = function(*self._weights_and_constants(bucket), self._gathered(shape, bucket, keys))
            flat = rows.packing.joined({name: grad.reshape(bucket, -1) for name, grad in grads.items()})
            limit = self.workload.clip_global_norm
            if limit is not None:
                flat = vmap(partial(_clipped, limit))(flat)
            for dtype, matrix in flat.items():
                rows.grads[dtype][:bucket].copy_(matrix)
            rows.losses[:bucket].copy_(losses)
            rows.factors.copy_(rows.schedule.gather(1, rows.steps.unsqueeze(1)).squeeze(1))

    def _gathered(self, shape: BatchShape, bucket: int, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Each slot's own batch of its own step."""
        rows = self._rows
        steps = rows.steps[:bucket, None, None].expand(-1, 1, rows.orders.shape[-1])
        last = rows.orders.shape[1] - 1
        indices = rows.orders[:bucket].gather(1, steps.clamp_max(last)).squeeze(1).to(torch.int64)
        gather = partial(assemble, self._resident(Split.TRAIN), shape=shape)
        batch = vmap(lambda chosen, labelled: gather(chosen, labelled=labelled))(indices, self._labelled[:bucket])
        return {key: batch[key] for key in keys}

    def _finish_program(self) -> Replayed:
        if "finish" not in self._programs:
            self._programs["finish"] = Replayed(partial(self._rows.finish, self.workload.ema_decay), self.device)
        program: Replayed = self._programs["finish"]
        return program

    def _weights_and_constants(self, bucket: int) -> tuple[Tensors, Tensors]:
        rows = self._rows
        weights = rows.packing.split({dtype: matrix[:bucket] for dtype, matrix in rows.weights.items()})
        return weights, {name: stacked[:bucket] for name, stacked in self._slot_constants().items()}

    # --- the model and the data -------------------------------------------------------------------------------------

    def _functional_model(self, shape: BatchShape) -> FunctionalModel:
        if shape not in self._functional:
            indices = torch.arange(shape.frames - 1, device=self.device)
            self._functional[shape] = self._traced(assemble(self._resident(Split.TRAIN), indices, shape))
        return self._functional[shape]

    def _traced(self, example: Mapping[str, torch.Tensor]) -> FunctionalModel:
        outputs = OUTPUTS if self._has_stress else OUTPUTS[:2]
        model = self._model.to(self.device)
        try:
            return functional_model(model, example, outputs, self._cache)
        finally:
            model.to("cpu")

    @property
    def _has_stress(self) -> bool:
        weighed = self.workload.loss.stress > 0 or self._task.objective.stress > 0
        return self._task.data.has_stress and weighed

    def _slot_constants(self) -> Tensors:
        """Constants that differ between trials, with a row for each slot."""
        if not self._constants:
            traced = self._functional_model(self.padding.usual)
            held = {name: traced.held[name].detach().to(self.device) for name in traced.slot_constants}
            rows = self.slots + 1
            self._constants = {name: t.unsqueeze(0).repeat(rows, *[1] * t.ndim) for name, t in held.items()}
        return self._constants

    def _resident(self, split: str) -> ResidentFrames:
        if split not in self._splits:
            frames = task_frames(self._task, split)
            cutoff = self.workload.model.r_max_angstrom
            self._splits[split] = resident_frames(frames, cutoff, self.device, leave_out=_NOT_READ)
        return self._splits[split]

    # --- reporting -------------------------------------------------------------------------------------------------

    def _diverged(self, stepping: Sequence[_Place]) -> list[tuple[str, Evaluation]]:
        every = _FINITE_CHECK_EVERY[self.device.type]
        if not any(place.step % every == 0 for place in stepping):
            return []
        broken = self._rows.broken.tolist()
        return [
            self._ended(place, Reason.DIVERGED, f"training loss not finite by step {place.step}")
            for place in stepping
            if broken[place.slot]
        ]

    def _ended(self, place: _Place, reason: Reason, message: str) -> tuple[str, Evaluation]:
        name = place.tenant.name
        self._book_time()
        report = place.tenant.book.ended(place.step, reason, message)
        self.leave(name, reason)
        return name, report

    def _due(self, stepping: Sequence[_Place]) -> list[tuple[str, Evaluation]]:
        due = [
            place
            for place in stepping
            if place.step in place.tenant.task.evaluation_steps and place.tenant.name in self._places
        ]
        if not due:
            return []
        self._book_time()
        errors: list[Errors] = []
        while not errors:
            try:
                errors = self._errors(due)
            except torch.OutOfMemoryError as error:
                shortage = _first_line(error)
            if not errors and self._evaluated_at_once == 1:
                return [self._ended(place, Reason.OOM, shortage) for place in due]
            if not errors:
                self._evaluated_at_once //= 2
        reports = [self._reported(place, found) for place, found in zip(due, errors, strict=True)]
        self._since = self._now()  # nobody pays for an evaluation in training time
        return reports

    def _reported(self, place: _Place, errors: Errors) -> tuple[str, Evaluation]:
        tenant, name = place.tenant, place.tenant.name
        last = tenant.book.evaluated(
            place.step,
            errors,
            train_loss=self._rows.take_mean_loss(place.slot),
            learning_rate=tenant.hyper["learning_rate"] * tenant.learning_rate_factor(place.step),
            save=lambda: tenant.saved(self.state(name)),
        )
        place.waiting = True
        if last.outcome is not None:
            self.leave(name, last.outcome)
        return name, last

    def _errors(self, places: Sequence[_Place]) -> list[Errors]:
        """Errors on the validation split, and at the horizon on the splits opened once."""
        found: list[Errors] = [{} for _ in places]
        for readout, weights in self._readouts(places).items():
            for split in self._opened(places):
                chosen = [
                    index
                    for index, place in enumerate(places)
                    if readout in (Readout.RAW, place.tenant.task.averaged) and split in self._opened([place])
                ]
                measured = self._measured([places[index] for index in chosen], weights, split)
                for index, metrics in zip(chosen, measured, strict=True):
                    found[index].setdefault(split, {})[readout.value] = metrics
        return found

    def _readouts(self, places: Sequence[_Place]) -> dict[Readout, Flat]:
        """The weights that each readout sees, in the cohort's rows."""
        wanted = {place.tenant.task.averaged for place in places}
        readouts: dict[Readout, Flat] = {Readout.RAW: self._rows.weights}
        if Readout.EMA in wanted:
            readouts[Readout.EMA] = self._rows.averages
        if Readout.SCHEDULE_FREE in wanted:
            averaged = self._rows.weights
            for group in {id(place.group): place.group for place in places}.values():
                read = getattr(group.rule, "averaged", None)
                averaged = averaged if read is None else group.averaged(self._rows.weights, averaged, read)
            readouts[Readout.SCHEDULE_FREE] = averaged
        return readouts

    def _opened(self, places: Sequence[_Place]) -> tuple[str, ...]:
        at_horizon = [place for place in places if place.step == self.workload.max_steps]
        final = dict.fromkeys(split for place in at_horizon for split in place.tenant.task.final_splits)
        return (Split.VAL.value, *final)

    def _measured(self, places: Sequence[_Place], weights: Flat, split: str) -> list[dict[str, float]]:
        size = self._evaluated_at_once
        found: list[dict[str, float]] = []
        for first in range(0, len(places), size):
            part = list(places[first : first + size])
            sums = self._sums(part + part[-1:] * (size - len(part)), weights, split)
            names = quantities(stress=self._has_stress)
            found += [metrics_of_sums(dict(zip(names, slot, strict=True))) for slot in sums.tolist()[: len(part)]]
        return found

    def _sums(self, places: Sequence[_Place], weights: Flat, split: str) -> torch.Tensor:
        """Error sums over a split, float64 (places, quantities, 3)."""
        chosen = torch.tensor([place.slot for place in places], dtype=torch.int64, device=self.device)
        stacked = self._rows.packing.split({dtype: matrix.index_select(0, chosen) for dtype, matrix in weights.items()})
        constants = {name: values.index_select(0, chosen) for name, values in self._slot_constants().items()}
        labelled = torch.stack(
            [torch.as_tensor(task_frames(p.tenant.task, split).labelled, device=self.device) for p in places]
        )
        batches = self._static(split)
        predict, keys = self._prediction_program(split, stacked, constants)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for position in range(len(batches)):
            batch = batches[position]
            with torch.no_grad():
                output = predict(stacked, constants, {key: batch[key] for key in keys})
                total = total + self._batch_sums(output, batch, labelled, batches.indices[position])
        return total

    def _batch_sums(
        self, output: Tensors, batch: Mapping[str, torch.Tensor], labelled: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        def sums(output: Tensors, labelled: torch.Tensor) -> torch.Tensor:
            return error_sums(output, batch, stress=self._has_stress, force_labels=frame_labels(labelled, indices))

        found: torch.Tensor = vmap(sums)(dict(output), labelled)
        return found

    def _prediction_program(self, split: str, weights: Tensors, constants: Tensors) -> tuple[Any, tuple[str, ...]]:
        batches = self._static(split)
        key = "predict", batches.shape, self._evaluated_at_once
        if key not in self._programs:
            function = Evaluate(self._traced(batches[0]))
            example = (weights, constants, {name: batches[0][name].contiguous() for name in function.batch_keys})
            called = (fuse if self._compiled else unfuse)(function, example, self._cache)
            self._programs[key] = called, function.batch_keys
        program: tuple[Any, tuple[str, ...]] = self._programs[key]
        return program

    def _static(self, split: str) -> StaticBatches:
        if split not in self._batches:
            size = self.workload.evaluation_batch_size
            self._batches[split] = static_batches(self._resident(split), size, masked=False)
        return self._batches[split]

    # --- time ----------------------------------------------------------------------------------------------------

    def _book_time(self) -> None:
        """Share the training time since the last call among the trials that were stepping."""
        now = self._now()
        stepping = [place for place in self._places.values() if not place.waiting]
        for place in stepping:
            place.tenant.book.device_s += (now - self._since) / len(stepping)
        self._since = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(eq=False)
class _Rows:
    """Matrices with one row per slot, and a spare one for rows that no trial owns.

    Attributes:
        packing: how a row lays out the weights.
        weights, averages, grads: all weights of each slot.
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
    orders: torch.Tensor
    schedule: torch.Tensor
    steps: torch.Tensor
    factors: torch.Tensor
    losses: torch.Tensor
    loss_sum: torch.Tensor
    loss_count: torch.Tensor
    stepping: torch.Tensor
    broken: torch.Tensor

    @classmethod
    def of(cls, model: torch.nn.Module, slots: int, horizon: int, batch: int, device: torch.device) -> _Rows:
        packing = Packing.elementwise(trainable_parameters(model))
        rows = slots + 1

        def matrices() -> Flat:
            return {dtype: matrix.zero_() for dtype, matrix in packing.buffers(device, rows).items()}

        def column(dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(rows, dtype=dtype, device=device)

        return cls(
            packing=packing,
            weights=matrices(),
            averages=matrices(),
            grads=matrices(),
            orders=torch.zeros(rows, horizon, batch, dtype=torch.int32, device=device),
            schedule=torch.ones(rows, horizon + 1, dtype=torch.float64, device=device),
            steps=column(torch.int64),
            factors=column(torch.float64),
            losses=column(torch.float64),
            loss_sum=column(torch.float64),
            loss_count=column(torch.float64),
            stepping=column(torch.bool),
            broken=column(torch.bool),
        )

    def fill(self, slot: int, tenant: Tenant, order: NDArray[np.int64]) -> None:
        """Put a trial's state into a row."""
        for flat, named in ((self.weights, tenant.state.weights), (self.averages, tenant.state.averages)):
            joined = self.packing.joined({name: tensor.reshape(1, -1) for name, tensor in named.items()})
            for dtype, matrix in flat.items():
                matrix[slot].copy_(joined[dtype][0])
        self.orders[slot].copy_(torch.as_tensor(order))
        self.schedule[slot].copy_(tenant.learning_rate_factors())
        self.steps[slot] = tenant.state.step
        self.loss_sum[slot], self.loss_count[slot] = tenant.state.loss_sum, tenant.state.loss_count
        self.broken[slot] = False

    def per_slot(self) -> list[torch.Tensor]:
        """What belongs to a trial, each with a row for every slot."""
        flat = (*self.weights.values(), *self.averages.values())
        return [*flat, self.orders, self.schedule, self.steps, self.loss_sum, self.loss_count, self.broken]

    def set_stepping(self, slots: Sequence[int]) -> None:
        """Only these rows change from now on."""
        chosen = torch.zeros(self.stepping.shape, dtype=torch.bool)
        chosen[list(slots)] = True
        self.stepping.copy_(chosen)

    def finish(self, decay: float) -> None:
        """Averages, counters and checks after the weights have moved.

        NequIP's averages start as a copy and decay slower early on (`EMAWeights.update_parameters`).
        """
        updates = (self.steps + 1).to(torch.float64)
        keep = torch.clamp((1 + updates) / (10 + updates), max=decay)
        for dtype, averages in self.averages.items():
            moved = torch.lerp(averages, self.weights[dtype], scalar(1 - keep, averages).unsqueeze(1))
            averages.copy_(torch.where(self.stepping.unsqueeze(1), moved, averages))
        self.loss_sum.add_(torch.where(self.stepping, self.losses, torch.zeros_like(self.losses)))
        self.loss_count.add_(self.stepping.to(torch.float64))
        self.broken.logical_or_(self.stepping & ~self.losses.isfinite())
        self.steps.add_(self.stepping.to(torch.int64))

    def take_mean_loss(self, slot: int) -> float:
        """Mean training loss since the last call; NaN where no step was made."""
        total, count = float(self.loss_sum[slot]), float(self.loss_count[slot])
        self.loss_sum[slot], self.loss_count[slot] = 0.0, 0.0
        return total / count if count else math.nan


def _first_line(error: BaseException) -> str:
    return (str(error) or "out of memory").splitlines()[0]


def _clipped(limit: float, grads: Flat) -> Flat:
    most = torch.full((), limit, dtype=torch.float64, device=next(iter(grads.values())).device)
    named, _ = clip_by_global_norm({str(dtype): vector for dtype, vector in grads.items()}, most)
    return {dtype: named[str(dtype)] for dtype in grads}


def _row(flat: Flat, slot: int) -> Flat:
    return {dtype: matrix[slot] for dtype, matrix in flat.items()}


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _tensor(model: torch.nn.Module, name: str) -> torch.Tensor:
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return named[name].detach()
