from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tunebench.cli import run_command
from tunebench.study.errors import RunError
from tunebench.study.journal import JournalWriter
from tunebench.study.notice import NOTICE, posting, take_down
from tunebench.study.record import Reason, Stage, TrialKey
from tunebench.study.search_space import SearchSpace
from tunebench.study.status import explain_trial, run_status

LEDGER = {"steps": 9, "wall_s": 3.0, "device_s": 1.5, "attempts": 2}
GROUPS = [{"rule": "muon", "share": 0.25}, {"rule": "adamw", "share": 0.75}]


def key(config_index: int, stage: Stage = Stage.TUNE) -> TrialKey:
    return TrialKey(workload="ethanol", optimizer="muon", stage=stage, config_index=config_index, seed_index=0)


def end(journal: JournalWriter, trial: TrialKey, reason: Reason, objective: float | None, **detail: Any) -> None:
    journal.finish(trial, reason, value=objective, detail=detail, ledger=LEDGER, result={})


@pytest.fixture
def journal(tmp_path: Path) -> JournalWriter:
    """A tune stage of six trials: finished, stopped, diverged, running, two waiting."""
    writer = JournalWriter(tmp_path)
    writer.add_arm("ethanol/muon", {})
    for index in range(6):
        writer.plan(key(index), {}, {}, {})
    writer.start(key(0), GROUPS)
    writer.record_rung(key(0), 3, 0.5)
    end(writer, key(0), Reason.FINISHED, 0.25)
    end(writer, key(1), Reason.STOPPED_ASHA, 0.5, rung=3, cutoff=0.375, value=0.5, recorded=3)
    end(writer, key(2), Reason.DIVERGED, None, message="training loss inf at step 2")
    writer.start(key(3), engine="lightning")
    writer.start(key(3), engine="cohort")
    return writer


def test_status_counts_every_trial_once(tmp_path: Path, journal: JournalWriter) -> None:
    status = run_status(tmp_path)
    (arm,) = status["arms"]
    assert (arm["arm"], arm["stage"], arm["planned"]) == ("ethanol/muon", "tune", 6)
    assert (arm["waiting"], arm["running"]) == (2, 1)
    assert (arm["FINISHED"], arm["STOPPED_ASHA"], arm["DIVERGED"], arm["CRASHED"], arm["failed"]) == (1, 1, 1, 0, 1)
    assert arm["best_objective"] == 0.25
    assert arm["engine"] == "cohort"  # the one that trained last
    assert status["trials"] == 6
    assert status["device_s"] == 3 * 1.5


def test_a_run_is_finished_when_its_confirm_stage_is(tmp_path: Path, journal: JournalWriter) -> None:
    end(journal, key(3), Reason.CRASHED, None, message="m")
    end(journal, key(4), Reason.FINISHED, 0.5)
    end(journal, key(5), Reason.FINISHED, 0.5)
    assert run_status(tmp_path)["finished"] is False  # the confirm stage is still to come
    journal.plan(key(0, Stage.CONFIRM), {}, {}, {})
    status = run_status(tmp_path)
    assert status["finished"] is False
    assert [arm["stage"] for arm in status["arms"]] == ["tune", "confirm"]
    end(journal, key(0, Stage.CONFIRM), Reason.FINISHED, 0.25)
    assert run_status(tmp_path)["finished"] is True


def test_an_arm_where_nothing_worked_has_no_best(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path)
    writer.add_arm("ethanol/muon", {})
    writer.plan(key(0), {}, {}, {})
    end(writer, key(0), Reason.DIVERGED, None, message="m")
    assert run_status(tmp_path)["arms"][0]["best_objective"] is None


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (0, "ethanol.muon.tune.c000.s0: finished its horizon with objective 0.25"),
        (
            1,
            "ethanol.muon.tune.c001.s0: stopped at rung 3: objective 0.5 is above the cutoff 0.375 "
            "of the 3 trials of its arm seen there",
        ),
        (2, "ethanol.muon.tune.c002.s0: ended as DIVERGED: training loss inf at step 2"),
        (3, "ethanol.muon.tune.c003.s0: has not ended; it runs"),
        (4, "ethanol.muon.tune.c004.s0: has not ended; it waits"),
    ],
)
def test_a_trial_is_explained_in_a_sentence(tmp_path: Path, journal: JournalWriter, index: int, sentence: str) -> None:
    assert explain_trial(tmp_path, key(index).trial_id)["text"].splitlines()[0] == sentence


def test_an_explanation_holds_rungs_rules_and_work(tmp_path: Path, journal: JournalWriter) -> None:
    lines = explain_trial(tmp_path, key(0).trial_id)["text"].splitlines()
    assert "rung 3: objective 0.5, not decided" in lines
    assert "update rules: muon 25.0 % of the weights, adamw 75.0 % of the weights" in lines
    assert "work: 9 steps, 1.5 device-seconds, 2 attempt(s)" in lines


def test_an_explanation_adds_up_the_views_of_a_rule(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path)
    view = SearchSpace.load("muon").parameters["fctp_view"]
    writer.add_arm("ethanol/muon", {})
    writer.plan(key(0), {"fctp_view": "merged"}, {"fctp_view": view.distribution()}, {})
    shares = [("muon", "matrix", 0.25), ("muon", "merged", 0.5), ("adamw", "vector", 0.25)]
    writer.start(key(0), [{"rule": rule, "view": view, "share": share} for rule, view, share in shares])
    lines = explain_trial(tmp_path, key(0).trial_id)["text"].splitlines()
    assert "configuration: fctp_view = merged" in lines
    assert "update rules: muon 75.0 % of the weights (matrix, merged), adamw 25.0 % of the weights" in lines


def test_a_horizon_reached_without_a_finite_objective_is_explained(tmp_path: Path, journal: JournalWriter) -> None:
    end(journal, key(4), Reason.FINISHED, None)
    assert "with an objective that is not finite" in explain_trial(tmp_path, key(4).trial_id)["text"]


def test_a_value_that_was_not_finite_at_a_rung_is_explained_so(tmp_path: Path, journal: JournalWriter) -> None:
    end(journal, key(4), Reason.STOPPED_ASHA, None, rung=3, cutoff=0.375, value=float("nan"), recorded=3)
    text = explain_trial(tmp_path, key(4).trial_id)["text"]
    assert "stopped at rung 3: its objective nan is not finite" in text


def test_the_beginning_of_a_trial_id_is_enough_where_it_is_the_only_one(tmp_path: Path, journal: JournalWriter) -> None:
    assert explain_trial(tmp_path, "ethanol.muon.tune.c003")["trial"] == key(3).trial_id


@pytest.mark.parametrize(("name", "count"), [("no-such", 0), ("ethanol.muon", 6)])
def test_another_name_is_answered_with_trial_ids(tmp_path: Path, journal: JournalWriter, name: str, count: int) -> None:
    with pytest.raises(RunError, match=rf"trial '{name}' names {count} trials, allowed: one trial id, such as ethanol"):
        explain_trial(tmp_path, name)


def test_a_folder_without_a_journal_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no journal here"):
        run_status(tmp_path)


def test_status_and_explain_tell_how_often_the_rungs_of_an_arm_were_wrong(tmp_path: Path) -> None:
    writer = JournalWriter(tmp_path)
    writer.add_arm("ethanol/muon", {})
    for index in range(4):
        writer.plan(key(index), {}, {}, {}, sentinel=index < 2)
        goes_on = index in (1, 2)
        decision = {"rung": 3, "value": 0.5, "cutoff": 0.4, "competitors": 4, "goes_on": goes_on, "sentinel": index < 2}
        writer.decide(key(index), {"trial": key(index).trial_id, **decision})
    for index, objective in ((0, 0.1), (1, 0.3), (2, 0.2)):
        end(writer, key(index), Reason.FINISHED, objective)
    end(writer, key(3), Reason.STOPPED_ASHA, 0.5, rung=3, cutoff=0.4, value=0.5, recorded=4)
    writer.plan(key(2, Stage.CONFIRM), {}, {}, {})
    tuned, confirmed = run_status(tmp_path)["arms"]
    assert (tuned["false_stops"]["wrongly"], tuned["false_stops"]["sentinels"]) == (1, 2)
    assert confirmed["false_stops"] is None
    last = explain_trial(tmp_path, key(3).trial_id)["text"].splitlines()[-1]
    assert last == "false stops of its arm: 1 of 2 sentinels, 1 to 99 % with 95 % confidence"
    assert run_command(["status", str(tmp_path)]) == 0


def test_what_the_driver_waits_for_is_told_until_it_is_over(tmp_path: Path, journal: JournalWriter) -> None:
    assert run_status(tmp_path)["notice"] == ""
    with posting(tmp_path) as post:
        for line in ("waiting for a free device", "measuring"):
            post(line)
            assert run_status(tmp_path)["notice"] == line
    assert run_status(tmp_path)["notice"] == ""


def test_what_a_killed_driver_had_posted_is_taken_down(tmp_path: Path, journal: JournalWriter) -> None:
    (tmp_path / NOTICE).write_text("waiting for a free device\n")
    take_down(tmp_path)
    take_down(tmp_path)
    assert run_status(tmp_path)["notice"] == ""
