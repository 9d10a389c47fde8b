"""Whatever happens to a journal, every command that reads a run says in one line what is wrong, or what is there."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from analysis.load import load
from tests.analysis.synthetic_run import RUNG, Plan, write_run
from tunebench.cli import run_command
from tunebench.study.errors import RunError
from tunebench.study.journal import JournalWriter, read_passages, read_trials
from tunebench.study.record import JOURNAL


class Damaged(bytes):
    """A journal; an example that fails shows what was done to it and not all of it."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes of a journal>"


DEEP = b"[" * 99_999 + b"\n"
FAST = settings(max_examples=170)
READER = st.sampled_from(["status", "explain", "replay", "analysis", "passages"])
PICK = st.floats(0.0, 1.0, exclude_max=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two arms whose trials finished, were stopped, diverged, still run, with what a rung said of them."""
    plan = Plan(arms={"adamw": (0.03, float("nan")), "soap": (0.02,)}, trials_per_arm=5)
    run = write_run(tmp_path_factory.mktemp("fuzzed") / "run", plan)
    journal, trials = JournalWriter(run), read_trials(run)
    for trial in trials[:3]:
        said = {"trial": trial.key.trial_id, "rung": RUNG, "value": 0.5, "cutoff": 0.4, "competitors": 5}
        journal.decide(trial.key, {**said, "goes_on": False, "sentinel": True})  # late ones, kept with the arm
    journal.plan(replace(trials[0].key, config_index=40), {}, {}, {}, "0" * 64, sentinel=True)
    return run


@pytest.fixture(scope="module")
def whole(run: Path) -> bytes:
    return Damaged((run / JOURNAL).read_bytes())


def lines_of(content: bytes) -> list[bytes]:
    return content.splitlines(keepends=True)


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.sampled_from([2**63, -(10**30), float("nan"), float("inf"), 1e308, "", "x", "ethanol-nequip", "\ud800", [], {}]),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.sampled_from(["value", "rung", "stage"]), st.integers(0, 3), max_size=2),
)


def places(part: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    return [place for name, child in children for place in ((*path, name), *places(child, (*path, name)))]


@st.composite
def odd_value(draw: st.DrawFn, content: bytes) -> bytes:
    """One value of one entry is another, is gone or has another name."""
    lines = lines_of(content)
    number = draw(st.integers(0, len(lines) - 1))
    entry = json.loads(lines[number])
    place = draw(st.sampled_from(places(entry)))
    parent: Any = entry
    for name in place[:-1]:
        parent = parent[name]
    match draw(st.sampled_from(["replace", "delete", "rename"])):
        case "delete":
            del parent[place[-1]]
        case "rename" if isinstance(parent, dict):
            parent[str(draw(st.sampled_from(["x", "rung", "trial_id", "key"])))] = parent.pop(place[-1])
        case _:
            parent[place[-1]] = draw(ODD)
    note(f"entry {number}: {json.dumps(entry)[:300]}")
    lines[number] = json.dumps(entry).encode() + b"\n"
    return Damaged(b"".join(lines))


@st.composite
def torn(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes are lost, doubled, flipped or put in."""
    at = draw(st.integers(0, len(content) - 1))
    length = draw(st.sampled_from([1, 2, 7, 100, 5000]))
    match draw(st.sampled_from(["cut", "lose", "flip", "insert", "zeros", "repeat"])):
        case "cut":
            return Damaged(content[:at])
        case "lose":
            return Damaged(content[:at] + content[at + length :])
        case "flip":
            return Damaged(content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :])
        case "insert":
            return Damaged(content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:])
        case "zeros":
            return Damaged(content[:at] + bytes(length) + content[at + length :])
        case _:
            return Damaged(content[: at + length] + content[at:])


@st.composite
def shuffled(draw: st.DrawFn, content: bytes) -> bytes:
    """Entries are lost, doubled, exchanged, moved to another place, or no entries."""
    lines = lines_of(content)
    one, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
    match draw(st.sampled_from(["lose", "double", "exchange", "move", "foreign", "block"])):
        case "lose":
            del lines[one]
        case "double":
            lines.insert(other, lines[one])
        case "exchange":
            lines[one], lines[other] = lines[other], lines[one]
        case "move":
            lines.insert(other, lines.pop(one))
        case "foreign":
            foreign = [
                b"\n",
                b"{}\n",
                b"[]\n",
                b"null\n",
                b'{"op_code": 99}\n',
                b'{"op_code": "4"}\n',
                b"[" * 99999 + b"\n",
            ]
            lines.insert(one, draw(st.sampled_from(foreign)))
        case _:
            del lines[min(one, other) : max(one, other)]
    return Damaged(b"".join(lines))


def reads_or_refuses(run: Path, content: bytes, reader: str, pick: float) -> None:
    """A reader of a journal finds the trials that others find in it, or says as they do in one line what is wrong."""
    (run / JOURNAL).write_bytes(content)
    refusal, names = None, []
    try:
        names = [trial.key.trial_id for trial in read_trials(run)]
    except RunError as error:
        refusal = str(error)
    if refusal is not None:
        assert_one_line(refusal)
    if reader == "analysis":
        found = attempt(lambda: [trial.key.trial_id for trial in load(run).trials])
        assert found == (refusal or names)
        return
    if reader == "passages":  # knows less, so it may read what others refuse
        passages = attempt(lambda: read_passages(run))
        if isinstance(passages, str):
            assert_one_line(passages)
        return
    trial = names[int(pick * len(names))] if names else "none"
    given = {"explain": [trial, str(run)], "replay": [str(run), "--arrivals", "1"], "status": [str(run), "--json"]}
    code, shown, complaint = command([reader, *given[reader]])
    if refusal is not None:
        assert (code, shown, complaint) == (2, "", f"tunebench: {refusal}\n")
    elif reader == "status":
        assert (code, json.loads(shown)["trials"], complaint) == (0, len(names), "")
    elif reader == "explain" and names.count(trial) == 1:
        assert (code, complaint, shown.startswith(f"{trial}: ")) == (0, "", True)
    else:
        assert (code, len(complaint.splitlines())) in ((0, 0), (2, 1))


def attempt(read: Callable[[], Any]) -> Any:
    """What a reader gives, or its refusal as a text."""
    try:
        return read()
    except RunError as error:
        return str(error)


def command(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = run_command(arguments)
    return code, out.getvalue(), err.getvalue()


def assert_one_line(line: str) -> None:
    assert len(line.splitlines()) == 1
    assert f"{JOURNAL}: found " in line
    assert line.endswith("allowed: Optuna's journal")
    assert line.isprintable()
    assert len(line) < 1000


@FAST
@given(data=st.data())
def test_a_value_that_no_driver_wrote_is_refused_or_read_alike_by_all(
    run: Path, whole: bytes, data: st.DataObject
) -> None:
    reads_or_refuses(run, data.draw(odd_value(whole)), data.draw(READER), data.draw(PICK))


@FAST
@given(data=st.data())
def test_damaged_bytes_are_refused_or_cost_the_entries_behind_them(
    run: Path, whole: bytes, data: st.DataObject
) -> None:
    reads_or_refuses(run, data.draw(torn(whole)), data.draw(READER), data.draw(PICK))


@FAST
@given(data=st.data())
def test_entries_out_of_place_are_refused_or_read_alike_by_all(run: Path, whole: bytes, data: st.DataObject) -> None:
    reads_or_refuses(run, data.draw(shuffled(whole)), data.draw(READER), data.draw(PICK))


@settings(max_examples=200)
@given(data=st.data())
def test_a_driver_goes_on_with_what_can_be_read_and_adds_to_nothing_else(
    run: Path, whole: bytes, data: st.DataObject
) -> None:
    content = data.draw(st.one_of(odd_value(whole), torn(whole), shuffled(whole)))
    (run / JOURNAL).write_bytes(content)
    try:
        before = read_trials(run)
    except RunError:
        before = None
    try:
        JournalWriter(run)
    except RunError as error:
        assert before is None
        assert_one_line(str(error))
        assert content.startswith((run / JOURNAL).read_bytes())  # at most an unfinished last line is gone
        return
    assert before is not None
    assert read_trials(run) == before
