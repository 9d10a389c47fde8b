"""The simulated cluster below a real driver: small enough to be checked by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scale_simulation import EVALUATIONS, STEP_S, most_at_once
from tunebench.tuning.ray_environment import TUNE_ENVIRONMENT

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scale_simulation.py"
FREE = dict.fromkeys(("call", "put", "wait", "wait_each", "stay", "report"), 0.0)
TRIALS, GPUS, SLOTS, HORIZON = 15, 2, 4, 4000
STRETCH_S = HORIZON / EVALUATIONS * STEP_S["nequip-4"]


def simulated(**options: Any) -> dict[str, Any]:
    """One driver with fifteen trials in five arms on two GPUs of four slots each."""
    given = {"gpus": GPUS, "slots": SLOTS, "trials": TRIALS, "workloads": 1, "horizon": HORIZON, "drivers": 1}
    given |= {"crashes": 0.0, "losses-per-day": 0.0, "here": json.dumps(FREE), **options}
    command = [sys.executable, SCRIPT, *[word for name, value in given.items() for word in (f"--{name}", str(value))]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **TUNE_ENVIRONMENT})
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def outcome() -> dict[str, Any]:
    return simulated()


def test_every_trial_ends_where_its_rungs_let_it(outcome: dict[str, Any]) -> None:
    assert (outcome["begun"], outcome["ended"]) == (TRIALS, TRIALS)
    # of an arm's three trials one goes on at a quarter of the horizon, where each has reported ten times
    arms, first_rung = TRIALS // 3, EVALUATIONS // 4
    assert outcome["reports"] == arms * (3 * first_rung + EVALUATIONS - first_rung)


def test_simulated_time_is_that_of_the_steps_and_the_drivers_own(outcome: dict[str, Any]) -> None:
    least = TRIALS // 3 * (3 * 10 + 30) * STRETCH_S / (GPUS * SLOTS)
    assert least < outcome["simulated_s"] < 4 * least + 60.0
    assert 0.0 < outcome["driver_s"] < outcome["simulated_s"]
    assert outcome["decision_s"][0] <= outcome["decision_s"][1]


def test_what_ray_costs_is_charged_and_trials_that_crash_or_lose_their_device_come_back() -> None:
    dear = {"call": 0.05, "put": 0.05, "wait": 0.05, "wait_each": 0.01, "stay": 0.0, "report": 0.02}
    twice = {"gpus": 2 * GPUS, "trials": 2 * TRIALS, "workloads": 2, "drivers": 2}
    outcome = simulated(**{"here": json.dumps(dear), "crashes": 0.02, "losses-per-day": 200.0, **twice})
    assert outcome["ended"] == TRIALS, "one of the two drivers is simulated"
    assert outcome["driver_s"] > 0.05 * outcome["events"]
    assert outcome["reception_s"] >= 0.02 * outcome["reports"], "what tenants cost their reception"
    assert outcome["main_s"] > 0.05 * outcome["messages"], "and what it tells the main process"
    assert TRIALS < outcome["messages"] < outcome["entries"]


def test_a_driver_keeps_up_with_as_many_trials_as_its_events_leave_it_time_for() -> None:
    # 100 trials with an event of 0.4 + 100 x 0.005 s each take 90 s, which are 90 % of 100
    assert most_at_once(0.4, 0.005, 100.0) == 100
    assert most_at_once(0.5, 0.0, 100.0) == 180
