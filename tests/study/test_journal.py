from __future__ import annotations

import builtins
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages.journal import JournalFileBackend

from tunebench.study.errors import RunError
from tunebench.study.journal import JournalWriter, mend_torn_tail, read_trials
from tunebench.study.record import JOURNAL, Reason, Stage, TrialKey, TrialRecord

ARM = "ethanol/lamb"
DISTRIBUTIONS = {
    "learning_rate": FloatDistribution(1e-4, 1e-1, log=True),
    "clamp": CategoricalDistribution((10.0, None)),
    "nesterov": CategoricalDistribution((False, True)),
    "frequency": IntDistribution(1, 100, log=True),
}
PARAMS = {"learning_rate": 0.01, "clamp": None, "nesterov": True, "frequency": 10}
SEEDS = {"init": 1, "order": 2, "labels": 3}
GROUPS = [{"rule": "lamb", "tensors": 2, "parameters": 12, "settings": {"lr": 0.01}, "share": 1.0}]
LEDGER = {"steps": 9, "wall_s": 2.5, "device_s": 1.5, "attempts": 2}
RESULT = {"val": {"raw": {"forces_mae": 0.25}}}
CUTOFF = {"rung": 3, "cutoff": 0.2, "value": 0.5, "recorded": 3}


def key(config_index: int = 0, stage: Stage = Stage.TUNE) -> TrialKey:
    return TrialKey(workload="ethanol", optimizer="lamb", stage=stage, config_index=config_index, seed_index=0)


def plan(journal: JournalWriter, config_index: int = 0) -> TrialKey:
    journal.plan(key(config_index), PARAMS, DISTRIBUTIONS, SEEDS)
    return key(config_index)


def end(journal: JournalWriter, trial: TrialKey, reason: Reason = Reason.FINISHED, **changes: Any) -> None:
    content = {"value": 0.25, "detail": {"message": ""}, "ledger": LEDGER, "result": RESULT} | changes
    journal.finish(trial, reason, **content)


def write_everything(run: Path) -> list[TrialRecord]:
    """Two trials from plan to end, one of them stopped, as a driver would write them."""
    journal = JournalWriter(run)
    journal.add_arm(ARM, {"ranked": True, "note": "n"})
    first, second = plan(journal, 0), plan(journal, 1)
    for trial, objective in ((first, 0.1), (second, 0.5)):
        journal.start(trial)
        journal.start(trial, GROUPS)
        journal.record_rung(trial, 3, objective)
    end(journal, second, Reason.STOPPED_ASHA, value=0.5, detail=CUTOFF)
    end(journal, first)
    return read_trials(run)


def test_a_trial_comes_back_as_it_was_written(tmp_path: Path) -> None:
    finished, stopped = write_everything(tmp_path)
    assert finished == TrialRecord(
        key=key(0),
        number=0,
        state="COMPLETE",
        reason=Reason.FINISHED,
        detail={"message": ""},
        value=0.25,
        params=PARAMS,
        rungs={3: 0.1},
        seeds=SEEDS,
        ledger=LEDGER,
        groups=GROUPS,
        result=RESULT,
    )
    assert (stopped.state, stopped.reason, stopped.detail) == ("PRUNED", Reason.STOPPED_ASHA, CUTOFF)
    assert stopped.params["clamp"] is None
    assert stopped.params["nesterov"] is True
    assert isinstance(stopped.key.stage, Stage)


def test_a_planned_trial_waits_and_a_started_one_runs(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm(ARM, {})
    journal.start(plan(journal, 0))
    plan(journal, 1)
    running, waiting = read_trials(tmp_path)
    assert (running.state, waiting.state) == ("RUNNING", "WAITING")
    for record in (running, waiting):
        assert (record.reason, record.value, record.rungs, record.groups) == (None, None, {}, [])
        assert record.params == PARAMS


def test_each_arm_is_an_optuna_study_that_optuna_opens(tmp_path: Path) -> None:
    write_everything(tmp_path)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / JOURNAL))
    study = optuna.load_study(study_name=ARM, storage=optuna.storages.JournalStorage(backend))
    assert study.user_attrs == {"ranked": True, "note": "n"}
    assert study.best_value == 0.25
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert study.trials[0].intermediate_values == {3: 0.1}


@pytest.mark.parametrize("reason", [r for r in Reason if r not in (Reason.FINISHED, Reason.STOPPED_ASHA)])
def test_a_failed_trial_has_a_reason_and_no_value(tmp_path: Path, reason: Reason) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm(ARM, {})
    end(journal, plan(journal), reason, value=0.5, detail={"message": "why"})
    (record,) = read_trials(tmp_path)
    assert (record.state, record.reason, record.value, record.detail) == ("FAIL", reason, None, {"message": "why"})


@pytest.mark.parametrize("reason", [Reason.FINISHED, Reason.STOPPED_ASHA])
def test_a_trial_may_end_without_a_finite_objective(tmp_path: Path, reason: Reason) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm(ARM, {})
    end(journal, plan(journal), reason, value=None)
    (record,) = read_trials(tmp_path)
    assert (record.reason, record.value) == (reason, None)


def test_repeating_everything_writes_nothing(tmp_path: Path) -> None:
    before = write_everything(tmp_path)
    written = (tmp_path / JOURNAL).read_bytes()
    assert write_everything(tmp_path) == before
    assert (tmp_path / JOURNAL).read_bytes() == written


def test_repeating_a_step_of_an_open_trial_writes_nothing(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm(ARM, {})
    trial = plan(journal)
    steps: list[Callable[[], None]] = [
        lambda: journal.add_arm(ARM, {}),
        lambda: journal.plan(trial, PARAMS, DISTRIBUTIONS, SEEDS),
        lambda: journal.start(trial),
        lambda: journal.start(trial, GROUPS),
        lambda: journal.record_rung(trial, 3, 0.1),
        lambda: end(journal, trial),
    ]
    for step in steps:
        step()
        written = (tmp_path / JOURNAL).read_bytes()
        step()
        assert (tmp_path / JOURNAL).read_bytes() == written


def test_what_is_closed_stays_as_it_is(tmp_path: Path) -> None:
    before = write_everything(tmp_path)
    journal = JournalWriter(tmp_path)
    end(journal, key(0), Reason.CRASHED, value=None, detail={"message": "late"})
    end(journal, key(1), value=0.001)
    assert read_trials(tmp_path) == before


def test_a_trial_is_planned_once_with_its_first_parameters(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm(ARM, {})
    plan(journal)
    JournalWriter(tmp_path).plan(key(), {**PARAMS, "learning_rate": 0.05}, DISTRIBUTIONS, SEEDS)
    (record,) = read_trials(tmp_path)
    assert record.params == PARAMS


def test_a_journal_cut_at_any_byte_reads_and_loses_its_unfinished_entry_only(tmp_path: Path) -> None:
    write_everything(tmp_path)
    content = (tmp_path / JOURNAL).read_bytes()
    for length in range(len(content) + 1):
        (tmp_path / JOURNAL).write_bytes(content[:length])
        before = read_trials(tmp_path)  # a reader may come before the driver is back
        mend_torn_tail(tmp_path / JOURNAL)
        assert (tmp_path / JOURNAL).read_bytes() == content[: content.rfind(b"\n", 0, length) + 1]
        assert read_trials(tmp_path) == before


def test_a_journal_cut_inside_any_entry_goes_on_to_the_same_end(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    expected = write_everything(tmp_path / "whole")
    lines = (tmp_path / "whole" / JOURNAL).read_bytes().splitlines(keepends=True)
    assert len(lines) > 10
    for entry, line in enumerate(lines):
        run = tmp_path / str(entry)
        run.mkdir()
        (run / JOURNAL).write_bytes(b"".join(lines[:entry]) + line[: len(line) // 2])
        assert write_everything(run) == expected, f"cut inside {line!r}"


def test_an_arm_gets_the_attributes_that_a_kill_kept_from_it(tmp_path: Path) -> None:
    JournalWriter(tmp_path).add_arm(ARM, {"ranked": True, "note": "n"})
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_bytes(lines[0])
    JournalWriter(tmp_path).add_arm(ARM, {"ranked": True, "note": "n"})
    assert len((tmp_path / JOURNAL).read_bytes().splitlines()) == len(lines)


def test_a_trial_killed_while_it_was_closed_counts_as_open_and_can_be_closed(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm(ARM, {})
    end(journal, plan(journal))
    lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_bytes(b"".join(lines[:-1]))  # all but the state
    (record,) = read_trials(tmp_path)
    assert (record.state, record.reason) == ("RUNNING", None)
    end(JournalWriter(tmp_path), key(), Reason.TIMED_OUT, value=None)
    (record,) = read_trials(tmp_path)
    assert record.reason is Reason.TIMED_OUT


def test_only_an_unfinished_line_is_dropped_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / JOURNAL
    mend_torn_tail(path)  # nothing there, nothing made
    assert not path.exists()
    path.write_bytes(b'{"a":1}\n')
    mend_torn_tail(path)
    assert caplog.records == []
    path.write_bytes(b'{"a":1}\n{"b"')
    mend_torn_tail(path)
    assert path.read_bytes() == b'{"a":1}\n'
    assert "dropped an unfinished last entry of 4 bytes" in caplog.text


def test_a_reader_sees_each_step_of_an_open_writer(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    assert read_trials(tmp_path) == []
    journal.add_arm(ARM, {})
    trial = plan(journal)
    assert [record.state for record in read_trials(tmp_path)] == ["WAITING"]
    journal.start(trial)
    journal.record_rung(trial, 3, 0.5)
    assert [record.rungs for record in read_trials(tmp_path)] == [{3: 0.5}]
    end(journal, trial)
    assert [record.reason for record in read_trials(tmp_path)] == [Reason.FINISHED]


def test_a_rung_measured_again_holds_the_last_value(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm(ARM, {})
    trial = plan(journal)
    journal.start(trial)
    journal.record_rung(trial, 3, 0.5)
    journal.record_rung(trial, 3, 0.4)
    (record,) = read_trials(tmp_path)
    assert record.rungs == {3: 0.4}


def test_no_journal_is_an_error_and_none_is_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no journal here, allowed: a run directory"):
        read_trials(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda lines: [*lines[:4], b"{}\n", *lines[4:]], "line 5 is no entry"),
        (lambda lines: [*lines[:-1], lines[-1].replace(b"{", b"[", 1)], "line 21 is no entry"),
        (lambda lines: [line.replace(b"tune.c001", b"tune.c007") for line in lines], "c007.s0' of arm 'ethanol/lamb'"),
        (lambda lines: [line.replace(b'"steps":9', b'"steps":""') for line in lines], "c000.s0': ledger.steps: Input"),
        (lambda lines: lines[1:], "0 of 2 trials can be read"),
    ],
)
def test_a_damaged_journal_is_refused_in_one_line_by_reader_and_driver(
    tmp_path: Path, damage: Callable[[list[bytes]], list[bytes]], what: str
) -> None:
    write_everything(tmp_path)
    damaged = b"".join(damage((tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)))
    (tmp_path / JOURNAL).write_bytes(damaged)
    for use in (read_trials, JournalWriter):
        with pytest.raises(
            RunError, match=r"journal.log: found an unreadable journal \(.+\), allowed: Optuna's"
        ) as caught:
            use(tmp_path)
        assert what in str(caught.value)
    assert (tmp_path / JOURNAL).read_bytes() == damaged


def test_reading_writes_nothing_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = write_everything(tmp_path)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path, *tmp_path.iterdir())}
    plain_open, plain_os_open = builtins.open, os.open

    def read_only_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            raise PermissionError(file)
        return plain_open(file, mode, *args, **kwargs)

    def read_only_os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(path)
        return plain_os_open(path, flags, *args, **kwargs)

    # a write-protected folder would not stop the superuser, whom containers often run tests as
    monkeypatch.setattr(builtins, "open", read_only_open)
    monkeypatch.setattr(os, "open", read_only_os_open)
    assert read_trials(tmp_path) == expected
    monkeypatch.undo()
    assert {file: file.stat().st_mtime_ns for file in (tmp_path, *tmp_path.iterdir())} == before


def test_trials_are_listed_arm_by_arm_in_the_order_of_their_planning(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    arms = ["ethanol/lamb", "ethanol/adamw"]
    for arm in arms:
        journal.add_arm(arm, {})
    for index in (2, 0, 1):
        for arm in arms:
            trial = replace(key(index), optimizer=arm.split("/")[1])
            journal.plan(trial, PARAMS, DISTRIBUTIONS, SEEDS)
    assert [(t.key.arm, t.key.config_index) for t in read_trials(tmp_path)] == [
        (arm, index) for arm in arms for index in (2, 0, 1)
    ]


def test_the_end_of_a_trial_waits_for_the_disk_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm(ARM, {})
    trial = plan(journal)
    journal.start(trial)
    waits: list[int] = []
    monkeypatch.setattr(os, "fsync", waits.append)
    end(journal, trial)
    assert len(waits) == 1
    (record,) = read_trials(tmp_path)
    assert (record.reason, record.ledger, record.result) == (Reason.FINISHED, LEDGER, RESULT)


def test_an_end_that_the_disk_refuses_leaves_the_trial_open_and_can_be_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm(ARM, {})
    trial = plan(journal)
    journal.start(trial)
    written = (tmp_path / JOURNAL).read_bytes()

    def refuse(file: int) -> None:
        (tmp_path / JOURNAL).write_bytes(written)  # nothing of it is on the disk
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="no space left"):
        end(journal, trial)
    monkeypatch.undo()
    assert [record.state for record in read_trials(tmp_path)] == ["RUNNING"]
    end(journal, trial)
    assert [record.reason for record in read_trials(tmp_path)] == [Reason.FINISHED]


def test_a_driver_that_comes_back_parses_its_journal_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_everything(tmp_path)
    read, parses = JournalFileBackend.read_logs, list[int]()

    def counted(backend: JournalFileBackend, log_number_from: int):
        parses.append(log_number_from)
        return read(backend, log_number_from)

    monkeypatch.setattr(JournalFileBackend, "read_logs", counted)
    again = JournalWriter(tmp_path)
    assert again.trials() == read_trials(tmp_path)
    assert parses.count(0) == 2, "the driver, and `read_trials` in this test"


def test_what_is_written_in_a_batch_is_seen_at_once_and_waits_for_the_disk_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm(ARM, {})
    waits: list[int] = []
    monkeypatch.setattr(os, "fsync", waits.append)
    with journal.batch():
        for index in range(3):
            end(journal, plan(journal, index))
        assert [record.reason for record in journal.trials()] == [Reason.FINISHED] * 3
        assert read_trials(tmp_path) == []
    assert len(waits) == 1
    assert read_trials(tmp_path) == journal.trials()


def test_after_a_batch_that_the_disk_refuses_the_journal_knows_what_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm(ARM, {})
    trial = plan(journal)
    append = JournalFileBackend.append_logs

    def tear(backend: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        append(backend, logs[:1])
        with (tmp_path / JOURNAL).open("ab") as file:
            file.write(b'{"op_code": 9, "wor')
        raise OSError("no space left on device")

    monkeypatch.setattr(JournalFileBackend, "append_logs", tear)

    def write() -> None:
        with journal.batch():
            journal.start(trial)
            end(journal, trial)

    with pytest.raises(OSError, match="no space left"):
        write()
    monkeypatch.undo()
    assert journal.trials() == read_trials(tmp_path)
    assert [record.state for record in journal.trials()] == ["RUNNING"]
    end(journal, trial)
    assert [record.reason for record in read_trials(tmp_path)] == [Reason.FINISHED]


def test_a_long_batch_is_written_in_parts(tmp_path: Path) -> None:
    journal = JournalWriter(tmp_path)
    journal.add_arm(ARM, {})
    with journal.batch():
        for index in range(1500):
            plan(journal, index)
        assert len(read_trials(tmp_path)) == 1000
    assert read_trials(tmp_path) == journal.trials()
