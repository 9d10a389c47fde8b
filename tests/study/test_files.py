from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from tunebench.study.control import Wish, ask, asked
from tunebench.study.files import KEPT_FREE_BYTES, replacing
from tunebench.study.record import STUDY_HASH


def test_the_new_content_takes_the_place_of_the_old_at_once(tmp_path: Path) -> None:
    path = tmp_path / "below" / "file"
    for text in ("first", "second"):
        with replacing(path) as partial:
            partial.write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail_half_way() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def leave_free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))


def test_nothing_is_written_where_there_is_no_room_for_it_twice_beside_what_is_kept_for_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old " * 250)
    leave_free(monkeypatch, KEPT_FREE_BYTES + 999)
    with pytest.raises(OSError, match="No space left") as error, replacing(path) as partial:
        partial.write_text("new")
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old " * 250
    leave_free(monkeypatch, KEPT_FREE_BYTES + 1000)
    with replacing(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"


def test_a_run_on_a_full_disk_can_be_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / STUDY_HASH).touch()
    leave_free(monkeypatch, 4096)
    ask(tmp_path, Wish.CANCEL)
    assert asked(tmp_path) is Wish.CANCEL
