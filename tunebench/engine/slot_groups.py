"""All slots of a cohort, grouped by the update rule that they follow."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from tunebench.engine.slot_group import Flat, Member, SlotGroup, least_capacity, rule_key
from tunebench.engine.tenant import Tenant
from tunebench.optim.factored import reads_average


class SlotGroups:
    """One `SlotGroup` per update rule, each growing and shrinking by powers of two with its members.

    Args:
        slots: of the cohort; the row after them belongs to no trial.
        device: where everything lives.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self._slots, self._device = slots, device
        self._groups: dict[Any, SlotGroup] = {}
        self._keys: dict[int, Any] = {}

    def __iter__(self) -> Iterator[SlotGroup]:
        return iter(self._groups.values())

    def of(self, slot: int) -> SlotGroup:
        """The group that a slot is in."""
        return self._groups[self._keys[slot]]

    def join(self, slot: int, tenant: Tenant) -> None:
        """Put a trial's slot into the group of its rule."""
        key = rule_key(tenant.rule)
        group = self._groups.get(key)
        if group is None:
            group = SlotGroup(tenant.rule, least_capacity(self._slots, self._device), self._slots, self._device)
        elif None not in group.members:
            group = group.resized(2 * group.capacity)
        group.add(Member(slot, tenant.hyper), tenant.state.optimizer)
        self._groups[key], self._keys[slot] = group, key

    def leave(self, slot: int) -> None:
        """Take a slot out; a group that three quarters of its members have left is halved, an empty one forgotten."""
        key = self._keys.pop(slot)
        group = self._groups[key]
        group.remove(slot)
        members = len(group.occupied())
        if not members:
            del self._groups[key]
        elif members <= group.capacity // 4:
            self._groups[key] = group.resized(group.capacity // 2)

    def move(self, slot: int, to: int) -> None:
        """A trial has moved to another row."""
        self.of(slot).move(slot, to)
        self._keys[to] = self._keys.pop(slot)

    def averaged(self, slots: Collection[int], weights: Flat) -> Flat:
        """`weights` with the averages of rules that keep their own in the rows of the groups of some slots."""
        averaged = weights
        for key in dict.fromkeys(self._keys[slot] for slot in slots):
            group = self._groups[key]
            read = reads_average(group.rule)
            averaged = averaged if read is None else group.averaged(weights, averaged, read)
        return averaged
