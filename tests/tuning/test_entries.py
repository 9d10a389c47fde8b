"""Entries come to the journal in their order, and what binds is there before anybody acts on it."""

from __future__ import annotations

import io
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from tunebench.engine.checkpoints import checkpoint_folder, save_checkpoint
from tunebench.study.errors import Interrupted
from tunebench.study.journal import JournalWriter, read_passages, read_trials
from tunebench.study.record import Reason, Stage, TrialKey
from tunebench.study.run_copy import RunCopy
from tunebench.tuning.entries import (
    Called,
    Clerk,
    Decided,
    Ended,
    Entry,
    Evaluated,
    Reached,
    Realised,
    Started,
    Waiting,
)
from tunebench.tuning.progress import Progress
from tunebench.tuning.shard import Lease, Outbox

LEASE = Lease(tenants=4, others=None)


def key(index: int = 0) -> TrialKey:
    return TrialKey(workload="w", optimizer="adamw", stage=Stage.TUNE, config_index=index, seed_index=0)


def decision(index: int, rung: int = 3) -> dict[str, object]:
    said = {"rung": rung, "value": 0.5, "cutoff": 1.0, "competitors": 2, "goes_on": True, "sentinel": False}
    return {"trial": key(index).trial_id, **said}


def life_of(index: int) -> list[Entry]:
    """All that becomes of a trial, in order; the second rung decides as it ends."""
    trial = key(index)
    groups = [{"rule": "adamw", "share": 1.0}]
    return [
        Called(key=trial),
        Started(key=trial, engine="cohort"),
        Realised(key=trial, groups=groups, device="H200"),
        Reached(key=trial, step=3, objective=0.5),
        Decided(key=trial, decision=decision(index)),
        Evaluated(key=trial, objective=0.5),
        Waiting(key=trial, for_rung=True),
        Started(key=trial, engine="cohort"),
        Reached(key=trial, step=6, objective=0.25),
        Decided(key=trial, decision=decision(index, 6)),
        Evaluated(key=trial, objective=0.25),
        Ended(key=trial, reason=Reason.FINISHED, value=0.25, detail={"message": ""}, ledger=LEDGER, result={}),
    ]


LEDGER = {"steps": 6, "wall_s": 2.0, "device_s": 1.0, "attempts": 1}


class Desk:
    """A clerk and what it writes to."""

    def __init__(self, run: Path) -> None:
        run.mkdir(exist_ok=True)
        self.run, self.journal = run, JournalWriter(run)
        self.journal.add_arm("w/adamw", {})
        progress = Progress(run, Stage.TUNE, Console(file=io.StringIO()))
        for index in range(2):
            self.journal.plan(key(index), {}, {}, {})
            progress.planned(key(index), None, None)
        self.clerk = Clerk(self.journal, progress, lambda key: True, RunCopy(run, None))


def test_entries_written_together_are_those_written_one_by_one(tmp_path: Path) -> None:
    together, apart = Desk(tmp_path / "together"), Desk(tmp_path / "apart")
    lives = [entry for pair in zip(life_of(0), life_of(1), strict=True) for entry in pair]
    together.clerk.write(lives)
    for entry in lives:
        apart.clerk.write([entry])
    assert read_trials(together.run) == read_trials(apart.run) == together.journal.trials()
    assert read_passages(together.run) == read_passages(apart.run)
    (first, _) = read_trials(together.run)
    assert (first.reason, first.rungs, first.engine, first.device) == (
        Reason.FINISHED,
        {3: 0.5, 6: 0.25},
        "cohort",
        "H200",
    )
    assert [each["rung"] for each in first.decisions] == [3, 6]


def test_entries_written_together_wait_for_the_disk_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk, waits = Desk(tmp_path), list[int]()
    monkeypatch.setattr(os, "fsync", waits.append)
    desk.clerk.write([*life_of(0), *life_of(1)])
    assert len(waits) == 1
    desk.clerk.write([Evaluated(key=key(), objective=0.5), Called(key=key())])
    assert len(waits) == 1, "nothing of it is for the journal"


def test_checkpoints_of_an_ended_trial_are_there_until_the_journal_says_that_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path)
    folder = checkpoint_folder(tmp_path, key().trial_id)
    save_checkpoint(folder, {"step": 6})
    seen: list[bool] = []
    monkeypatch.setattr(os, "fsync", lambda file: seen.append(folder.exists()))
    desk.clerk.write(life_of(0))
    assert seen == [True]
    assert not folder.exists()


def test_what_binds_is_handed_over_only_when_it_has_been_written() -> None:
    outbox, done = Outbox(), threading.Event()

    def tune() -> None:
        outbox.write([Called(key=key())])  # binds nothing
        outbox.write([Reached(key=key(), step=3, objective=0.5)])
        done.set()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(tune)
        told = outbox.take(LEASE)
        assert [type(entry) for entry in told.entries] == [Called, Reached]
        time.sleep(0.05)
        assert not done.is_set()
        assert not outbox.take(LEASE).entries
        assert done.wait(5)


def test_what_does_not_bind_waits_for_company_and_keeps_its_order() -> None:
    outbox = Outbox()
    for index in range(50):
        outbox.write([Evaluated(key=key(), objective=float(index))])
    told = outbox.take(LEASE)
    assert [entry.objective for entry in told.entries if isinstance(entry, Evaluated)] == list(range(50))
    assert outbox.lease == LEASE


def test_the_last_that_a_shard_tells_is_why_it_ended() -> None:
    outbox = Outbox()
    outbox.write([Evaluated(key=key(), objective=0.5)])
    outbox.end(Interrupted("drained"))
    told = pickle.loads(pickle.dumps(outbox.take(LEASE)))
    assert (len(told.entries), told.ended, str(told.error)) == (1, True, "drained")
