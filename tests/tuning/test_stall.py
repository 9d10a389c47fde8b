"""A step that never returns costs its process, and in the end the trial that makes it."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tests.engine.conftest import MakeTask, make_task
from tests.tuning.conftest import STUDY, python_path, tunebench, write_study
from tunebench.engine.watchdog import STALLED, why_ended
from tunebench.study.journal import read_trials
from tunebench.study.record import Reason
from tunebench.tuning.trial_log import LOGS, stall_file

__all__ = ["make_task"]

# asked by both engines after every step; the module is there once somebody looks after it
HANGS = """
import sys, time
from tunebench.engine.watchdog import Watchdog
prepare = Watchdog.prepare
def note_is_due(book):
    if book.last.step and book.task.key.trial_id.endswith("tune.c001.s0"):
        time.sleep(1e6)
    return False
def prepared(watchdog):
    sys.modules["tunebench.engine.book"].TrialBook.note_is_due = property(note_is_due)
    prepare(watchdog)
Watchdog.prepare = prepared
"""


def waited_s(message: str) -> float:
    """Seconds without a sign of life; more than the limit where 100 steps of a busy machine took longer."""
    found = re.search(rf"{STALLED} (\d+):(\d+):([\d.]+)", message)
    assert found is not None, message
    hours, minutes, seconds = map(float, found.groups())
    return 3600.0 * hours + 60.0 * minutes + seconds


def test_a_trial_that_hangs_in_a_step_times_out_and_the_others_go_on(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGS)
    study = write_study(
        tmp_path,
        engine="cohort",
        workloads=[{**STUDY["workloads"][0], "max_steps": 6}],
        optimizers=["adamw"],
        tune={"trials_per_arm": 2, "asha": None},
        confirm={"top_k": 1, "seeds": 1},
        resources={"cpus_per_trial": os.cpu_count(), "slots": 2, "max_failures": 1, "stalled_after_s": 15.0},
    )
    run = tmp_path / "run"
    tunebench("run", study, "--run", run, "--no-report", PYTHONPATH=python_path(tmp_path))
    trials = {trial.key.trial_id: trial for trial in read_trials(run)}
    hung = trials.pop("ethanol.adamw.tune.c001.s0")
    assert hung.reason is Reason.TIMED_OUT
    with_company, alone = sorted(file for file in (run / LOGS).glob("cohort-*.stalled") if file.stat().st_size)
    assert waited_s(hung.detail["message"]) >= 15.0
    assert f"its cohort is gone: {STALLED}" in hung.detail["message"]
    assert f", see {alone.name}" in hung.detail["message"]
    assert "in note_is_due" in with_company.read_text()
    assert [trial.reason for trial in trials.values()] == [Reason.FINISHED] * 2
    assert trials["ethanol.adamw.tune.c000.s0"].ledger["lost_steps"] <= 1, "it went on where it had been written"


def test_a_process_of_the_lightning_engine_that_hangs_in_a_step_is_ended(make_task: MakeTask, tmp_path: Path) -> None:
    task = replace(make_task(steps=4, evaluation_steps=(2, 4)), stalled_after_s=4.0)
    task = replace(task, key=replace(task.key, config_index=1))
    (tmp_path / "task").write_bytes(pickle.dumps(task))
    script = (
        f"{HANGS}\nfrom pathlib import Path; import pickle; from tunebench.tuning import trainable\n"
        "trainable._report = lambda evaluation, kind: None\n"
        "trainable._train_alone(pickle.loads(Path(sys.argv[1]).read_bytes()), '')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "task"], timeout=300, check=False)
    assert done.returncode == 1
    assert waited_s(why_ended(stall_file(task.run, task.key.trial_id))) >= 4.0
