from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from tunebench.study.journal import JournalWriter, read_trials
from tunebench.study.record import Reason, Stage, TrialKey, TrialRecord
from tunebench.study.spec import Asha, AshaForm, AshaOrder
from tunebench.tuning.asha import PerArmAsha, arm_ladders

PAUSE, CONTINUE, STOP = TrialScheduler.PAUSE, TrialScheduler.CONTINUE, TrialScheduler.STOP
RUNGS = (1, 3, 9)
ARMS = {"w/adamw": RUNGS, "w/soap": RUNGS}


def key(index: int, optimizer: str = "adamw", stage: Stage = Stage.TUNE) -> TrialKey:
    return TrialKey(workload="w", optimizer=optimizer, stage=stage, config_index=index, seed_index=0)


def record(trial: TrialKey, **changes: Any) -> TrialRecord:
    content: dict[str, Any] = {
        "number": 0, "state": "WAITING", "reason": None, "detail": {}, "value": None, "params": {}, "rungs": {},
        "seeds": {}, "ledger": {},
    }  # fmt: skip
    return TrialRecord(key=trial, **{**content, **changes})


class Tune:
    """Tune's controller as far as the scheduler knows it: trials with a status, and what was stopped."""

    def __init__(
        self,
        keys: list[TrialKey],
        records: list[TrialRecord] | None = None,
        asha: Asha | None = None,
        room: int | None = None,
        rungs: Mapping[str, tuple[int, ...]] = ARMS,
    ) -> None:
        self.trials = {trial.trial_id: self._trial(trial) for trial in keys}
        self.stopped: list[str] = []
        self.room = room
        by_id = {trial.trial_id: trial for trial in keys}
        ladders = arm_ladders(
            asha or Asha(reduction_factor=3, sentinels=0), rungs, records or [record(k) for k in keys]
        )
        self.asha = PerArmAsha(ladders, by_id.__getitem__, self._first_with_room)
        for trial in self.trials.values():
            self.asha.on_trial_add(self, trial)

    def _trial(self, trial: TrialKey) -> Any:
        return SimpleNamespace(config={"trial": trial.trial_id}, status=Trial.RUNNING)

    def _first_with_room(self, trials: Sequence[str], active: Collection[str]) -> str | None:
        return trials[0] if self.room is None or len(active) < self.room else None

    def get_live_trials(self) -> list[Any]:
        return [trial for trial in self.trials.values() if trial.status != Trial.TERMINATED]

    def stop_trial(self, trial: Any) -> None:
        self.asha.on_trial_remove(self, trial)
        trial.status = Trial.TERMINATED
        self.stopped.append(trial.config["trial"])

    def report(self, trial: TrialKey, step: int, objective: float, outcome: str | None = None) -> str:
        """A result as Tune hands it to the scheduler, and what Tune makes of the answer."""
        tune_trial = self.trials[trial.trial_id]
        decided = self.asha.on_trial_result(
            self, tune_trial, {"step": step, "objective": objective, "outcome": outcome, "at_rung": step in RUNGS}
        )
        if decided == PAUSE:
            tune_trial.status = Trial.PAUSED
        if decided == STOP or outcome is not None:
            tune_trial.status = Trial.TERMINATED
            self.asha.on_trial_complete(self, tune_trial, {})
        return decided

    def choose(self) -> str | None:
        """The trial that Tune would start now; it is started."""
        chosen = self.asha.choose_trial_to_run(self)
        if chosen is None:
            return None
        chosen.status = Trial.RUNNING
        return str(chosen.config["trial"])


def test_trials_wait_at_their_rung_and_the_best_third_is_started_again() -> None:
    keys = [key(index) for index in range(6)]
    tune = Tune(keys)
    assert [tune.report(trial, 1, 6.0 - index) for index, trial in enumerate(keys[:5])] == [PAUSE] * 5
    assert tune.choose() is None
    assert tune.report(keys[5], 1, 1.0) == CONTINUE
    assert [tune.choose(), tune.choose()] == [keys[4].trial_id, None]
    assert sorted(tune.stopped) == sorted(trial.trial_id for trial in keys[:4])
    assert not tune.asha.waiting


def test_the_last_to_come_is_stopped_at_once_where_it_is_not_among_the_best() -> None:
    tune = Tune([key(0), key(1)])
    assert tune.report(key(0), 1, 1.0) == PAUSE
    assert tune.report(key(1), 1, 2.0) == STOP
    assert tune.asha.decision(key(1).trial_id).cutoff == 1.0


def test_arms_do_not_see_each_other_and_none_waits_for_another() -> None:
    adamw, soap = [key(index) for index in range(3)], [key(index, "soap") for index in range(3)]
    tune = Tune([*adamw, *soap])
    for index in range(3):
        tune.report(adamw[index], 1, 0.001 * (index + 1))
    assert [tune.report(trial, 1, 100.0 + index) for index, trial in enumerate(soap[:2])] == [PAUSE, PAUSE]
    assert tune.choose() == adamw[0].trial_id
    assert tune.report(soap[2], 1, 300.0) == STOP
    assert tune.choose() == soap[0].trial_id


def test_a_promoted_trial_comes_before_a_new_one_and_waits_for_room() -> None:
    keys = [key(index) for index in range(3)]
    tune = Tune([*keys, key(0, "soap")], room=1)
    tune.trials[key(0, "soap").trial_id].status = Trial.PENDING
    for index, trial in enumerate(keys):
        tune.report(trial, 1, float(index))
    assert tune.choose() == key(0, "soap").trial_id
    assert tune.choose() is None
    tune.report(key(0, "soap"), 2, 1.0, "DIVERGED")
    assert tune.choose() == keys[0].trial_id


def test_a_trial_that_is_still_being_paused_when_its_rung_is_decided_is_started_once_it_is_paused() -> None:
    tune = Tune([key(0), key(1)])
    tune.report(key(0), 1, 1.0)
    tune.trials[key(0).trial_id].status = Trial.RUNNING
    tune.report(key(1), 1, 2.0)
    assert tune.choose() is None
    tune.trials[key(0).trial_id].status = Trial.PAUSED
    assert tune.choose() == key(0).trial_id


def test_nothing_is_decided_between_rungs() -> None:
    tune = Tune([key(0), key(1)])
    assert [tune.report(key(1), step, 100.0) for step in (2, 4, 8, 10)] == [CONTINUE] * 4
    assert tune.asha.new_decisions() == []


@pytest.mark.parametrize("outcome", [reason.value for reason in Reason])
def test_a_rung_does_not_wait_for_a_trial_that_ended_by_itself(outcome: str) -> None:
    tune = Tune([key(0), key(1), key(2)])
    assert tune.report(key(0), 1, 1.0) == PAUSE
    assert tune.report(key(1), 1, math.nan, outcome) == CONTINUE
    assert tune.report(key(2), 1, 2.0) == STOP
    assert tune.choose() == key(0).trial_id


def test_a_rung_does_not_wait_for_a_trial_that_crashed_for_good() -> None:
    tune = Tune([key(0), key(1)])
    tune.report(key(0), 1, 1.0)
    tune.asha.gave_up(key(1).trial_id)
    assert tune.choose() == key(0).trial_id


def test_a_rung_waits_for_a_trial_that_failed_and_is_started_again() -> None:
    tune = Tune([key(0), key(1)])
    tune.report(key(0), 1, 1.0)
    tune.asha.on_trial_error(tune, tune.trials[key(1).trial_id])  # as Tune does before it starts a trial again
    tune.asha.on_trial_add(tune, tune.trials[key(1).trial_id])
    assert tune.choose() is None
    assert tune.report(key(1), 1, 0.5) == CONTINUE


def test_the_confirm_stage_is_never_stopped() -> None:
    trials = [key(index, stage=Stage.CONFIRM) for index in range(9)]
    tune = Tune(trials, rungs={})
    for step in range(1, 12):
        assert {tune.report(trial, step, float(index)) for index, trial in enumerate(trials)} == {CONTINUE}


def test_a_study_without_asha_stops_nobody() -> None:
    assert arm_ladders(None, ARMS, [record(key(0))]) == {}


def test_sentinels_never_wait_or_stop() -> None:
    records = [record(key(0)), record(key(1), sentinel=True)]
    tune = Tune([key(0), key(1)], records)
    assert tune.report(key(1), 1, 9.0) == CONTINUE
    assert tune.report(key(0), 1, 1.0) == CONTINUE
    shadow = {decision.trial: decision for decision in tune.asha.new_decisions()}[key(1).trial_id]
    assert (shadow.goes_on, shadow.sentinel) == (False, True)
    assert tune.report(key(1), 3, 9.0) == CONTINUE


def test_the_stopping_form_never_pauses() -> None:
    keys = [key(index) for index in range(4)]
    asha = Asha(form=AshaForm.STOPPING, order=AshaOrder.ASYNCHRONOUS, sentinels=0)
    tune = Tune(keys, asha=asha)
    answers = [tune.report(trial, 1, value) for trial, value in zip(keys, (2.0, 3.0, 1.0, 4.0), strict=True)]
    assert answers == [CONTINUE, STOP, CONTINUE, STOP]


def test_the_debug_string_counts_trials_by_arm_and_rung() -> None:
    tune = Tune([key(0), key(1)])
    tune.report(key(0), 1, 1.0)
    tune.report(key(1), 1, 2.0)
    assert tune.asha.debug_string() == "w/adamw: 1 (2); w/soap: "


class Study:
    """Trials with known curves under the scheduler and the journal, killed and resumed where asked."""

    def __init__(self, run: Path, asha: Asha) -> None:
        self.run, self.asha = run, asha
        draw = np.random.default_rng(1)
        self.keys = [key(index, optimizer) for index in range(8) for optimizer in ("adamw", "soap")]
        self.curves = {k.trial_id: dict(zip((*RUNGS, 27), draw.random(4), strict=True)) for k in self.keys}
        self.curves[self.keys[4].trial_id][1] = math.nan
        self.events = 0

    def decisions(self, kill_after: frozenset[int], seed: int = 0) -> dict[str, Any]:
        """What the journal holds at the end; the driver is killed after these events."""
        while True:
            draw = np.random.default_rng(seed)
            if self._until_killed(draw, kill_after):
                return {r.key.trial_id: (r.reason, r.rungs, repr(r.decisions)) for r in read_trials(self.run)}

    def _until_killed(self, draw: np.random.Generator, kill_after: frozenset[int]) -> bool:
        journal = JournalWriter(self.run)
        for arm in ARMS:
            journal.add_arm(arm, {})
        for k in self.keys:
            journal.plan(k, {}, {}, {}, sentinel=k.config_index == 3)
        records = read_trials(self.run)
        tune = Tune(self.keys, records, self.asha)
        step = {r.key.trial_id: max(r.rungs, default=0) for r in records}
        for r in records:
            tune.trials[r.key.trial_id].status = Trial.TERMINATED if r.reason else Trial.RUNNING
        fresh = dict.fromkeys(step, True)  # a trial's first report after a start is that of its checkpoint
        while True:
            while tune.choose():
                pass
            self._close(journal, tune, tune.stopped)
            running = [k for k in self.keys if tune.trials[k.trial_id].status == Trial.RUNNING]
            if not running:
                return True
            trial = running[int(draw.integers(len(running)))]
            name = trial.trial_id
            if not (fresh.pop(name, False) and step[name]):
                step[name] = next(s for s in (*RUNGS, 27) if s > step[name])
            self._report(journal, tune, trial, step[name])
            self.events += 1
            if self.events in kill_after:
                return False

    def _report(self, journal: JournalWriter, tune: Tune, trial: TrialKey, step: int) -> None:
        objective = self.curves[trial.trial_id][step]
        outcome = "FINISHED" if step == 27 else None
        answer = tune.report(trial, step, objective, outcome)
        if step in RUNGS and math.isfinite(objective):
            journal.record_rung(trial, step, objective)
        for decision in tune.asha.new_decisions():
            journal.decide(next(k for k in self.keys if k.trial_id == decision.trial), decision.to_plain())
        if outcome:
            journal.finish(trial, Reason.FINISHED, value=objective, detail={}, ledger={}, result={})
        elif answer == STOP:
            self._close(journal, tune, [trial.trial_id])

    def _close(self, journal: JournalWriter, tune: Tune, names: list[str]) -> None:
        for k in self.keys:
            if k.trial_id in names:
                journal.finish(k, Reason.STOPPED_ASHA, value=None, detail={}, ledger={}, result={})


def test_a_resumed_study_decides_as_an_uninterrupted_one_wherever_it_was_killed(tmp_path: Path) -> None:
    asha = Asha(reduction_factor=3, sentinels=1)
    folders = iter(range(1000))

    def study() -> Study:
        run = tmp_path / str(next(folders))
        run.mkdir()
        return Study(run, asha)

    whole = study().decisions(frozenset())
    assert sum(reason is Reason.STOPPED_ASHA for reason, _, _ in whole.values()) > 8
    draw = np.random.default_rng(0)
    for seed in range(12):
        kills = frozenset(int(event) for event in draw.integers(1, 40, size=3))
        assert study().decisions(kills, seed) == whole


def test_decisions_that_a_kill_left_out_of_the_journal_are_made_again(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm("w/adamw", {})
    for index, objective in enumerate((1.0, 2.0)):
        journal.plan(key(index), {}, {}, {})
        journal.start(key(index))
        journal.record_rung(key(index), 1, objective)
    tune = Tune([key(0), key(1)], read_trials(tmp_path))
    assert [(d.trial, d.goes_on) for d in tune.asha.new_decisions()] == [
        (key(0).trial_id, True),
        (key(1).trial_id, False),
    ]
    assert tune.asha.new_decisions() == []
    assert [tune.report(key(index), 1, 1.0 + index) for index in (1, 0)] == [STOP, CONTINUE]
