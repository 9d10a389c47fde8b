from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest

from tunebench.study.arm_history import ArmState, arm_history, rung_survivors, standings
from tunebench.study.journal import JournalWriter, read_passages, read_trials
from tunebench.study.record import JOURNAL, Reason, Stage, TrialKey, TrialRecord
from tunebench.study.spec import Fidelity


def key(index: int, optimizer: str = "muon", stage: Stage = Stage.TUNE, seed: int = 0) -> TrialKey:
    return TrialKey(workload="ethanol", optimizer=optimizer, stage=stage, config_index=index, seed_index=seed)


def end(journal: JournalWriter, trial: TrialKey, reason: Reason, value: float | None, steps: int) -> None:
    ledger = {"steps": steps, "wall_s": 2.0 * steps, "device_s": 1.0 * steps, "attempts": 1}
    journal.finish(trial, reason, value=value, detail={}, ledger=ledger, result={})


def decide(journal: JournalWriter, trial: TrialKey, rung: int, *, goes_on: bool, sentinel: bool = False) -> None:
    said = {"trial": trial.trial_id, "rung": rung, "value": 1.0, "cutoff": 1.0, "competitors": 3}
    journal.decide(trial, {**said, "goes_on": goes_on, "sentinel": sentinel})


@pytest.fixture
def journal(tmp_path: Path) -> JournalWriter:
    """Two arms of four and one trials, planned."""
    writer = JournalWriter(tmp_path)
    for optimizer in ("muon", "adamw"):
        writer.add_arm(f"ethanol/{optimizer}", {})
    for index in range(4):
        writer.plan(key(index), {}, {}, {})
    writer.plan(key(0, "adamw"), {}, {}, {})
    return writer


def of_arm(run: Path, arm: str = "ethanol/muon") -> dict[str, TrialRecord]:
    return {trial.key.trial_id: trial for trial in read_trials(run) if trial.key.arm == arm}


def state(steps: int, ended: int, device_s: float, best: float) -> ArmState:
    return ArmState(steps_spent=steps, trials_ended=ended, device_s=device_s, best_objective=best)


def test_an_arm_is_followed_through_rungs_and_ends_in_the_order_of_the_journal(
    tmp_path: Path, journal: JournalWriter
) -> None:
    journal.record_rung(key(2), 10, 0.5)
    journal.record_rung(key(0, "adamw"), 10, 0.01)  # another arm's
    journal.record_rung(key(0), 10, 0.7)
    end(journal, key(1), Reason.DIVERGED, None, steps=4)
    end(journal, key(0), Reason.STOPPED_ASHA, 0.7, steps=10)
    end(journal, key(2), Reason.FINISHED, 0.2, steps=40)
    assert arm_history(of_arm(tmp_path), read_passages(tmp_path)) == [
        state(0, 0, 0.0, math.inf),
        state(10, 0, 0.0, 0.5),
        state(20, 0, 0.0, 0.5),
        state(24, 1, 4.0, 0.5),
        state(24, 2, 14.0, 0.5),
        state(54, 3, 54.0, 0.2),
    ]


def test_a_rung_that_a_resumed_trial_reaches_again_is_not_spent_twice(tmp_path: Path, journal: JournalWriter) -> None:
    journal.record_rung(key(0), 10, 0.5)
    journal.record_rung(key(0), 20, 0.4)
    journal.record_rung(key(0), 10, 0.3)
    assert arm_history(of_arm(tmp_path), read_passages(tmp_path))[-1] == state(20, 0, 0.0, 0.3)


def test_a_rung_that_ends_a_schedule_of_its_own_costs_all_its_steps(tmp_path: Path, journal: JournalWriter) -> None:
    journal.record_rung(key(0), 10, 0.5)
    journal.record_rung(key(0), 20, 0.4)
    end(journal, key(0), Reason.FINISHED, 0.3, steps=70)
    history = arm_history(of_arm(tmp_path), read_passages(tmp_path), Fidelity.RESCALE)
    assert [each.steps_spent for each in history] == [0, 10, 30, 70]


def test_the_confirm_stage_is_no_part_of_the_search(tmp_path: Path, journal: JournalWriter) -> None:
    confirm = key(0, stage=Stage.CONFIRM)
    journal.plan(confirm, {}, {}, {})
    end(journal, confirm, Reason.FINISHED, 0.1, steps=40)
    assert arm_history(of_arm(tmp_path), read_passages(tmp_path)) == [state(0, 0, 0.0, math.inf)]
    assert rung_survivors(of_arm(tmp_path).values(), (10,), 40) == {0: 4, 40: 0}


def test_survivors_are_those_let_on_and_sentinels(tmp_path: Path, journal: JournalWriter) -> None:
    for index in range(4):
        decide(journal, key(index), 10, goes_on=index == 0, sentinel=index == 3)
    end(journal, key(3), Reason.FINISHED, 0.5, steps=40)
    assert rung_survivors(of_arm(tmp_path).values(), (10, 20), 40) == {0: 4, 10: 2, 40: 1}


def test_a_sentinel_that_a_rung_would_have_stopped_still_counts_at_later_ones(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm("ethanol/muon", {})
    for index in range(4):
        journal.plan(key(index), {}, {}, {}, sentinel=index == 3)
        decide(journal, key(index), 10, goes_on=index < 2, sentinel=index == 3)
    decide(journal, key(0), 20, goes_on=True)
    decide(journal, key(1), 20, goes_on=False)
    survivors = partial(rung_survivors, rungs=(10, 20), horizon=40)
    assert survivors(of_arm(tmp_path).values()) == {0: 4, 10: 3, 20: 1, 40: 0}, "it has not come so far"
    journal.record_rung(key(3), 20, 0.9)
    assert survivors(of_arm(tmp_path).values()) == {0: 4, 10: 3, 20: 2, 40: 0}


def test_arms_stand_by_their_confirmed_seeds_before_they_stand_by_their_search(
    tmp_path: Path, journal: JournalWriter
) -> None:
    end(journal, key(0), Reason.FINISHED, 0.1, steps=40)
    journal.record_rung(key(0, "adamw"), 10, 0.3)
    assert [(s.optimizer, s.objective) for s in standings(read_trials(tmp_path), "ethanol")] == [
        ("muon", 0.1),
        ("adamw", 0.3),
    ]
    for config, values in ((0, (0.5, 0.7)), (1, (0.4, None))):
        for seed, value in enumerate(values):
            trial = key(config, stage=Stage.CONFIRM, seed=seed)
            journal.plan(trial, {}, {}, {})
            end(journal, trial, Reason.FINISHED if value else Reason.DIVERGED, value, steps=40)
    first, second = standings(read_trials(tmp_path), "ethanol")
    assert (first.optimizer, second.optimizer) == ("adamw", "muon")
    assert (second.confirmed, second.failed, second.found) == ((0.5, 0.7), 0, 0.1)  # config 1 lost a seed


def test_passages_of_a_torn_journal_end_before_the_tear(tmp_path: Path, journal: JournalWriter) -> None:
    journal.record_rung(key(0), 10, 0.5)
    journal.record_rung(key(1), 10, 0.5)
    content = (tmp_path / JOURNAL).read_bytes()
    (tmp_path / JOURNAL).write_bytes(content[:-3])
    assert read_passages(tmp_path) == [(key(0).trial_id, 10)]
