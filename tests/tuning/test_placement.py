from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunebench.tuning.placement import Admit, Open, Placement


def opened(slots: int, *workloads: str) -> Placement:
    """A placement with one cohort for each workload."""
    placement = Placement()
    placement.plan([(f"first-{number}", name) for number, name in enumerate(workloads)])
    for number, name in enumerate(workloads):
        placement.add(number)
        placement.wait(f"first-{number}", name)
        assert placement.moves() == [Open(cohort=number, workload=name)]
        placement.ready(number, slots)
        assert placement.moves() == [Admit(trial=f"first-{number}", cohort=number)]
    for number in range(len(workloads)):
        placement.leave(f"first-{number}")
    return placement


def test_trials_spread_over_the_cohorts_of_their_workload() -> None:
    placement = opened(2, "a", "b")
    placement.add(2)
    for trial in "123":
        placement.wait(trial, "a")
    first = placement.moves()
    assert first == [Admit(trial="1", cohort=0), Admit(trial="2", cohort=0), Open(cohort=2, workload="a")]
    placement.ready(2, 2)
    assert placement.moves() == [Admit(trial="3", cohort=2)]
    placement.wait("4", "a")
    placement.leave("1")
    placement.leave("2")
    assert placement.moves() == [Admit(trial="4", cohort=0)]


def test_a_full_cohort_takes_the_next_trial_when_one_leaves() -> None:
    placement = opened(1, "a")
    placement.wait("1", "a")
    placement.wait("2", "a")
    assert placement.moves() == [Admit(trial="1", cohort=0)]
    assert placement.moves() == []
    placement.leave("1")
    assert placement.moves() == [Admit(trial="2", cohort=0)]


def test_another_workload_gets_a_device_only_when_its_cohort_is_empty() -> None:
    placement = opened(2, "a")
    placement.plan([("1", "a"), ("2", "b")])
    placement.wait("1", "a")
    assert placement.moves() == [Admit(trial="1", cohort=0)]
    placement.wait("2", "b")
    assert placement.moves() == []
    placement.leave("1")
    assert placement.moves() == [Open(cohort=0, workload="b")]


def test_an_empty_device_goes_to_the_workload_with_the_most_waiting_trials_for_each_device_it_has() -> None:
    placement = Placement()
    placement.plan([(f"{name}{index}", name) for name in "ab" for index in range(6)])
    for trial in ("a1", "a2", "a3", "b1", "b2"):
        placement.wait(trial, trial[0])
    for number, expected in enumerate("aba"):  # 3 against 2, 3/2 against 2, 3/2 against 1
        placement.add(number)
        assert placement.moves() == [Open(cohort=number, workload=expected)]


def test_no_more_devices_are_opened_than_trials_wait() -> None:
    placement = Placement()
    placement.plan([("1", "a")])
    placement.wait("1", "a")
    placement.add(0)
    placement.add(1)
    assert placement.moves() == [Open(cohort=0, workload="a")]


def test_trials_of_a_lost_cohort_are_named_and_can_wait_again() -> None:
    placement = opened(2, "a")
    placement.wait("1", "a")
    placement.moves()
    assert placement.remove(0) == {"1"}
    placement.wait("1", "a")
    placement.add(1)
    assert placement.moves() == [Open(cohort=1, workload="a")]


def test_trials_that_have_not_come_yet_are_counted_until_they_are_in() -> None:
    placement = Placement()
    placement.plan([("1", "a"), ("2", "a"), ("3", "b")])
    assert (placement.company("a"), placement.coming()) == (2, 3)
    placement.add(0)
    placement.wait("1", "a")
    assert placement.company("a") == 2
    placement.moves()
    placement.ready(0, 4)
    placement.moves()
    assert (placement.company("a"), placement.coming()) == (1, 2)


def test_a_trial_that_is_to_be_alone_waits_for_an_empty_cohort_and_keeps_it_to_itself() -> None:
    placement = opened(4, "a")
    placement.wait("1", "a")
    placement.wait("2", "a", alone=True)
    assert placement.moves() == [Admit(trial="1", cohort=0)]
    assert (placement.company("a"), placement.coming()) == (0, 1)
    placement.leave("1")
    placement.wait("3", "a")
    assert placement.moves() == [Admit(trial="2", cohort=0)]
    placement.leave("2")
    assert placement.moves() == [Admit(trial="3", cohort=0)]


def test_trials_that_are_bound_to_a_kind_of_device_go_to_no_other() -> None:
    placement = Placement()
    placement.plan([("1", "a"), ("2", "a"), ("3", "b")])
    placement.add(0, "A100")
    placement.add(1, "H200")
    placement.bind({"a": "H200"})
    for trial in "12":
        placement.wait(trial, "a")
    assert placement.moves() == [Open(cohort=1, workload="a")]
    placement.ready(1, 1)
    assert placement.moves() == [Admit(trial="1", cohort=1)]
    placement.wait("3", "b")
    assert placement.moves() == [Open(cohort=0, workload="b")]
    placement.ready(0, 4)
    assert placement.moves() == [Admit(trial="3", cohort=0)]
    placement.remove(1)
    assert placement.moves() == [], "it would rather wait"
    placement.bind({})
    placement.leave("3")
    assert placement.moves() == [Open(cohort=0, workload="a")]


def test_a_cohort_that_is_to_go_lets_nobody_in() -> None:
    placement = opened(2, "a")
    placement.wait("1", "a")
    assert placement.moves() == [Admit(trial="1", cohort=0)]
    placement.retire(0)
    placement.wait("2", "a")
    assert placement.moves() == []
    placement.add(1)
    assert placement.moves() == [Open(cohort=1, workload="a")]
    assert placement.remove(0) == {"1"}


@given(st.lists(st.tuples(st.sampled_from(["come", "leave", "add", "lose"]), st.integers(0, 9)), max_size=60))
@pytest.mark.filterwarnings("ignore")
def test_no_history_overfills_a_cohort_or_mixes_workloads_or_loses_a_trial(history: list[tuple[str, int]]) -> None:
    placement, there, opening = Placement(), set[str](), set[int]()
    placement.plan([(f"{number}", "ab"[number % 2]) for number in range(10)])
    cohorts: dict[int, str] = {}
    places: dict[str, int] = {}
    for event, number in history:
        trial = str(number)
        if event == "come" and trial not in there:
            there.add(trial)
            placement.wait(trial, "ab"[number % 2])
        elif event == "leave":
            there.discard(trial)
            places.pop(trial, None)
            placement.leave(trial)
        elif event == "add" and number not in opening | cohorts.keys() and number < 3:
            placement.add(number)
        elif event == "lose":
            assert placement.remove(number) == {t for t, place in places.items() if place == number}
            lost = [t for t, place in places.items() if place == number]
            for gone in lost:
                del places[gone]
                placement.wait(gone, "ab"[int(gone) % 2])
            cohorts.pop(number, None)
        for move in placement.moves():
            if isinstance(move, Open):
                assert move.cohort not in places.values()
                cohorts[move.cohort] = move.workload
                placement.ready(move.cohort, 2)
            else:
                assert cohorts[move.cohort] == "ab"[int(move.trial) % 2]
                places[move.trial] = move.cohort
        assert there == places.keys() | set(placement.waiting())
        assert all(list(places.values()).count(cohort) <= 2 for cohort in cohorts)
