from __future__ import annotations

from pathlib import Path

import ase.io
import pytest
from ase import Atoms

from tunebench.study.paths import FramesOfFile, NoSuchFileError, frames_of_file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds a file of ten frames, `a.xyz`; a frame has as many atoms as its number, from 1."""
    ase.io.write(tmp_path / "a.xyz", [Atoms(f"H{count}") for count in range(1, 11)], format="extxyz")
    return tmp_path.resolve()


@pytest.mark.parametrize(
    "part", [":", "::", "2:", ":3", "2:8:3", "-3:", ":-3", "::-1", "-100:100", "0", "4", "-1", "-10"]
)
def test_a_slice_or_an_index_means_what_it_means_to_ase(folder: Path, part: str) -> None:
    found = ase.io.read(f"{folder / 'a.xyz'}@{part}")
    frames = frames_of_file(f"a.xyz@{part}", folder)
    assert frames.path == folder / "a.xyz"
    taken = [index + 1 for index in frames.indices(10)]
    assert taken == [len(frame) for frame in (found if isinstance(found, list) else [found])]


def test_a_slice_runs_backwards_between_two_frames_too(folder: Path) -> None:
    assert list(frames_of_file("a.xyz@8:2:-2", folder).indices(10)) == [8, 6, 4]  # ASE 3.29 finds none in this format


def test_a_file_without_a_slice_is_all_of_its_frames(folder: Path) -> None:
    frames = frames_of_file("a.xyz", folder)
    assert (str(frames), list(frames.indices(3))) == (str(folder / "a.xyz"), [0, 1, 2])


def test_an_index_beyond_the_file_is_no_frame(folder: Path) -> None:
    assert [list(frames_of_file(f"a.xyz@{part}", folder).indices(10)) for part in ("10", "-11")] == [[], []]


def test_what_is_written_is_found_again(folder: Path) -> None:
    frames = frames_of_file("a.xyz@-3::2", folder)
    assert str(frames) == f"{folder}/a.xyz@-3::2"
    assert frames.name == "a.xyz@-3::2"
    assert frames_of_file(str(frames), Path("/")) == frames


def test_a_variable_may_hold_the_slice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_FRAMES", "a.xyz@2:4")
    assert frames_of_file("${MY_FRAMES}", folder) == FramesOfFile(folder / "a.xyz", "2:4")
    monkeypatch.delenv("MY_FRAMES")
    with pytest.raises(NoSuchFileError, match=r"^a set environment variable MY_FRAMES$"):
        frames_of_file("${MY_FRAMES}@2:4", folder)


def test_a_file_of_the_whole_name_comes_before_a_slice(folder: Path) -> None:
    (folder / "a.xyz@2:4").write_text("")
    assert frames_of_file("a.xyz@2:4", folder) == FramesOfFile(folder / "a.xyz@2:4")
    assert frames_of_file("a.xyz@2:4@1:", folder) == FramesOfFile(folder / "a.xyz@2:4", "1:")


def test_an_at_sign_in_a_folder_is_no_slice(folder: Path) -> None:
    (folder / "me@1").mkdir()
    (folder / "a.xyz").rename(folder / "me@1" / "a.xyz")
    assert frames_of_file("me@1/a.xyz@5", folder) == FramesOfFile(folder / "me@1" / "a.xyz", "5")
    with pytest.raises(NoSuchFileError, match=r"^an existing file; .*/me@1/b\.xyz is none$"):
        frames_of_file("me@1/b.xyz", folder)


@pytest.mark.parametrize("part", ["a:b", "1:2:3:4", "::0", "0:9:0", "", "1.5", "1,2", "all", "-", "9" * 5000])
def test_a_malformed_slice_is_answered_with_what_may_stand_there(folder: Path, part: str) -> None:
    with pytest.raises(NoSuchFileError, match="; START:STOP:STEP with a step other than 0 or one index, in whole"):
        frames_of_file(f"a.xyz@{part}", folder)


def test_a_slice_of_no_file_names_the_file(folder: Path) -> None:
    with pytest.raises(NoSuchFileError, match=r"^an existing file; .*/gone\.xyz is none$"):
        frames_of_file("gone.xyz@1:2", folder)
