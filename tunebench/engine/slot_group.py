"""The slots of a cohort whose trials follow one update rule: one vmapped update for all of them.

What few steps of a trial need, new bases of SOAP, is done for the trials that are due and no others: with periods drawn
between 1 and 100 some slot of 32 is due at nearly every step, and seven are on average.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch.func import vmap

from tunebench.engine.graphs import Replayed
from tunebench.engine.row_mask import RowMask
from tunebench.optim.packing import Packing, Tensors
from tunebench.optim.rule import Phase, Renewal, UpdateRule, renewal_of

Flat = dict[torch.dtype, torch.Tensor]
"""One matrix (rows, weights) per dtype; each row holds all weights of a slot, sorted by name."""

_ORDER = (Phase.PLAIN, Phase.REFRESH, Phase.START)

# On the CPU a trial's bits must not depend on the capacity of its group. With one row a transposed view stays a view
# where with more it is copied, and the product of either rounds differently; with eight or more, torch takes the powers
# of some rows by vector instructions and of others not, which differ in the last bit. So capacities start at two, and
# at most four rows are computed together.
_LEAST_ROWS_ON_CPU, _ROWS_TOGETHER_ON_CPU = 2, 4


@dataclass(frozen=True)
class Member:
    """A trial in a group.

    Attributes:
        slot: its row in the cohort's matrices.
        hyper: the rule's hyperparameters, the learning rate without its schedule.
    """

    slot: int
    hyper: Mapping[str, float]


def rule_key(rule: UpdateRule) -> tuple[Any, ...]:
    """Equal for rules that one group may hold: same algorithm, same settings that change its code, same blocks."""
    settings = tuple((f.name, getattr(rule, f.name)) for f in fields(rule) if f.name != "packing")  # type: ignore[arg-type]
    return type(rule).__name__, settings, rule.packing.blocks


def least_capacity(slots: int, device: torch.device) -> int:
    """Rows of the smallest group in a cohort of so many slots."""
    return min(slots, _LEAST_ROWS_ON_CPU) if device.type == "cpu" else 1


class SlotGroup:
    """State and hyperparameters of some slots, stacked in `capacity` rows; free rows are computed and thrown away.

    Args:
        rule: the update rule; its packing must lay weights out as the cohort's matrices do.
        capacity: rows.
        spare: a row of the cohort's matrices that belongs to no trial.
        device: where everything lives.
    """

    def __init__(self, rule: UpdateRule, capacity: int, spare: int, device: torch.device) -> None:
        self.rule = rule
        self.members: list[Member | None] = [None] * capacity
        self._spare = spare
        self._together = _ROWS_TOGETHER_ON_CPU if device.type == "cpu" else None
        self._slots = torch.full((capacity,), spare, dtype=torch.int64, device=device)
        self._stepping = RowMask(capacity, device)
        names = dict.fromkeys((*rule.hyperparameters, "learning_rate"))
        # Free rows hold ones, which no rule divides to zero by.
        self._hyper = {name: torch.ones(capacity, dtype=torch.float64, device=device) for name in names}
        self._state: Tensors = {}
        self._replayed: dict[Phase, Replayed] = {}
        self._renewal = renewal_of(rule)
        self._refreshes: dict[int, _Refresh] = {}

    @property
    def capacity(self) -> int:
        """Rows, free ones included."""
        return len(self.members)

    def occupied(self) -> list[Member]:
        """The members, in order of their rows."""
        return [member for member in self.members if member is not None]

    def add(self, member: Member, state: Tensors) -> None:
        """Put a trial into a free row.

        Args:
            member: the trial.
            state: the rule's state for it.
        """
        row = self.members.index(None)
        if not self._state:
            self._state = {
                name: tensor.to(self._slots.device).unsqueeze(0).repeat(self.capacity, *[1] * tensor.ndim)
                for name, tensor in state.items()
            }
        for name, tensor in state.items():
            self._state[name][row].copy_(tensor)
        for name, stacked in self._hyper.items():
            stacked[row] = member.hyper[name]
        self.members[row] = member
        self._slots[row] = member.slot

    def remove(self, slot: int) -> None:
        """Free the row of a slot."""
        row = self._row(slot)
        self.members[row] = None
        self._slots[row] = self._spare
        self._stepping.clear(row)

    def move(self, slot: int, to: int) -> None:
        """A trial has moved to another row of the cohort's matrices."""
        row = self._row(slot)
        member = self.members[row]
        assert member is not None
        self.members[row] = Member(to, member.hyper)
        self._slots[row] = to

    def state_of(self, slot: int) -> Tensors:
        """Copies of the rule's state of a slot."""
        row = self._row(slot)
        return {name: tensor[row].clone() for name, tensor in self._state.items()}

    def resized(self, capacity: int) -> SlotGroup:
        """A group of another capacity with the same members."""
        group = SlotGroup(self.rule, capacity, self._spare, self._slots.device)
        for member in self.occupied():
            group.add(member, self.state_of(member.slot))
        return group

    def set_stepping(self, slots: Collection[int]) -> None:
        """Only these slots change from now on."""
        self._stepping.set([member is not None and member.slot in slots for member in self.members])

    def phases(self, steps: Mapping[int, int]) -> dict[int, Phase]:
        """What the next step of each row needs, given the number of the step that each stepping slot is to make."""
        return {
            row: self.rule.phase(steps[member.slot], member.hyper)
            for row, member in enumerate(self.members)
            if member is not None and member.slot in steps
        }

    def update(
        self, weights: Flat, grads: Flat, steps: torch.Tensor, factors: torch.Tensor, phases: Mapping[int, Phase]
    ) -> None:
        """One step of the stepping slots, in place, as a CUDA graph where there is one.

        Args:
            weights: the cohort's weights, the same tensors at every call.
            grads: gradients, likewise; they have no row for the spare one.
            steps: finished steps of every row of the weights, int64.
            factors: what the schedule makes of each row's learning rate in this step, float64.
            phases: from `phases`.
        """
        phase = Phase.PLAIN if self._renewal else max(phases.values(), key=_ORDER.index, default=Phase.PLAIN)
        call = partial(self._update, weights, grads, steps, factors, phase)
        if phase is Phase.START:  # eigendecompositions wait for the device
            call()
        else:
            if phase not in self._replayed:
                self._replayed[phase] = Replayed(call, self._slots.device)
            self._replayed[phase]()
        if self._renewal:
            due = {row: phase for row, phase in phases.items() if phase is not Phase.PLAIN}
            self._renew(due, self._renewal)

    def _renew(self, due: Mapping[int, Phase], renewal: Renewal) -> None:
        """Renew the state of some rows after their plain step.

        On a GPU refreshes are made together. What is on a CPU is renewed row by row, and so are first bases, which the
        host computes anyway. So is what finds no memory on the device: the plain step cannot be made again.
        """
        left = dict(due)
        refreshed = [row for row, phase in due.items() if phase is Phase.REFRESH]
        if refreshed and self._slots.device.type != "cpu" and self._refreshed_together(refreshed, renewal):
            left = {row: phase for row, phase in due.items() if phase is not Phase.REFRESH}
        for row, phase in left.items():
            own = {name: tensor[row].cpu() for name, tensor in self._state.items()}
            for name, tensor in renewal(own, phase).items():
                self._state[name][row].copy_(tensor)

    def _refreshed_together(self, rows: Sequence[int], renewal: Renewal) -> bool:
        """Refresh rows on the device; returns False, and leaves them as they are, where memory does not suffice."""
        together = min(1 << (len(rows) - 1).bit_length(), self.capacity)
        try:
            if together not in self._refreshes:
                self._refreshes[together] = _Refresh(together, self._state, renewal)
            self._refreshes[together](rows)
        except torch.OutOfMemoryError:
            return False
        return True

    def _update(self, weights: Flat, grads: Flat, steps: torch.Tensor, factors: torch.Tensor, phase: Phase) -> None:
        # A free row reads any gradient and writes to the spare row.
        of_grads = torch.where(self._stepping.marked, self._slots, torch.zeros_like(self._slots))
        old = {dtype: matrix.index_select(0, self._slots) for dtype, matrix in weights.items()}
        own = {dtype: matrix.index_select(0, of_grads) for dtype, matrix in grads.items()}
        factor = factors.index_select(0, self._slots)
        hyper = {**self._hyper, "learning_rate": self._hyper["learning_rate"] * factor}
        number = steps.index_select(0, self._slots) + 1
        flat, state = vmap(partial(self._one, phase), chunk_size=self._together)(own, self._state, old, hyper, number)
        chosen = {dtype: self._chosen(flat[dtype], old[dtype]) for dtype in weights}
        kept = {name: self._chosen(state[name], tensor) for name, tensor in self._state.items()}
        # Memory can run out above and leaves the slots as they were; from here on nothing is allocated.
        for dtype, matrix in weights.items():
            matrix.index_copy_(0, self._slots, chosen[dtype])
        for name, tensor in self._state.items():
            tensor.copy_(kept[name])

    def _one(
        self, phase: Phase, grads: Flat, state: Tensors, weights: Flat, hyper: Tensors, step: torch.Tensor
    ) -> tuple[Flat, Tensors]:
        packing = self.rule.packing
        packed, new = self.rule.update(packing.arranged(grads), state, packing.arranged(weights), hyper, step, phase)
        return packing.flattened(packed), new

    def averaged(self, weights: Flat, others: Flat, read: Callable[..., Tensors]) -> Flat:
        """`others` with what the rule's `averaged` makes of the weights in the rows of this group.

        Args:
            weights: the cohort's weights.
            others: averaged weights of the other groups' rows.
            read: the rule's `averaged`.
        """
        own = {dtype: matrix.index_select(0, self._slots) for dtype, matrix in weights.items()}
        averaged = vmap(partial(self._one_averaged, read), chunk_size=self._together)
        found = averaged(own, self._state, self._hyper)
        return {dtype: matrix.index_copy(0, self._slots, found[dtype]) for dtype, matrix in others.items()}

    def _one_averaged(self, read: Callable[..., Tensors], weights: Flat, state: Tensors, hyper: Tensors) -> Flat:
        packing = self.rule.packing
        return packing.flattened(read(packing.arranged(weights), state, hyper))

    def _chosen(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return torch.where(self._stepping.marked.view(-1, *[1] * (new.ndim - 1)), new, old)

    def _row(self, slot: int) -> int:
        return next(row for row, member in enumerate(self.members) if member is not None and member.slot == slot)


class _Refresh:
    """Refreshes some rows of a group's state on a GPU, as a CUDA graph from the second time on.

    Args:
        most: rows that can be refreshed at once.
        state: of all rows, the same tensors at every call.
        renewal: of one row.
    """

    def __init__(self, most: int, state: Tensors, renewal: Renewal) -> None:
        self._state, self._renewal = state, renewal
        device = next(iter(state.values())).device
        self._rows = torch.zeros(most, dtype=torch.int64, device=device)
        self._replayed = Replayed(self._refresh, device)

    def __call__(self, rows: Sequence[int]) -> None:
        """Refresh these rows."""
        filled = list(rows) + [rows[-1]] * (len(self._rows) - len(rows))  # the last one several times, to one effect
        # From pinned memory, which torch keeps until it was read: the host does not wait.
        self._rows.copy_(torch.tensor(filled, dtype=torch.int64, pin_memory=True), non_blocking=True)
        self._replayed()

    def _refresh(self) -> None:
        own = {name: tensor.index_select(0, self._rows) for name, tensor in self._state.items()}
        refreshed = vmap(lambda state: self._renewal(state, Phase.REFRESH))(own)
        for name, tensor in refreshed.items():  # nothing is allocated from here on
            self._state[name].index_copy_(0, self._rows, tensor)


def repacked(state: Tensors, source: Packing, target: Packing, renamed: Mapping[str, str]) -> Tensors:
    """A rule's state for another order of the weights.

    Only rules that treat every weight alike can change it; for others both packings must be the same object.

    Args:
        state: of a rule of `source`: vectors under ``buffer/segment``, other tensors under other names.
        source: packing of the state.
        target: packing wanted, with one segment per dtype as the source has.
        renamed: names of the parameters in `target` by those in `source`.
    """
    if source is target:
        return dict(state)
    buffers: dict[str, Tensors] = {}
    other: Tensors = {}
    segments = {segment.name for segment in source.segments}
    for key, tensor in state.items():
        buffer, _, segment = key.partition("/")
        if segment in segments:
            buffers.setdefault(buffer, {})[segment] = tensor
        else:
            other[key] = tensor
    for buffer, packed in buffers.items():
        named = {renamed[name]: tensor for name, tensor in source.unpack(packed).items()}
        other |= {f"{buffer}/{name}": vector for name, vector in target.pack(named).items()}
    return other
