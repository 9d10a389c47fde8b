from __future__ import annotations

import errno
import io
import math
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError
from rich.console import Console

from tunebench.engine.checkpoints import checkpoint_folder, save_checkpoint
from tunebench.engine.task import Evaluation
from tunebench.engine.work import Note, Work, write_note
from tunebench.study.errors import RunStopped
from tunebench.study.journal import JournalWriter, read_trials
from tunebench.study.record import Reason, Stage, TrialKey, TrialRecord
from tunebench.study.run_copy import RunCopy
from tunebench.study.spec import Asha
from tunebench.tuning.asha import PerArmAsha, arm_ladders
from tunebench.tuning.entries import Clerk
from tunebench.tuning.progress import Progress
from tunebench.tuning.recorder import Recorder
from tunebench.tuning.retention import retention
from tunebench.tuning.tenancy import for_tune
from tunebench.tuning.trial_log import stall_file

GROUPS = [{"rule": "adamw", "tensors": 1, "parameters": 4, "settings": {}, "share": 1.0}]
RUNG = 3
ERRORS = {"val": {"raw": {"forces_mae": 0.5}}}


def key(index: int = 0, stage: Stage = Stage.TUNE) -> TrialKey:
    return TrialKey(workload="w", optimizer="adamw", stage=stage, config_index=index, seed_index=0)


def evaluation(step: int, objective: float, **changes: Any) -> Evaluation:
    content = {
        "at_rung": step == RUNG,
        "errors": ERRORS,
        "wall_s": 2.0 * step,
        "device_s": 1.0 * step,
        "train_loss": 1.0,
        "learning_rate": 1e-2,
        "attempts": 1,
        "groups": GROUPS,
    }
    return Evaluation(step=step, objective=objective, **{**content, **changes})


class Driver:
    """Scheduler, journal and recorder of one stage, fed as Tune feeds them: the scheduler first."""

    def __init__(
        self, run: Path, keep: str = "all", trials: int = 3, stage: Stage = Stage.TUNE, form: str = "stopping"
    ) -> None:
        self.run, self.keys = run, {key(index, stage).trial_id: key(index, stage) for index in range(trials)}
        journal = JournalWriter(run)
        journal.add_arm("w/adamw", {})
        rungs = {"w/adamw": (RUNG,)} if stage is Stage.TUNE else {}
        for trial in self.keys.values():
            journal.plan(trial, {}, {}, {})
        asha = Asha(form=form, order="asynchronous", sentinels=0)
        self.scheduler = PerArmAsha(arm_ladders(asha, rungs, read_trials(run)), self.keys.__getitem__)
        self.progress = Progress(run, stage, Console(file=io.StringIO()))
        self.left: list[str] = []
        self.closed: list[TrialKey] = []
        clerk = Clerk(journal, self.progress, retention(keep), RunCopy(run, None))
        self.recorder = Recorder(
            clerk.write,
            self.scheduler,
            self.keys,
            run,
            {"w": "cohort"},
            left=lambda trial, result: self.left.append(trial),
            stopped=lambda trial, last: self.closed.append(trial),
        )
        for trial in self.keys.values():
            self.progress.planned(trial, None, None)

    def trial(self, trial: TrialKey, error: BaseException | None = None) -> Any:
        """A Tune trial as far as callbacks look at it."""
        return SimpleNamespace(config={"trial": trial.trial_id}, get_error=lambda: error)

    def start(self, trial: TrialKey) -> None:
        self.recorder.on_trial_start(0, [], self.trial(trial))

    def report(self, trial: TrialKey, result: Evaluation) -> None:
        plain = {**for_tune(result.to_plain()), "training_iteration": 1, "trial_id": "ray's own"}
        self.scheduler.on_trial_result(None, self.trial(trial), plain)
        self.recorder.on_trial_result(0, [], self.trial(trial), plain)

    def fail(self, trial: TrialKey, error: BaseException | None) -> None:
        self.recorder.on_trial_error(0, [], self.trial(trial, error))

    def record(self, trial: TrialKey) -> TrialRecord:
        return next(record for record in read_trials(self.run) if record.key == trial)


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(tmp_path)


def test_a_finished_trial_is_closed_with_objective_ledger_groups_and_errors(driver: Driver) -> None:
    driver.start(key())
    assert driver.record(key()).state == "RUNNING"
    driver.report(key(), evaluation(3, 0.5))
    driver.report(key(), evaluation(6, 0.4))
    assert driver.record(key()).reason is None
    driver.report(key(), evaluation(9, 0.25, attempts=2, outcome=Reason.FINISHED))
    record = driver.record(key())
    assert (record.state, record.reason, record.value) == ("COMPLETE", Reason.FINISHED, 0.25)
    assert record.ledger == {"steps": 9, "lost_steps": 0, "wall_s": 18.0, "device_s": 9.0, "attempts": 2}
    assert record.groups == GROUPS
    assert record.result == ERRORS
    assert record.rungs == {3: 0.5}  # and no other evaluation step


def test_a_refined_trial_is_closed_with_what_the_refinement_did_and_cost(driver: Driver) -> None:
    done = {"end": "steps", "message": "4 iterations made", "refine_steps": 25.0, "refine_device_s": 1.5}
    driver.start(key())
    driver.report(key(), evaluation(9, 0.25, outcome=Reason.FINISHED, refinement=done))
    record = driver.record(key())
    assert record.detail == {"message": "", "refinement": done}
    assert (record.ledger["refine_steps"], record.ledger["refine_device_s"]) == (25.0, 1.5)
    assert (record.ledger["steps"], record.ledger["device_s"]) == (9, 9.0)  # training alone


def test_a_stopped_trial_is_closed_with_its_rung_and_cutoff(driver: Driver) -> None:
    for index, objective in enumerate((0.5, 0.75)):
        driver.start(key(index))
        driver.report(key(index), evaluation(3, objective))
    stopped = driver.record(key(1))
    assert (stopped.state, stopped.reason, stopped.value) == ("PRUNED", Reason.STOPPED_ASHA, 0.75)
    assert stopped.detail == {"rung": 3, "cutoff": 0.5, "value": 0.75, "recorded": 2}
    assert stopped.rungs == {3: 0.75}
    assert driver.record(key(0)).reason is None


def test_a_trial_that_waits_at_its_rung_stays_open_and_gives_up_its_slot(tmp_path: Path) -> None:
    driver = Driver(tmp_path, form="promotion")
    for index, objective in enumerate((0.5, 0.75)):
        driver.start(key(index))
        driver.report(key(index), evaluation(3, objective))
    assert driver.left == [key(0).trial_id, key(1).trial_id]
    assert [driver.record(key(index)).reason for index in range(2)] == [None, None]
    driver.start(key(2))
    driver.report(key(2), evaluation(3, 0.25))
    assert driver.record(key(2)).decisions[0]["goes_on"] is True
    assert driver.record(key(0)).decisions[0]["goes_on"] is False
    assert driver.record(key(0)).reason is None  # until Tune has stopped it
    driver.recorder.on_trial_complete(0, [], driver.trial(key(0)))
    assert driver.record(key(0)).reason is Reason.STOPPED_ASHA
    assert driver.record(key(0)).detail == {"rung": 3, "cutoff": 0.25, "value": 0.5, "recorded": 3}
    driver.recorder.on_trial_complete(0, [], driver.trial(key(0)))
    assert driver.closed == [key(0)]
    assert driver.record(key(0)).ledger["steps"] == 3


def test_what_a_crash_decides_about_others_is_written(tmp_path: Path) -> None:
    driver = Driver(tmp_path, form="promotion", trials=2)
    driver.start(key(0))
    driver.report(key(0), evaluation(3, 0.5))
    driver.fail(key(1), RuntimeError("broken"))
    (decision,) = driver.record(key(0)).decisions
    assert (decision["goes_on"], decision["competitors"]) == (True, 2)


@pytest.mark.parametrize("reason", [Reason.DIVERGED, Reason.OOM, Reason.TIMED_OUT])
def test_a_trial_that_ended_badly_keeps_its_message_and_its_work(driver: Driver, reason: Reason) -> None:
    driver.start(key())
    driver.report(key(), evaluation(7, math.inf, errors={}, outcome=reason, message="what happened"))
    record = driver.record(key())
    assert (record.state, record.reason, record.value) == ("FAIL", reason, None)
    assert record.detail == {"message": "what happened"}
    assert record.ledger["steps"] == 7


@pytest.mark.parametrize("objective", [math.inf, math.nan])
def test_an_objective_that_is_not_finite_is_no_value_and_no_rung(driver: Driver, objective: float) -> None:
    driver.start(key())
    driver.report(key(), evaluation(3, objective))
    stopped = driver.record(key())
    assert (stopped.reason, stopped.value, stopped.rungs) == (Reason.STOPPED_ASHA, None, {})
    driver.start(key(1))
    driver.report(key(1), evaluation(9, objective, outcome=Reason.FINISHED))
    finished = driver.record(key(1))
    assert (finished.reason, finished.value) == (Reason.FINISHED, None)


def wrapped(error: Exception) -> RayTaskError:
    """An error as it comes back from a Ray worker."""
    return RayTaskError("train", "Traceback (most recent call last):\n  ...", error)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (wrapped(ValueError("first line\nthe last line says it")), "the last line says it"),
        (wrapped(RuntimeError()), "RuntimeError"),
        (RuntimeError("  plain \n"), "plain"),
        (KeyError(), "KeyError"),
        (None, "the trial's process died"),
    ],
)
def test_a_crash_is_closed_with_one_line(driver: Driver, error: Exception | None, message: str) -> None:
    driver.start(key())
    driver.fail(key(), error)
    record = driver.record(key())
    assert (record.state, record.reason, record.detail) == ("FAIL", Reason.CRASHED, {"message": message})
    assert record.ledger == {"steps": 0, "lost_steps": 0, "wall_s": 0.0, "device_s": 0.0, "attempts": 1}


def test_a_trial_whose_node_went_away_is_preempted(driver: Driver) -> None:
    driver.start(key())
    driver.fail(key(), RayActorError(error_msg="The actor died because its node has died. Node Id: ab"))
    assert driver.record(key()).reason is Reason.PREEMPTED
    assert driver.record(key()).state == "FAIL"


def test_a_crash_counts_what_was_done_after_the_last_report(driver: Driver) -> None:
    driver.start(key())
    driver.report(key(), evaluation(6, 0.5, horizon=9))
    done = Work(steps=8, wall_s=16.0, device_s=8.0)
    write_note(checkpoint_folder(driver.run, key().trial_id), Note(horizon=9, done=done, lost=Work()))
    driver.fail(key(), RuntimeError("broken"))
    ledger = {"steps": 6, "lost_steps": 2, "wall_s": 16.0, "device_s": 8.0, "attempts": 1}
    assert driver.record(key()).ledger == ledger


def test_a_crash_that_tune_has_not_stored_yet_is_read_from_its_own_file(driver: Driver, tmp_path: Path) -> None:
    (tmp_path / "error.txt").write_text("Failure # 1\nTraceback\nValueError: the reason\n")
    trial = driver.trial(key())
    trial.error_file = str(tmp_path / "error.txt")
    driver.start(key())
    driver.recorder.on_trial_error(0, [], trial)
    assert driver.record(key()).detail == {"message": "ValueError: the reason"}


def test_a_long_message_is_cut_and_a_crash_keeps_the_work_it_had_done(driver: Driver) -> None:
    driver.start(key())
    driver.report(key(), evaluation(6, 0.5))
    driver.fail(key(), RuntimeError("x" * 10_000))
    record = driver.record(key())
    assert record.detail["message"] == "x" * 500
    assert record.ledger == {"steps": 6, "lost_steps": 0, "wall_s": 12.0, "device_s": 6.0, "attempts": 1}


def test_a_full_disk_stops_the_run_and_leaves_the_trial_open(driver: Driver) -> None:
    driver.report(key(), evaluation(4, 0.5))
    with pytest.raises(RunStopped, match="free some space and run again"):
        driver.fail(key(), wrapped(OSError(errno.ENOSPC, "No space left on device")))
    assert driver.record(key()).reason is None


def test_an_error_after_the_end_changes_nothing(driver: Driver) -> None:
    driver.start(key())
    driver.report(key(), evaluation(9, 0.25, outcome=Reason.FINISHED))
    before = driver.record(key())
    driver.fail(key(), RuntimeError("while it was leaving"))
    assert driver.record(key()) == before


@pytest.mark.parametrize(
    ("keep", "stage", "kept"),
    [
        ("all", Stage.TUNE, True),
        ("all", Stage.CONFIRM, True),
        ("confirm", Stage.TUNE, False),
        ("confirm", Stage.CONFIRM, True),
        ("none", Stage.TUNE, False),
        ("none", Stage.CONFIRM, False),
    ],
)
def test_checkpoints_stay_as_the_study_says(tmp_path: Path, keep: str, stage: Stage, kept: bool) -> None:
    driver = Driver(tmp_path, keep, stage=stage)
    for index in (0, 1):
        save_checkpoint(checkpoint_folder(tmp_path, key(index, stage).trial_id), {"step": 9})
        driver.start(key(index, stage))
    driver.report(key(0, stage), evaluation(6, 0.5))
    assert checkpoint_folder(tmp_path, key(0, stage).trial_id).exists()  # it may have to resume
    driver.report(key(0, stage), evaluation(9, 0.5, outcome=Reason.FINISHED))
    assert checkpoint_folder(tmp_path, key(0, stage).trial_id).exists() is kept
    assert checkpoint_folder(tmp_path, key(1, stage).trial_id).exists()


def test_tune_can_pickle_the_recorder_of_an_open_journal(driver: Driver) -> None:
    driver.start(key())
    driver.report(key(), evaluation(6, 0.5))
    assert isinstance(pickle.loads(pickle.dumps(driver.recorder)), Recorder)


def test_an_evaluation_survives_the_way_through_tune() -> None:
    for original in (evaluation(3, 0.5), replace(evaluation(3, math.inf), outcome=Reason.OOM, message="m")):
        plain = {**original.to_plain(), "date": "2026", "done": True}
        assert Evaluation.from_plain(plain) == original


def test_a_trial_whose_own_process_was_ended_by_its_watchdog_timed_out(driver: Driver) -> None:
    driver.start(key())
    file = stall_file(driver.run, key().trial_id)
    file.parent.mkdir(exist_ok=True)
    file.write_text("Timeout (0:15:00)!\nThread 0x01 (most recent call first):\n")
    driver.fail(key(), RayActorError(error_msg="The actor is dead because its worker process has died."))
    record = driver.record(key())
    assert (record.reason, record.state) == (Reason.TIMED_OUT, "FAIL")
    assert record.detail == {"message": f"no sign of life for 0:15:00, see {file.name}"}
