from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from tunebench.study.journal import JournalWriter, read_trials
from tunebench.study.plan import survivors
from tunebench.study.record import Reason, Stage, TrialKey
from tunebench.study.spec import Asha, Tune
from tunebench.tuning.asha import Ladder, PerArmAsha

STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE
RUNGS = (1, 3, 9)


def key(index: int, optimizer: str = "adamw", stage: Stage = Stage.TUNE) -> TrialKey:
    return TrialKey(workload="w", optimizer=optimizer, stage=stage, config_index=index, seed_index=0)


def scheduler(*keys: TrialKey, rungs: dict[str, tuple[int, ...]] | None = None) -> PerArmAsha:
    """A scheduler of two arms that lets one in three go on."""
    by_id = {trial.trial_id: trial for trial in keys}
    return PerArmAsha({"w/adamw": RUNGS, "w/soap": RUNGS} if rungs is None else rungs, 3, by_id.__getitem__)


def report(asha: PerArmAsha, trial: TrialKey, step: int, objective: float, outcome: str | None = None) -> str:
    """A result as Tune hands it to the scheduler; of a Tune trial only the configuration is read."""
    tune_trial: Any = SimpleNamespace(config={"trial": trial.trial_id})
    return asha.on_trial_result(None, tune_trial, {"step": step, "objective": objective, "outcome": outcome})


def stops(values: Iterable[float], factor: int = 3) -> list[bool]:
    """What a rung decides about objectives that arrive one after the other."""
    ladder = Ladder(factor)
    return [ladder.decide(f"t{index}", 1, value).stop for index, value in enumerate(values)]


def test_the_best_so_far_always_goes_on() -> None:
    draw = np.random.default_rng(seed=0)
    for factor in (2, 3, 4):
        values = draw.permutation(40).astype(np.float64)
        stopped = stops(values, factor)
        for index, value in enumerate(values):
            if value == values[: index + 1].min():
                assert not stopped[index]


def test_a_trial_goes_on_where_it_is_among_the_best_third_of_those_seen() -> None:
    values = [5.0, 6.0, 4.0, 7.0, 4.5, 4.2, 9.0, 4.4, 4.3]
    expected = []
    for index, value in enumerate(values):
        seen = sorted(values[: index + 1])
        expected.append(value not in seen[: max(len(seen) // 3, 1)])
    assert stops(values) == expected
    assert stops(values) == [False, True, False, True, True, False, True, True, False]


def test_a_decision_says_what_it_was_compared_with() -> None:
    ladder = Ladder(2)
    for index, value in enumerate((4.0, 2.0, 3.0)):
        ladder.decide(f"t{index}", 1, value)
    decision = ladder.decide("late", 1, 5.0)
    assert (decision.rung, decision.value, decision.cutoff, decision.recorded, decision.stop) == (1, 5.0, 3.0, 4, True)


def test_ties_with_the_cutoff_go_on() -> None:
    assert stops([1.0, 1.0, 1.0]) == [False, False, False]


def test_rungs_do_not_mix() -> None:
    ladder = Ladder(3)
    assert not ladder.decide("a", 1, 1.0).stop
    assert not ladder.decide("b", 3, 2.0).stop


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_stopped_even_where_nobody_else_was(value: float) -> None:
    ladder = Ladder(3)
    decision = ladder.decide("broken", 1, value)
    assert decision.stop
    assert decision.recorded == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_leaves_the_decisions_about_others_alone(value: float) -> None:
    values = [5.0, 6.0, 4.0, 7.0, 4.5, 4.2, 9.0, 4.4, 4.3]
    for place in range(len(values) + 1):
        decided = stops([*values[:place], value, *values[place:]])
        assert decided[place]
        assert decided[:place] + decided[place + 1 :] == stops(values)


def test_a_repeated_report_does_not_count_twice() -> None:
    ladder = Ladder(2)
    for _ in range(5):
        assert ladder.decide("a", 1, 1.0).recorded == 1
    assert ladder.decide("b", 1, 2.0).recorded == 2


def test_a_trial_that_went_on_goes_on_again_after_a_restart_whoever_has_come_since() -> None:
    asha = scheduler(*(key(index) for index in range(4)))
    assert report(asha, key(0), 3, 4.0) == CONTINUE
    assert [report(asha, key(index), 3, 4.0 - index) for index in (1, 2, 3)] == [CONTINUE] * 3
    assert report(asha, key(0), 3, 4.0) == CONTINUE
    assert report(asha, key(0), 9, 9.0) == CONTINUE


def test_arms_do_not_see_each_other() -> None:
    adamw, soap = [key(index) for index in range(3)], [key(index, "soap") for index in range(3)]
    asha = scheduler(*adamw, *soap)
    for index in range(3):
        report(asha, adamw[index], 1, 0.001 * (index + 1))
    assert report(asha, soap[0], 1, 100.0) == CONTINUE
    assert report(asha, soap[1], 1, 200.0) == STOP
    assert asha.decisions[soap[1].trial_id].cutoff == 100.0
    assert asha.decisions[soap[1].trial_id].recorded == 2


def test_nothing_is_decided_between_rungs() -> None:
    asha = scheduler(key(0), key(1))
    report(asha, key(0), 1, 1.0)
    assert [report(asha, key(1), step, 100.0) for step in (2, 4, 8, 10)] == [CONTINUE] * 4
    assert asha.decisions == {}


@pytest.mark.parametrize("outcome", [reason.value for reason in Reason])
def test_a_trial_that_ended_by_itself_is_not_stopped_and_not_counted(outcome: str) -> None:
    asha = scheduler(key(0), key(1), key(2))
    report(asha, key(0), 3, 1.0)
    assert report(asha, key(1), 3, math.nan, outcome) == CONTINUE
    assert report(asha, key(1), 3, 0.0, outcome) == CONTINUE
    report(asha, key(2), 3, 2.0)
    assert asha.decisions[key(2).trial_id].recorded == 2


def test_the_confirm_stage_is_never_stopped() -> None:
    trials = [key(index, stage=Stage.CONFIRM) for index in range(9)]
    asha = scheduler(*trials, rungs={})
    for step in range(1, 12):
        assert {report(asha, trial, step, float(index)) for index, trial in enumerate(trials)} == {CONTINUE}


def test_stopped_trials_keep_their_decision_for_the_journal() -> None:
    asha = scheduler(key(0), key(1))
    report(asha, key(0), 1, 1.0)
    report(asha, key(1), 1, 2.0)
    assert list(asha.decisions) == [key(1).trial_id]


def test_the_debug_string_counts_trials_by_arm_and_rung() -> None:
    asha = scheduler(key(0), key(1))
    report(asha, key(0), 1, 1.0)
    report(asha, key(1), 1, 2.0)
    report(asha, key(0), 3, 1.0)
    assert asha.debug_string() == "w/adamw: 1 (2), 3 (1); w/soap: "


class Study:
    """Trials that report to the scheduler and the journal in a fixed order, interrupted where asked."""

    def __init__(self, run: Path, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.run = run
        self.keys = [key(index, optimizer) for index in range(8) for optimizer in ("adamw", "soap")]
        steps = [(trial, step) for step in RUNGS for trial in self.keys]
        self.reports = [(trial, step, float(draw.random())) for trial, step in steps]
        self.reports[4] = (*self.reports[4][:2], math.nan)

    def decisions(self, restart_before: int | None) -> dict[str, Any]:
        journal, asha = self._start()
        stopped: dict[str, Any] = {}
        for index, (trial, step, objective) in enumerate(self.reports):
            if index == restart_before:
                journal, asha = self._start()
                self._repeat_last_reports(asha, index, stopped)
            if trial.trial_id not in stopped:
                self._one(journal, asha, (trial, step, objective), stopped)
        return stopped

    def _start(self) -> tuple[JournalWriter, PerArmAsha]:
        journal, asha = JournalWriter(self.run), scheduler(*self.keys)
        for arm in ("w/adamw", "w/soap"):
            journal.add_arm(arm, {})
        for trial in self.keys:
            journal.plan(trial, {}, {}, {})
        asha.rebuild(read_trials(self.run))
        return journal, asha

    def _one(self, journal: JournalWriter, asha: PerArmAsha, result: tuple, stopped: dict[str, Any]) -> None:
        trial, step, objective = result
        journal.start(trial)
        decided = report(asha, trial, step, objective)
        if math.isfinite(objective):
            journal.record_rung(trial, step, objective)
        if decided == STOP:
            stopped[trial.trial_id] = asha.decisions[trial.trial_id]
            journal.finish(trial, Reason.STOPPED_ASHA, value=None, detail={}, ledger={}, result={})

    def _repeat_last_reports(self, asha: PerArmAsha, until: int, stopped: dict[str, Any]) -> None:
        """Resumed trials report the rung of their checkpoint again before they go on."""
        last = {trial.trial_id: (trial, step, value) for trial, step, value in self.reports[:until]}
        for trial, step, value in reversed(last.values()):
            if trial.trial_id not in stopped:
                assert report(asha, trial, step, value) == CONTINUE


def test_a_resumed_study_decides_as_an_uninterrupted_one(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = Study(tmp_path / "whole", seed=1).decisions(restart_before=None)
    assert 8 < len(whole) < 16
    for restart in (1, 5, 11, 20, 37):
        run = tmp_path / str(restart)
        run.mkdir()
        assert repr(Study(run, seed=1).decisions(restart)) == repr(whole)  # by text, for NaN equals nothing


def test_a_driver_killed_while_it_closed_a_stopped_trial_judges_it_again(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm("w/adamw", {})
    for index, objective in enumerate((1.0, 2.0)):
        journal.plan(key(index), {}, {}, {})
        journal.start(key(index))
        journal.record_rung(key(index), 3, objective)
    path = tmp_path / "journal.log"
    detail = {"rung": 3, "cutoff": 1.0, "value": 2.0, "recorded": 2}
    journal.finish(key(1), Reason.STOPPED_ASHA, value=2.0, detail=detail, ledger={}, result={})
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))

    asha = scheduler(key(0), key(1))
    asha.rebuild(read_trials(tmp_path))
    assert report(asha, key(1), 3, 2.0) == STOP
    assert asha.decisions[key(1).trial_id].recorded == 2


def test_as_many_go_on_as_the_plan_expects_of_random_arrival() -> None:
    generator = np.random.default_rng(0)
    went_on = []
    for _ in range(2000):
        ladder = Ladder(3)
        values = generator.permutation(9)
        went_on.append(sum(not ladder.decide(str(i), 1, float(value)).stop for i, value in enumerate(values)))
    expected = sum(max(seen // 3, 1) / seen for seen in range(1, 10))
    assert np.mean(went_on) == pytest.approx(expected, abs=0.1)
    assert survivors(Tune(trials_per_arm=9, asha=Asha(reduction_factor=3)), (1,)) == [round(expected)]
