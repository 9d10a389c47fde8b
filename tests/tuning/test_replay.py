from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tuning.conftest import STUDY, write_study
from tunebench.cli import run_command
from tunebench.engine.curves import write_curve
from tunebench.study.errors import RunError
from tunebench.study.false_stops import clopper_pearson, false_stops
from tunebench.study.journal import JournalWriter
from tunebench.study.plan import rung_steps
from tunebench.study.record import Reason, Stage, TrialKey, TrialRecord
from tunebench.study.resolve import resolve
from tunebench.study.sentinels import sentinel_configurations
from tunebench.study.spec import Asha, Confirm, Tune
from tunebench.tuning.ladder import Fate, Ladder
from tunebench.tuning.replay import Curve, replay, replay_run
from tunebench.tuning.run_folder import held_run

HORIZON = 400
LEDGER = {"steps": 12, "wall_s": 2.0, "device_s": 1.0, "attempts": 1}


def learning_curves(draw: np.random.Generator, count: int, *, slow: bool = False) -> dict[str, Curve]:
    """Power laws that fall to a floor of their own, and cross; 2 % noise at every evaluation but the last.

    A slow starter begins higher and falls faster to a lower floor, as averaging and matrix preconditioners do.
    """
    floor = draw.lognormal(math.log(0.07 if slow else 0.1), 0.35, count)
    height = draw.lognormal(math.log(0.5 if slow else 0.1), 0.4, count)
    power = draw.uniform(1.0, 1.5, count) if slow else draw.uniform(0.4, 0.9, count)
    curves = {}
    for index in range(count):
        name = f"{'slow' if slow else 'fast'}{index:02d}"
        steps = np.arange(20, HORIZON + 1, 20)
        values = floor[index] + height[index] * (steps / 20.0) ** -power[index]
        noisy = values * (1.0 + 0.02 * draw.standard_normal(len(steps)))
        noisy[-1] = values[-1]  # which trial is best is not left to chance
        curves[name] = dict(zip(steps.tolist(), noisy.tolist(), strict=True))
    return curves


def best(curves: dict[str, Curve]) -> str:
    return min(curves, key=lambda name: curves[name][HORIZON])


def survivors(curves: dict[str, Curve], asha: Asha, root: int) -> set[str]:
    """Trials of one arm that reach the horizon, sentinels included, in a study that confirms three."""
    rungs, names = rung_steps(asha, HORIZON), list(curves)
    sentinels = {names[index] for index in sentinel_configurations(asha, len(names), root, "w")}
    ladder, left = Ladder(asha, rungs, names, sentinels, fewest=Confirm().top_k), set(names)
    for rung in rungs:
        for name in left:
            ladder.arrive(name, rung, curves[name][rung])
        left = {name for name in left if ladder.fate(name, rung) is Fate.GO_ON}
    return left


def test_with_default_settings_the_best_configuration_survives_in_95_of_100_simulated_studies() -> None:
    draw, tune = np.random.default_rng(0), Tune()
    assert tune.asha is not None
    kept = {"fast": 0, "slow": 0}
    for study in range(1000):
        for arm in kept:
            curves = learning_curves(draw, tune.trials_per_arm, slow=arm == "slow")
            kept[arm] += best(curves) in survivors(curves, tune.asha, study)
    assert min(kept.values()) >= 950, kept


def test_with_an_early_rung_one_ladder_for_all_arms_loses_the_slow_starter_far_more_often_than_one_each() -> None:
    draw, asha = np.random.default_rng(1), Asha(sentinels=0, grace_steps=40)
    pooled = apart = slow_is_best = 0
    for study in range(200):
        slow, fast = learning_curves(draw, 16, slow=True), learning_curves(draw, 16)
        winner = best({**slow, **fast})
        if winner not in slow:
            continue
        slow_is_best += 1
        pooled += winner in survivors({**slow, **fast}, asha, study)
        apart += winner in survivors(slow, asha, study)
    assert slow_is_best > 100
    assert apart > 2 * pooled


def test_a_deterministic_replay_knows_one_outcome_and_an_asynchronous_one_several() -> None:
    curves = learning_curves(np.random.default_rng(2), 12)
    rungs = (100, 300)
    outcomes = {
        order: {replay(curves, Asha(order=order), rungs, np.random.default_rng(seed)).survivors for seed in range(20)}
        for order in ("deterministic", "asynchronous")
    }
    assert len(outcomes["deterministic"]) == 1
    assert len(outcomes["asynchronous"]) > 1


def test_replayed_steps_are_those_counted_by_hand() -> None:
    curves = {f"t{index}": {100: float(index), 300: float(index), 400: float(index)} for index in range(9)}
    found = replay(curves, Asha(reduction_factor=3), (100, 300), np.random.default_rng(0))
    assert found.survivors == {"t0"}
    assert found.steps == 6 * 100 + 2 * 300 + 400


@pytest.mark.parametrize(("count", "of", "high"), [(0, 8, 0.369), (0, 16, 0.206), (8, 8, 1.0), (0, 0, 1.0)])
def test_the_interval_is_that_of_clopper_and_pearson(count: int, of: int, high: float) -> None:
    assert clopper_pearson(count, of)[1] == pytest.approx(high, abs=1e-3)


def record(index: int, value: float | None, goes_on: bool, **changes: Any) -> TrialRecord:
    key = TrialKey(workload="w", optimizer="o", stage=Stage.TUNE, config_index=index, seed_index=0)
    decision = {"rung": 1, "value": 1.0, "cutoff": 1.0, "competitors": 4, "goes_on": goes_on, "sentinel": True}
    content: dict[str, Any] = {
        "number": index, "state": "COMPLETE", "reason": Reason.FINISHED, "detail": {}, "params": {}, "rungs": {},
        "seeds": {}, "ledger": {}, "decisions": [decision],
    }  # fmt: skip
    return TrialRecord(key=key, value=value, **{**content, **changes})


def test_a_false_stop_is_a_sentinel_that_ends_better_than_all_who_were_let_on() -> None:
    records = [
        record(0, 0.5, True),
        record(1, 0.4, False, sentinel=True),
        record(2, 0.6, False, sentinel=True),
        record(3, 0.7, True, sentinel=True),
        record(4, None, False, reason=Reason.STOPPED_ASHA),
    ]
    (found,) = false_stops(records)
    assert (found.sentinels, found.would_stop, found.wrongly, found.rate) == (3, 2, 1, pytest.approx(1 / 3))
    assert found.low < 1 / 3 < found.high


def begun(folder: Path, sentinels: int = 1) -> tuple[Path, JournalWriter]:
    """The run directory of the small study, and its journal with two arms and no trials."""
    asha = {**STUDY["tune"]["asha"], "sentinels": sentinels}
    resolved = resolve(write_study(folder, tune={"trials_per_arm": 6, "asha": asha}))
    with held_run(resolved, folder / "run"):
        journal = JournalWriter(folder / "run")
    for optimizer in ("adamw", "soap"):
        journal.add_arm(f"ethanol/{optimizer}", {})
    return folder / "run", journal


def searched(optimizer: str, index: int) -> TrialKey:
    return TrialKey(workload="ethanol", optimizer=optimizer, stage=Stage.TUNE, config_index=index, seed_index=0)


def train(run: Path, journal: JournalWriter, optimizer: str, draw: np.random.Generator, *, sentinels: bool) -> None:
    """Six trials of an arm that reach the horizon, with errors drawn at random."""
    for index in range(6):
        key = searched(optimizer, index)
        journal.plan(key, {}, {}, {}, sentinel=sentinels)
        values = {step: float(value) for step, value in zip((3, 6, 12), draw.random(3), strict=True)}
        rows = [(key.trial_id, s, 0.0, 0.0, "val", "objective", "raw", v) for s, v in values.items()]
        write_curve(run, key.trial_id, rows)
        for step in (3, 6):
            journal.record_rung(key, step, values[step])
        journal.finish(key, Reason.FINISHED, value=values[12], detail={}, ledger=LEDGER, result={})


class TestRecordedRun:
    """Replays of a run whose trials all reached the horizon."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        run, journal = begun(tmp_path)
        draw = np.random.default_rng(0)
        for optimizer in ("adamw", "soap"):
            train(run, journal, optimizer, draw, sentinels=True)
        return run

    def test_the_command_prints_what_would_have_been_lost(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command(["replay", str(run), "--arrivals", "50", "--order", "asynchronous", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["asha"]["order"] == "asynchronous"
        for arm in found["arms"]:
            assert (arm["trials"], arm["rungs"]) == (6, [3, 6])
            assert 0.0 <= arm["best_lost"] <= 1.0
            assert arm["best_objective"] <= arm["best_left_objective"]
            assert 0.0 < arm["steps_saved"] < 1.0
        assert [row["sentinels"] for row in found["sentinels"]] == [6, 6]
        assert run_command(["replay", str(run), "--arrivals", "5"]) == 0
        assert "false stops" in capsys.readouterr().out

    def test_another_first_rung_needs_curves_measured_there(
        self, run: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert run_command(["replay", str(run), "--grace-steps", "5"]) == 2
        assert "found no arm" in capsys.readouterr().err

    def test_contradicting_settings_are_bad_input(self, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run_command(["replay", str(run), "--form", "stopping", "--order", "deterministic"]) == 2
        assert "allowed: asynchronous" in capsys.readouterr().err


def test_a_run_without_sentinels_that_stopped_trials_cannot_be_replayed(tmp_path: Path) -> None:
    run, journal = begun(tmp_path, sentinels=0)
    train(run, journal, "adamw", np.random.default_rng(0), sentinels=False)
    assert replay_run(run, {}, arrivals=10, seed=0)["arms"]
    journal.plan(searched("adamw", 6), {}, {}, {})
    journal.finish(searched("adamw", 6), Reason.STOPPED_ASHA, value=1.0, detail={}, ledger=LEDGER, result={})
    with pytest.raises(RunError, match=r"allowed: a run with tune\.asha\.sentinels"):
        replay_run(run, {}, arrivals=10, seed=0)
