"""Groups of slots: what a trial's update depends on, and what it leaves alone."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from nequip.utils.global_state import set_global_state

from tests.engine.conftest import MakeTask
from tunebench.engine.slot_group import (
    Flat,
    Member,
    SlotGroup,
    _Refresh,
    least_capacity,
    repacked,
    rule_key,
)
from tunebench.engine.tenant import ModuleShelf, Tenant
from tunebench.optim.matrix_view import trainable_parameters
from tunebench.optim.packing import Packing
from tunebench.optim.rule import Phase, renewal_of
from tunebench.study.search_space import available_optimizers

CPU = torch.device("cpu")
SPARE = 16
DTYPE = torch.float64


@lru_cache(maxsize=1)
def shelf() -> ModuleShelf:
    """Models built once for all tests here."""
    set_global_state()  # NequIP builds none without
    return ModuleShelf()


@pytest.fixture
def tenant(request: pytest.FixtureRequest, make_task: MakeTask) -> Tenant:
    """A trial of the optimizer that the test names, in float64."""
    return make_tenant(make_task, request.param)


def make_tenant(make_task: MakeTask, optimizer: str, **hyperparameters: object) -> Tenant:
    task = make_task(optimizer, **hyperparameters)
    double = task.workload.model.model_copy(update={"dtype": "float64"})
    workload = task.workload.model_copy(update={"model": double})
    return Tenant(type(task)(**{**vars(task), "workload": workload}), shelf())


class Rows:
    """A cohort's matrices, with the same weights and gradients in every row."""

    def __init__(self, tenant: Tenant, seed: int = 0) -> None:
        self._packing = Packing.elementwise(trainable_parameters(tenant.model))
        joined = self._packing.joined({name: weight.reshape(-1) for name, weight in tenant.state.weights.items()})
        self.weights: Flat = {dtype: row.repeat(SPARE + 1, 1) for dtype, row in joined.items()}
        self.grads: Flat = {dtype: torch.zeros_like(matrix) for dtype, matrix in self.weights.items()}
        self.steps = torch.zeros(SPARE + 1, dtype=torch.int64)
        self.factors = torch.ones(SPARE + 1, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)

    def step(self, group: SlotGroup, stepping: set[int], broken: int | None = None) -> dict[int, Phase]:
        """One step of some slots along one gradient, which is NaN in the row of a broken one."""
        for matrix in self.grads.values():
            drawn = torch.randn(matrix.shape[1], generator=self._generator, dtype=DTYPE)
            matrix.copy_(drawn.expand_as(matrix))
            if broken is not None:
                matrix[broken] = float("nan")
        group.set_stepping(sorted(stepping))
        phases = group.phases({slot: int(self.steps[slot]) + 1 for slot in stepping})
        group.update(self.weights, self.grads, self.steps, self.factors, phases)
        self.steps[sorted(stepping)] += 1
        return phases


def group_of(tenant: Tenant, capacity: int, slots: range | list[int]) -> SlotGroup:
    group = SlotGroup(tenant.rule, capacity, SPARE, CPU)
    for slot in slots:
        group.add(Member(slot, tenant.hyper), tenant.state.optimizer)
    return group


def trained(tenant: Tenant, capacity: int, members: int, steps: int) -> Flat:
    rows, group = Rows(tenant), group_of(tenant, capacity, range(members))
    for _ in range(steps):
        rows.step(group, set(range(members)))
    return rows.weights


@pytest.mark.parametrize("tenant", available_optimizers(), indirect=True)
def test_neither_the_capacity_of_its_group_nor_its_row_changes_a_bit_of_a_trial(tenant: Tenant) -> None:
    alone = trained(tenant, capacity=2, members=1, steps=12)
    for capacity, members in ((2, 2), (4, 3), (16, 16)):
        found = trained(tenant, capacity, members, steps=12)
        for dtype, matrix in found.items():
            assert torch.equal(matrix[:members], alone[dtype][:1].expand(members, -1))
            assert not torch.equal(matrix[0], matrix[SPARE])


@pytest.mark.parametrize("tenant", ["adam"], indirect=True)
def test_powers_of_the_step_are_the_same_in_large_groups(tenant: Tenant) -> None:
    alone = trained(tenant, capacity=2, members=1, steps=120)
    (found,) = trained(tenant, capacity=16, members=16, steps=120).values()
    assert torch.equal(found[:16], next(iter(alone.values()))[:1].expand(16, -1))


@pytest.mark.parametrize("tenant", ["adamw", "soap", "schedule_free"], indirect=True)
def test_a_slot_that_does_not_step_is_left_as_it_is_and_so_is_the_spare_row(tenant: Tenant) -> None:
    rows, group = Rows(tenant), group_of(tenant, 4, [3, 5, 7])
    rows.step(group, {3, 5, 7})
    states = {slot: group.state_of(slot) for slot in (3, 5, 7)}
    before = {dtype: matrix.clone() for dtype, matrix in rows.weights.items()}
    rows.step(group, {3})
    rows.step(group, {3})
    for dtype, matrix in rows.weights.items():
        others = [row for row in range(SPARE + 1) if row != 3]
        assert torch.equal(matrix[others], before[dtype][others])
        assert not torch.equal(matrix[3], before[dtype][3])
    for slot in (5, 7):
        assert all(torch.equal(tensor, states[slot][name]) for name, tensor in group.state_of(slot).items())
    assert any(not torch.equal(tensor, states[3][name]) for name, tensor in group.state_of(3).items())


@pytest.mark.parametrize("tenant", ["adamw", "muon", "soap_muon"], indirect=True)
def test_a_member_that_is_not_finite_touches_no_other_and_its_row_serves_the_next(tenant: Tenant) -> None:
    rows, group = Rows(tenant), group_of(tenant, 2, [0, 1])
    sound, alone = Rows(tenant), group_of(tenant, 2, [0])
    for _ in range(3):
        rows.step(group, {0, 1}, broken=1)
        sound.step(alone, {0})
    assert not all(tensor.isfinite().all() for tensor in group.state_of(1).values())
    assert not any(matrix[1].isfinite().all() for matrix in rows.weights.values())
    group.remove(1)
    rows.step(group, {0}, broken=1)
    sound.step(alone, {0})
    group.add(Member(9, tenant.hyper), tenant.state.optimizer)
    alone.add(Member(9, tenant.hyper), tenant.state.optimizer)
    rows.step(group, {0, 9})
    sound.step(alone, {0, 9})
    for dtype, matrix in rows.weights.items():
        assert torch.equal(matrix[[0, 9]], sound.weights[dtype][[0, 9]])


@pytest.mark.parametrize("tenant", ["ranger", "soap"], indirect=True)
def test_a_group_that_changes_its_capacity_or_a_members_slot_goes_on_bit_for_bit(tenant: Tenant) -> None:
    rows, group = Rows(tenant), group_of(tenant, 2, [0])
    steady, other = Rows(tenant), group_of(tenant, 2, [0])
    for resize in (4, 2):
        rows.step(group, {0})
        steady.step(other, {0})
        group = group.resized(resize)
    for matrix in rows.weights.values():
        matrix[6] = matrix[0]
    rows.steps[6] = rows.steps[0]
    group.move(0, 6)
    rows.step(group, {6})
    steady.step(other, {0})
    for dtype, matrix in rows.weights.items():
        assert torch.equal(matrix[6], steady.weights[dtype][0])


def test_a_later_phase_of_one_member_changes_no_bit_of_the_others(make_task: MakeTask) -> None:
    often = make_tenant(make_task, "soap", precondition_frequency=2, name="often")
    rarely = make_tenant(make_task, "soap", precondition_frequency=50, name="rarely")
    assert rule_key(often.rule) == rule_key(rarely.rule)
    rows, alone = Rows(rarely), Rows(rarely)
    group, single = group_of(rarely, 4, [0]), group_of(rarely, 2, [0])
    phases = []
    for step in range(6):
        if step == 2:
            group.add(Member(1, often.hyper), often.state.optimizer)
        phases.append(rows.step(group, {0, 1} if step >= 2 else {0}))
        alone.step(single, {0})
    of_rows = [[found.get(row) for found in phases] for row in (0, 1)]
    assert of_rows[0] == [Phase.START] + 5 * [Phase.PLAIN]
    assert of_rows[1] == [None, None, Phase.START, Phase.PLAIN, Phase.REFRESH, Phase.PLAIN]
    for dtype, matrix in rows.weights.items():
        assert torch.equal(matrix[0], alone.weights[dtype][0])


def test_rows_are_refreshed_together_as_they_are_one_by_one(make_task: MakeTask) -> None:
    tenant = make_tenant(make_task, "soap", precondition_frequency=50)
    renewal = renewal_of(tenant.rule)
    assert renewal is not None
    rows, group = Rows(tenant), group_of(tenant, 4, [0, 1, 2])
    for step in range(5):
        rows.step(group, {0, 1, 2} if step % 2 else {0, 1})
    state = {name: torch.stack([group.state_of(slot)[name] for slot in (0, 1, 2)]) for name in group.state_of(0)}
    refresh = _Refresh(4, state, renewal)
    refresh._rows.copy_(torch.tensor([2, 0, 0, 0]))
    refresh._refresh()
    for row in (0, 1, 2):
        alone = group.state_of(row)
        changed = {} if row == 1 else renewal(alone, Phase.REFRESH)
        for name, tensor in {**alone, **changed}.items():
            torch.testing.assert_close(state[name][row], tensor, rtol=1e-12, atol=1e-14)
        assert all(not torch.equal(alone[name], tensor) for name, tensor in changed.items() if "basis" in name)


def test_rules_of_other_settings_or_blocks_get_groups_of_their_own(make_task: MakeTask) -> None:
    keys = {
        name: rule_key(make_tenant(make_task, optimizer, name=name, **more).rule)
        for name, optimizer, more in (
            ("soap", "soap", {}),
            ("other-rate", "soap", {"learning_rate": 1e-4, "precondition_frequency": 3, "beta1": 0.9}),
            ("flat", "soap", {"fctp_view": "flat"}),
            ("one-sided", "soap", {"sides": "one"}),
            ("muon", "soap_muon", {}),
        )
    }
    assert keys["soap"] == keys["other-rate"]
    assert len({str(key) for key in keys.values()}) == 4


@pytest.mark.parametrize(("slots", "rows"), [(1, 1), (2, 2), (8, 2)])
def test_on_the_cpu_a_group_starts_with_two_rows_where_the_cohort_has_them(slots: int, rows: int) -> None:
    assert least_capacity(slots, CPU) == rows
    assert least_capacity(slots, torch.device("cuda")) == 1


def test_a_state_is_laid_out_anew_by_name_and_back() -> None:
    shapes = {"a": (2, 3), "b": (4,), "c": (1, 2)}
    generator = torch.Generator().manual_seed(0)
    named = {name: torch.randn(*shape, generator=generator, dtype=DTYPE) for name, shape in shapes.items()}
    source = Packing.elementwise(named)
    renamed = {"a": "z", "b": "y", "c": "x"}
    target = Packing.elementwise({renamed[name]: tensor for name, tensor in named.items()})
    (segment,) = source.segments
    state = {f"moment/{segment.name}": source.pack(named)[segment.name], "count": torch.ones((), dtype=DTYPE)}
    found = repacked(state, source, target, renamed)
    moment = target.unpack({segment.name: found[f"moment/{segment.name}"]})
    assert all(torch.equal(moment[new], named[old]) for old, new in renamed.items())
    assert torch.equal(found["count"], state["count"])
    back = repacked(found, target, source, {new: old for old, new in renamed.items()})
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
