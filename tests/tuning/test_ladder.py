from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunebench.study.decision import Decision, Fate
from tunebench.study.plan import survivors
from tunebench.study.spec import Asha, AshaForm, AshaOrder, Tune
from tunebench.tuning.ladder import Ladder

RUNGS = (1, 3, 9)
ASYNCHRONOUS = {"order": AshaOrder.ASYNCHRONOUS}
STOPPING = {"form": AshaForm.STOPPING, "order": AshaOrder.ASYNCHRONOUS}
Curve = Callable[[int], float]


def names(count: int) -> list[str]:
    return [f"t{index:02d}" for index in range(count)]


def ladder(
    trials: Iterable[str], factor: int = 3, rungs: tuple[int, ...] = RUNGS, sentinels: Iterable[str] = (), **asha: str
) -> Ladder:
    return Ladder(Asha(reduction_factor=factor, **asha), rungs, trials, sentinels)


def stops(values: Iterable[float], factor: int = 3) -> list[bool]:
    """What the stopping form decides about objectives that arrive one after the other."""
    values = list(values)
    rung = ladder(names(len(values)), factor, (1,), **STOPPING)
    return [not rung.arrive(name, 1, value)[0].goes_on for name, value in zip(names(len(values)), values, strict=True)]


class Arm:
    """Trials with known curves that take turns at random, as devices of different speed would let them."""

    def __init__(self, rungs: Ladder, curves: Mapping[str, Curve], ends: Mapping[str, int] | None = None) -> None:
        self.ladder, self.curves, self.ends = rungs, curves, dict(ends or {})
        self.decisions: list[Decision] = []
        self.next_rung = dict.fromkeys(curves, 0)

    def run(self, draw: np.random.Generator) -> dict[str, int]:
        """Rungs passed by each trial once nobody can move any more."""
        while movable := [name for name in self.curves if self._moves(name)]:
            self._move(movable[int(draw.integers(len(movable)))])
        return self.next_rung

    def _moves(self, name: str) -> bool:
        index = self.next_rung[name]
        if index < 0 or index >= len(self.ladder.rungs):
            return False
        return index == 0 or self.ladder.fate(name, self.ladder.rungs[index - 1]) is Fate.GO_ON

    def _move(self, name: str) -> None:
        index = self.next_rung[name]
        rung = self.ladder.rungs[index]
        if self.ends.get(name) == index:
            self.decisions += self.ladder.end(name)
            self.next_rung[name] = -1
            return
        self.decisions += self.ladder.arrive(name, rung, self.curves[name](rung))
        self.next_rung[name] = index + 1

    def summary(self) -> set[tuple[str, int, bool, float]]:
        return {(d.trial, d.rung, d.goes_on, d.cutoff) for d in self.decisions}


def test_nobody_goes_on_before_the_last_has_come_and_then_the_best_third_does() -> None:
    rungs = ladder(names(9))
    for index, name in enumerate(names(8)):
        assert rungs.arrive(name, 1, float(index)) == []
        assert rungs.fate(name, 1) is Fate.WAIT
    decided = {decision.trial: decision for decision in rungs.arrive("t08", 1, 0.5)}
    assert {trial for trial, decision in decided.items() if decision.goes_on} == {"t00", "t08", "t01"}
    assert {(decision.cutoff, decision.competitors) for decision in decided.values()} == {(1.0, 9)}
    assert [rungs.fate(name, 1) for name in ("t08", "t02")] == [Fate.GO_ON, Fate.STOP]


def test_nine_become_three_become_one() -> None:
    arm = Arm(ladder(names(9), rungs=(1, 3)), {name: lambda rung, i=i: float(i) for i, name in enumerate(names(9))})
    passed = arm.run(np.random.default_rng(0))
    assert sorted(passed.values()) == [1] * 6 + [2] * 3
    assert [d.trial for d in arm.decisions if d.rung == 3 and d.goes_on] == ["t00"]


@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(2, 4), st.data())
def test_arrival_has_no_part_in_deterministic_decisions(
    seed: int, count: int, factor: int, data: st.DataObject
) -> None:
    draw = np.random.default_rng(seed)
    table = draw.integers(0, 6, size=(count, len(RUNGS))).astype(np.float64)  # with ties
    table[draw.random(table.shape) < 0.1] = math.nan
    curves = {n: (lambda rung, row=table[i]: float(row[RUNGS.index(rung)])) for i, n in enumerate(names(count))}
    ends = {n: int(draw.integers(3)) for n in names(count) if draw.random() < 0.2}
    sentinels = data.draw(st.sets(st.sampled_from(names(count)), max_size=count))
    outcomes = []
    for arrival in range(3):
        arm = Arm(ladder(names(count), factor, sentinels=sentinels), curves, ends)
        passed = arm.run(np.random.default_rng(arrival))
        outcomes.append((arm.summary(), passed))
        waiting = {n for n, k in passed.items() if k > 0 and arm.ladder.fate(n, RUNGS[k - 1]) is Fate.WAIT}
        assert not waiting, "nobody waits for ever"
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_a_rung_lets_as_many_go_on_as_the_confirm_stage_takes() -> None:
    rungs = Ladder(Asha(reduction_factor=3), (1, 3), names(9), fewest=4)
    for index, name in enumerate(names(9)):
        decided = rungs.arrive(name, 1, float(index))
    assert sum(decision.goes_on for decision in decided) == 4
    for index, name in enumerate(names(4)):
        decided = rungs.arrive(name, 3, float(index))
    assert all(decision.goes_on for decision in decided)


def test_ties_are_broken_by_the_trials_id() -> None:
    rungs = ladder(["b", "a", "c"], rungs=(1,))
    for name in ("c", "b", "a"):
        decided = rungs.arrive(name, 1, 1.0)
    assert [decision.trial for decision in decided if decision.goes_on] == ["a"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("order", list(AshaOrder))
def test_a_value_that_is_not_finite_is_never_promoted(value: float, order: AshaOrder) -> None:
    rungs = ladder(["a", "b"], factor=2, rungs=(1,), order=order)
    decided = [*rungs.arrive("a", 1, value), *rungs.arrive("b", 1, 5.0)]
    assert {decision.trial: decision.goes_on for decision in decided} == {"a": False, "b": True}
    alone = ladder(["a"], rungs=(1,), order=order)
    (decision,) = alone.arrive("a", 1, value)
    assert (decision.fate, decision.cutoff) == (Fate.STOP, math.inf)


def test_who_ended_before_a_rung_counts_there_as_one_that_is_not_among_the_best() -> None:
    rungs = ladder(names(6), rungs=(1,))
    for name in names(4):
        rungs.arrive(name, 1, 1.0)
    assert rungs.end("t04") == []
    decided = rungs.end("t05")
    assert sum(decision.goes_on for decision in decided) == 2
    assert {decision.competitors for decision in decided} == {6}


def test_a_rung_after_the_first_waits_for_those_that_were_promoted_and_for_nobody_else() -> None:
    rungs = ladder(names(6), rungs=(1, 3))
    for index, name in enumerate(names(6)):
        rungs.arrive(name, 1, float(index))
    assert rungs.arrive("t01", 3, 9.0) == []
    decided = rungs.arrive("t00", 3, 8.0)
    assert {(d.trial, d.goes_on, d.competitors) for d in decided} == {("t00", True, 2), ("t01", False, 2)}


def test_in_asynchronous_order_a_trial_goes_on_as_soon_as_it_is_among_the_best_third_of_those_seen() -> None:
    rungs = ladder(names(9), rungs=(1,), **ASYNCHRONOUS)
    assert rungs.arrive("t00", 1, 5.0) == rungs.arrive("t01", 1, 6.0) == []
    assert [d.trial for d in rungs.arrive("t02", 1, 7.0)] == ["t00"]
    assert rungs.arrive("t03", 1, 4.0) == [
        Decision(trial="t03", rung=1, value=4.0, cutoff=4.0, competitors=4, goes_on=True)
    ]
    assert [rungs.fate(name, 1) for name in ("t00", "t01")] == [Fate.GO_ON, Fate.WAIT]


def test_in_asynchronous_order_the_last_arrival_settles_everybody() -> None:
    draw = np.random.default_rng(3)
    for _ in range(20):
        values = {name: float(value) for name, value in zip(names(9), draw.permutation(9), strict=True)}
        arm = Arm(ladder(names(9), rungs=(1,), **ASYNCHRONOUS), {n: (lambda rung, v=v: v) for n, v in values.items()})
        arm.run(draw)
        going = {d.trial for d in arm.decisions if d.goes_on}
        assert {n for n, v in values.items() if v < 3.0} <= going
        assert {d.trial for d in arm.decisions} == set(values)


def test_sentinels_neither_wait_nor_stop_but_what_would_have_become_of_them_is_recorded() -> None:
    rungs = ladder(names(6), rungs=(1, 3), sentinels=["t00", "t05"])
    assert rungs.arrive("t05", 1, 5.0) == []
    assert rungs.fate("t05", 1) is Fate.GO_ON
    for index, name in enumerate(names(5)):
        decided = rungs.arrive(name, 1, float(index))
    shadow = {decision.trial: decision for decision in decided}
    assert (shadow["t05"].goes_on, shadow["t05"].sentinel, shadow["t05"].fate) == (False, True, Fate.GO_ON)
    assert (shadow["t00"].goes_on, shadow["t00"].sentinel) == (True, True)


def test_a_sentinel_that_would_have_been_stopped_competes_no_more() -> None:
    rungs = ladder(names(6), rungs=(1, 3), sentinels=["t05"])
    for index, name in enumerate(names(6)):
        rungs.arrive(name, 1, float(index))
    assert rungs.arrive("t05", 3, -1.0) == []
    rungs.arrive("t00", 3, 1.0)
    decided = rungs.arrive("t01", 3, 0.5)
    assert {(d.trial, d.goes_on, d.competitors) for d in decided} == {("t00", False, 2), ("t01", True, 2)}


def test_a_repeated_arrival_changes_nothing() -> None:
    rungs = ladder(names(3), rungs=(1,))
    for _ in range(3):
        assert rungs.arrive("t00", 1, 1.0) == []
    rungs.arrive("t01", 1, 2.0)
    assert len(rungs.arrive("t02", 1, 3.0)) == 3
    assert rungs.arrive("t00", 1, 9.0) == []


@pytest.mark.parametrize("asha", [{}, ASYNCHRONOUS], ids=["deterministic", "asynchronous"])
def test_a_ladder_rebuilt_after_any_event_decides_as_the_one_that_lived_on(asha: dict[str, str]) -> None:
    draw = np.random.default_rng(1)
    table = draw.random((12, 3))
    curves = {n: (lambda rung, row=table[i]: float(row[RUNGS.index(rung)])) for i, n in enumerate(names(12))}
    whole = Arm(ladder(names(12), sentinels=["t03"], **asha), curves)
    whole.run(np.random.default_rng(7))

    class Interrupted(Arm):
        def _move(self, name: str) -> None:
            super()._move(name)
            rebuilt = ladder(names(12), sentinels=["t03"], **asha)
            for trial in names(12):
                values = {rung: curves[trial](rung) for rung in RUNGS[: max(self.next_rung[trial], 0)]}
                # a kill may have cut off the last entry: what was decided last is written for half of the trials
                kept = [d.to_plain() for d in self.decisions if d.trial == trial]
                rebuilt.rebuild(trial, values, kept[: -1 if int(trial[1:]) % 2 and not asha else None], ended=False)
            self.ladder = rebuilt
            rebuilt.settle()

    resumed = Interrupted(ladder(names(12), sentinels=["t03"], **asha), curves)
    resumed.run(np.random.default_rng(7))
    assert resumed.summary() == whole.summary()
    assert resumed.next_rung == whole.next_rung


def test_the_stopping_form_lets_the_best_so_far_go_on() -> None:
    draw = np.random.default_rng(seed=0)
    for factor in (2, 3, 4):
        values = draw.permutation(40).astype(np.float64)
        stopped = stops(values, factor)
        for index, value in enumerate(values):
            if value == values[: index + 1].min():
                assert not stopped[index]


def test_the_stopping_form_lets_the_best_third_of_those_seen_go_on() -> None:
    assert stops([5.0, 6.0, 4.0, 7.0, 4.5, 4.2, 9.0, 4.4, 4.3]) == [
        False, True, False, True, True, False, True, True, False,
    ]  # fmt: skip
    assert stops([1.0, 1.0, 1.0]) == [False, False, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_in_the_stopping_form_a_value_that_is_not_finite_is_stopped_and_counts_for_nobody(value: float) -> None:
    values = [5.0, 6.0, 4.0, 7.0, 4.5, 4.2, 9.0, 4.4, 4.3]
    for place in range(len(values) + 1):
        decided = stops([*values[:place], value, *values[place:]])
        assert decided[place]
        assert decided[:place] + decided[place + 1 :] == stops(values)


@pytest.mark.parametrize(("asha", "sentinels"), [({}, 0), ({}, 4), (STOPPING, 0), (STOPPING, 4)])
def test_as_many_go_on_as_the_plan_expects(asha: dict[str, str], sentinels: int) -> None:
    draw = np.random.default_rng(0)
    went_on = []
    for _ in range(1000):
        arm = ladder(names(12), rungs=(1,), sentinels=draw.permutation(names(12))[:sentinels], **asha)
        for name, value in zip(names(12), draw.permutation(12), strict=True):
            arm.arrive(name, 1, float(value))
        went_on.append(sum(arm.fate(name, 1) is Fate.GO_ON for name in names(12)))
    tune = Tune(trials_per_arm=12, asha=Asha(reduction_factor=3, sentinels=sentinels, **asha))
    assert survivors(tune, (1,)) == [pytest.approx(np.mean(went_on), abs=0.6)]
