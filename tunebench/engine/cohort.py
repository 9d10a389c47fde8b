"""The `cohort` engine: many trials of one workload in one device step.

Every trial has a slot: a row in matrices that hold all weights, averages, batch orders and counters. A step gathers
each slot's own batch from data that live on the device, takes all gradients in one vmapped call and lets each group of
slots follow its own update rule. Trials join and leave between any two steps; a slot that does not step is left exactly
as it is, whatever is computed for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nequip.utils.global_state import set_global_state
from numpy.typing import NDArray
from torch.func import vmap

from tunebench.engine.graphs import Lanes, Replayed, release_memory, synchronize
from tunebench.engine.nequip_config import training_module
from tunebench.engine.padding import BatchShape, PaddingPlan, fits
from tunebench.engine.refinement import add_refinement
from tunebench.engine.slot_evaluation import Measured, SlotEvaluation
from tunebench.engine.slot_group import Flat
from tunebench.engine.slot_groups import SlotGroups
from tunebench.engine.slot_rows import Place, SlotRows
from tunebench.engine.task import Evaluation, TrialTask
from tunebench.engine.tenant import ModuleShelf, SlotState, Tenant
from tunebench.engine.watchdog import Watchdog
from tunebench.engine.workload_functions import WorkloadFunctions
from tunebench.optim.clipping import clip_by_global_norm
from tunebench.optim.packing import Tensors
from tunebench.study.record import Readout, Reason, Split
from tunebench.workloads.order import batch_order

_log = logging.getLogger(__name__)

_FINITE_CHECK_EVERY = {"cpu": 1, "cuda": 16}  # reading the losses waits for a GPU
_EVALUATED_AT_ONCE = {"cpu": 2, "cuda": 8}  # more fall out of a CPU's cache
_WRITERS = 8
_COMPILED_FROM = {"cpu": 5000, "cuda": 1000}  # steps; Inductor takes as long as thousands of plain ones
_SHRUNK_FROM = 5000  # steps left that pay for compiling a smaller step
_SHRUNK_BY = {"cpu": 2, "cuda": 4}  # a CPU's step takes as long as it has rows, a small one of a GPU as it has launches
_TRACED_FROM = {"cpu": 500, "cuda": 0}  # rows left out of the steps to come that pay for tracing a smaller step


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
        compiled: compile the step with Inductor where it agrees with the plain graph and is faster; None does so where
            the horizon is long enough to pay for it.
        exact: compute no more rows than the power of two that covers the trials, for timing.
        watchdog: is told of every step and every batch of an evaluation, and before whatever is traced or compiled.

    Attributes:
        trial_steps: steps that were made, each counted once for every trial that made it.
        evaluating_s, writing_s: seconds in evaluations, and in writing files, while nobody stepped.

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
        watchdog: Watchdog | None = None,
    ) -> None:
        set_global_state()
        torch.backends.cuda.matmul.allow_tf32 = False  # batched products would be off by 1e-2
        self.workload, self.device = task.workload, torch.device(task.device)
        self.slots = slots
        self.trial_steps = 0
        self.evaluating_s = self.writing_s = 0.0
        self._exact, self._watchdog = exact, watchdog or Watchdog()
        self._compiled = self.workload.max_steps >= _COMPILED_FROM[task.device] if compiled is None else compiled
        self._shelf = ModuleShelf()
        model = self._shelf.module(task, training_module(task))[0].model
        self._functions = WorkloadFunctions(task, model, cache, compiled=self._compiled, prepare=self._watchdog.prepare)
        self._evaluation = SlotEvaluation(
            self._functions, min(_EVALUATED_AT_ONCE[task.device], slots), self._watchdog.beat
        )
        self._places: dict[str, Place] = {}
        self._parked: list[_Parked] = []
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="writer")
        self._lanes = Lanes(self.device)
        self._clear()
        self._since = time.perf_counter()

    def _clear(self) -> None:
        """Begin with empty slots."""
        self._rows = SlotRows.of(self._functions, self.slots)
        self._groups = SlotGroups(self.slots, self.device)
        self._gradient_programs: dict[tuple[BatchShape, int], Replayed] = {}
        self._finish = Replayed(partial(self._rows.finish, self.workload.ema_decay), self.device)

    @property
    def padding(self) -> PaddingPlan:
        """Shapes of the training batches and what they waste."""
        return self._functions.padding

    @property
    def trials(self) -> tuple[str, ...]:
        """Names of the trials that are in, those that memory keeps from stepping last."""
        return (*self._places, *(parked.tenant.name for parked in self._parked))

    @property
    def free(self) -> int:
        """Slots without a trial."""
        return self.slots - len(self._places) - len(self._parked)

    def join(self, task: TrialTask, state: SlotState | None = None) -> Evaluation | None:
        """Put a trial into a free slot; it steps from the next `advance` on, at its next horizon where one is over.

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
        self._book_time()
        tenant = Tenant(task, self._shelf)
        if state is not None:
            tenant.state = state
        if tenant.book.last.outcome is not None:
            tenant.book.close(tenant.book.last.outcome)
            return tenant.book.last
        if tenant.book.horizon_is_over:
            tenant = self._lengthened(tenant)
        self._place(tenant)
        self._since = self._now()  # nobody's training time
        return tenant.book.last if tenant.book.last.step else None

    def leave(self, name: str, reason: Reason | None = None) -> None:
        """Take a trial out; its checkpoint stays.

        Args:
            name: of the trial.
            reason: why it ended; None for one that will go on elsewhere.
        """
        parked = self._parked_trial(name)
        tenant = (parked or self._places[name]).tenant
        try:
            if reason is None and not parked:
                self._keep(self._places[name])
            tenant.book.close(reason)
        finally:  # it has left, even where it could not be written
            if parked:
                self._parked.remove(parked)
            else:
                self._vacate(name)
            self._fill_free_slot()

    def _fill_free_slot(self) -> None:
        """Let a trial in that memory kept out, first one that does not wait."""
        if self._parked and len(self._places) < self.slots:
            self._unpark(next((parked for parked in self._parked if not parked.waiting), self._parked[0]))

    def go_on(self, name: str) -> None:
        """Let a trial that has reported step again; at the end of a horizon it begins the next one."""
        self._book_time()
        parked = self._parked_trial(name)
        tenant = (parked or self._places[name]).tenant
        if not tenant.book.horizon_is_over:
            (parked or self._places[name]).waiting = False
        elif parked:
            parked.tenant, parked.waiting = self._lengthened(tenant), False
        else:
            self._place(self._lengthened(self._vacate(name)))
        self._since = self._now()  # building a trial is nobody's training time

    def advance(self) -> list[tuple[str, Evaluation]]:
        """Step until some trial has something to report; those trials wait for `go_on` or `leave`.

        A report with an outcome is the trial's last: it has left its slot. Without a trial to step nothing is returned.
        """
        while stepping := [place for place in self._places.values() if not place.waiting]:
            stepped, shortage = self._step(stepping)
            reports = self._diverged(stepped) + self._due(stepped)
            if any(place.tenant.book.note_is_due for place in stepped):
                self._note(stepped)
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
        left = min((place.tenant.task.horizon - place.step for place in stepping), default=steps)
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
        place = self._places[name]
        return self._rows.state(place, self._groups.of(place.slot).state_of(place.slot))

    # --- joining -------------------------------------------------------------------------------------------------

    def _place(self, tenant: Tenant) -> None:
        taken = {place.slot for place in self._places.values()}
        slot = min(set(range(self.slots)) - taken)
        order = self._order(tenant.task.seeds.order)
        self._rows.fill(slot, tenant, order)
        self._groups.join(slot, tenant)
        sizes = self._functions.frames(Split.TRAIN).sizes
        self._places[tenant.name] = Place(
            slot=slot,
            tenant=tenant,
            step=tenant.state.step,
            order=order,
            misfits=~fits(sizes, order, self.padding.usual),
        )

    def _lengthened(self, tenant: Tenant) -> Tenant:
        """A trial whose horizon is over, at the beginning of its next one."""
        longer = tenant.task.lengthened
        assert longer is not None
        tenant.book.close(None)
        return Tenant(longer, self._shelf)

    def _order(self, seed: int) -> NDArray[np.int64]:
        """Frames of each step; trials share seeds, and drawing a long order takes a while."""
        if seed not in self._orders:
            frames, workload = len(self._functions.frames(Split.TRAIN)), self.workload
            self._orders[seed] = np.array(batch_order(frames, workload.batch_size, workload.max_steps, seed))
        return self._orders[seed]

    def _vacate(self, name: str) -> Tenant:
        """Free a trial's row."""
        self._book_time()
        place = self._places.pop(name)
        self._groups.leave(place.slot)
        return place.tenant

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
        self._places = {}
        self.slots //= 2
        del self._rows, self._groups, self._gradient_programs, self._finish
        release_memory(self.device)
        self._clear()
        for parked in kept[: self.slots]:
            self._unpark(parked)

    def _unpark(self, parked: _Parked) -> None:
        self._parked.remove(parked)
        self._place(parked.tenant)
        self._places[parked.tenant.name].waiting = parked.waiting

    def _parked_trial(self, name: str) -> _Parked | None:
        return next((parked for parked in self._parked if parked.tenant.name == name), None)

    # --- stepping ------------------------------------------------------------------------------------------------

    def _step(self, stepping: Sequence[Place]) -> tuple[list[Place], str]:
        """One step of these trials; returns those that made it, and what is said where memory ran out before others."""
        misfits = [place for place in stepping if place.misfits[place.step]]
        fitting = [place for place in stepping if not place.misfits[place.step]]
        stepped: list[Place] = []
        shortage = ""
        for places, shape in ((fitting, self.padding.usual), (misfits, self.padding.guaranteed)):
            if places and not shortage:
                made, shortage = self._step_together(places, shape)
                stepped += made
                self._watchdog.beat()
        self.trial_steps += len(stepped)
        return stepped, shortage

    def _step_together(self, places: Sequence[Place], shape: BatchShape) -> tuple[list[Place], str]:
        rows = self._rows
        bucket = self._bucket()
        self._gather_below(bucket)
        steps = {place.slot: place.step + 1 for place in places}
        rows.set_stepping(steps)
        for group in self._groups:
            group.set_stepping(steps)
        moved: set[int] = set()
        shortage = ""
        try:
            self._gradient_program(shape, bucket)()
            for group in self._groups:
                members = {member.slot for member in group.occupied()} & steps.keys()
                if members:
                    with self._lanes.lane():  # groups share no row but the spare one, whose content nobody reads
                        group.update(rows.weights, rows.grads, rows.steps, rows.factors, group.phases(steps))
                    moved |= members
        except torch.OutOfMemoryError as error:  # kept alive it would keep the memory of the frames it went through
            shortage = _first_line(error)
        finally:
            self._lanes.join()
        if shortage:
            rows.set_stepping(moved)  # the others make this step once there is room
        stepped = [place for place in places if place.slot in moved]
        if stepped:
            self._finish()
        for place in stepped:
            place.step += 1
        return stepped, shortage

    def _bucket(self) -> int:
        """Rows that a step computes: all, or on a CPU a half and on a GPU a quarter, ..., where few trials are left."""
        bucket, trials = self.slots, len(self._places)
        left = max(place.tenant.task.horizon - place.step for place in self._places.values())
        if self._exact:
            return min(bucket, 1 << (trials - 1).bit_length())
        if self._compiled and left < _SHRUNK_FROM:
            return bucket
        smaller, by = bucket, _SHRUNK_BY[self.device.type]
        while smaller // by >= trials:
            smaller //= by
            traced = (self.padding.usual, smaller) in self._gradient_programs
            if traced or (bucket - smaller) * left >= _TRACED_FROM[self.device.type]:
                bucket = smaller
        return bucket

    def _gather_below(self, bucket: int) -> None:
        """Move trials to the rows that the step computes."""
        taken = {place.slot for place in self._places.values()}
        free = (slot for slot in range(bucket) if slot not in taken)
        for place in [place for place in self._places.values() if place.slot >= bucket]:
            to = next(free)
            self._rows.move(place.slot, to)
            self._groups.move(place.slot, to)
            place.slot = to

    def _gradient_program(self, shape: BatchShape, bucket: int) -> Replayed:
        """Made for all shapes that trials will need, so that no step in the middle of training waits for a trace."""
        if (shape, bucket) not in self._gradient_programs:
            misfits = any(place.misfits[place.step :].any() for place in self._places.values())
            for each in dict.fromkeys((shape, self.padding.guaranteed if misfits else shape)):
                example = self._weights_and_constants(bucket)
                called, keys = self._functions.loss_gradient(each, *example, partial(self._gathered, each, bucket))
                work = partial(self._gradients, called, keys, each, bucket)
                self._gradient_programs[each, bucket] = Replayed(work, self.device)
        return self._gradient_programs[shape, bucket]

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
        return self._functions.training_batches(indices, rows.labelled[:bucket], shape, keys)

    def _weights_and_constants(self, bucket: int) -> tuple[Tensors, Tensors]:
        rows = self._rows
        weights = rows.packing.split({dtype: matrix[:bucket] for dtype, matrix in rows.weights.items()})
        return weights, {name: stacked[:bucket] for name, stacked in rows.constants.items()}

    # --- reporting -------------------------------------------------------------------------------------------------

    def _diverged(self, stepping: Sequence[Place]) -> list[tuple[str, Evaluation]]:
        every = _FINITE_CHECK_EVERY[self.device.type]
        if not any(place.step % every == 0 for place in stepping):
            return []
        broken = self._rows.broken.tolist()
        return [
            self._ended(place, Reason.DIVERGED, f"training loss not finite by step {place.step}")
            for place in stepping
            if broken[place.slot]
        ]

    def _ended(self, place: Place, reason: Reason, message: str) -> tuple[str, Evaluation]:
        name = place.tenant.name
        self._book_time()
        report = place.tenant.book.ended(place.step, reason, message)
        self.leave(name, reason)
        return name, report

    def _due(self, stepping: Sequence[Place]) -> list[tuple[str, Evaluation]]:
        due = [
            place
            for place in stepping
            if place.step in place.tenant.task.evaluation_steps and place.tenant.name in self._places
        ]
        if not due:
            return []
        self._book_time()
        try:
            measured = self._evaluation.measured(due, self._rows, self._groups)
        except torch.OutOfMemoryError as error:
            return [self._ended(place, Reason.OOM, _first_line(error)) for place in due]
        evaluated = self._now()
        self.evaluating_s += evaluated - self._since
        self._write(due, measured)
        self._since = self._now()  # nobody pays for an evaluation or a refinement in training time
        self.writing_s += self._since - evaluated
        reports = [self._reported(place) for place in due]
        self._since = self._now()
        return reports

    def _write(self, due: Sequence[Place], measured: Sequence[Measured]) -> None:
        """Judge evaluations and write those that must be, several files at once: each waits for the disk."""
        writes = []
        losses = self._rows.take_mean_losses([place.slot for place in due])
        for place, found, loss in zip(due, measured, losses, strict=True):
            tenant = place.tenant
            rate = tenant.hyper["learning_rate"] * tenant.learning_rate_factor(place.step)
            weights_of = partial(self._weights_of, tenant)
            began = self._now()
            refinement = add_refinement(
                tenant.task, place.step, found.errors, found.parts, tenant.model, weights_of, self._watchdog.beat
            )
            if refinement is not None:
                self._spare_neighbours(place, self._now() - began)
            last = tenant.book.judged(
                place.step,
                found.errors,
                train_loss=loss,
                learning_rate=rate,
                refinement=refinement,
                parts=found.parts,
            )
            if not tenant.book.is_due:
                continue
            saved = tenant.saved(self.state(tenant.name)) if last.is_sound else None
            writes.append(self._writers.submit(tenant.book.write, saved))
        wait(writes)
        for write in writes:
            write.result()

    def _spare_neighbours(self, refined: Place, seconds: float) -> None:
        """Trials that stood still while another one was refined have not trained longer by it."""
        for place in self._places.values():
            if place is not refined:
                place.tenant.book.pause(seconds)

    def _weights_of(self, tenant: Tenant, readout: Readout) -> Tensors:
        return tenant.weights_of(self.state(tenant.name), readout)

    def _keep(self, place: Place) -> None:
        """Write down what a trial that is to go on elsewhere would lose."""
        self._book_time()
        tenant = place.tenant
        if place.step == tenant.book.last.step:
            tenant.book.keep(lambda: tenant.saved(self.state(tenant.name)))
        else:
            tenant.book.note(place.step)

    def _note(self, stepped: Sequence[Place]) -> None:
        """Let trials write down how far they have come, for what a kill may take."""
        self._book_time()
        going = [place for place in stepped if place.tenant.name in self._places and not place.waiting]
        notes = [self._writers.submit(place.tenant.book.note, place.step) for place in going]
        for note in notes:
            note.result()
        self.writing_s += time.perf_counter() - self._since

    def _reported(self, place: Place) -> tuple[str, Evaluation]:
        name, last = place.tenant.name, place.tenant.book.last
        place.waiting = True
        if last.outcome is not None:
            self.leave(name, last.outcome)
        return name, last

    # --- time ----------------------------------------------------------------------------------------------------

    def _book_time(self) -> None:
        """Share the training time since the last call among the trials that were stepping."""
        now = self._now()
        stepping = [place for place in self._places.values() if not place.waiting]
        for place in stepping:
            place.tenant.book.device_s += (now - self._since) / len(stepping)
        self._since = now

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def _first_line(error: BaseException) -> str:
    return (str(error) or "out of memory").splitlines()[0]


def _clipped(limit: float, grads: Flat) -> Flat:
    most = torch.full((), limit, dtype=torch.float64, device=next(iter(grads.values())).device)
    named, _ = clip_by_global_norm({str(dtype): vector for dtype, vector in grads.items()}, most)
    return {dtype: named[str(dtype)] for dtype in grads}
