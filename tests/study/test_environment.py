from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from tunebench.study import environment as module
from tunebench.study.environment import environment, write_environment
from tunebench.study.errors import RunError
from tunebench.study.record import ENVIRONMENT


def test_what_workloads_start_from_is_kept_where_they_start_from_a_model(tmp_path: Path) -> None:
    assert "initial" not in environment({"ethanol": "abc"}, {})
    assert write_environment(tmp_path, {"ethanol": "abc"}, {"ethanol": {"digest": "1"}}) == []
    assert json.loads((tmp_path / "environment.json").read_text())["initial"] == {"ethanol": {"digest": "1"}}
    (line,) = write_environment(tmp_path, {"ethanol": "abc"}, {"ethanol": {"digest": "2"}})
    assert line.startswith("initial: {'ethanol': {'digest': '1'}} before")


def test_the_environment_names_versions_machine_and_data() -> None:
    now = environment({"ethanol": "abc"})
    assert now["packages"]["torch"] == importlib.metadata.version("torch")
    assert now["packages"]["tunebench"] is not None
    assert now["cores"] >= 1
    assert now["processor"]
    assert now["data"] == {"ethanol": "abc"}


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PACKAGES", ("torch", "no-such-package"))
    packages = environment({})["packages"]
    assert packages["no-such-package"] is None
    assert packages["torch"]


def test_a_machine_without_git_and_gpu_tools_has_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    now = environment({})
    assert (now["gpus"], now["revision"]) == ([], None)


def test_the_first_start_writes_and_the_same_environment_has_nothing_to_say(tmp_path: Path) -> None:
    assert write_environment(tmp_path, {"ethanol": "abc"}) == []
    written = (tmp_path / ENVIRONMENT).read_text()
    assert json.loads(written) == environment({"ethanol": "abc"})
    assert write_environment(tmp_path, {"ethanol": "abc"}) == []
    assert [file.name for file in tmp_path.iterdir()] == [ENVIRONMENT]


def test_what_changed_is_told_once_and_kept_beside_the_first_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_environment(tmp_path, {"ethanol": "abc"})
    first = json.loads((tmp_path / ENVIRONMENT).read_text())
    (line,) = write_environment(tmp_path, {"ethanol": "xyz"})
    assert line == "data: {'ethanol': 'abc'} before, {'ethanol': 'xyz'} now"
    monkeypatch.setattr(module, "_processor", lambda: "another")
    (line,) = write_environment(tmp_path, {"ethanol": "xyz"})
    assert line.endswith("before, another now")
    assert write_environment(tmp_path, {"ethanol": "xyz"}) == []
    later = [{"data": {"ethanol": "xyz"}}, {"processor": "another"}]
    assert json.loads((tmp_path / ENVIRONMENT).read_text()) == {**first, "later": later}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / ENVIRONMENT).write_text(text)
    with pytest.raises(RunError, match=ENVIRONMENT):
        write_environment(tmp_path, {})


def test_a_kill_while_it_is_written_leaves_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_environment(tmp_path, {})
    assert not (tmp_path / ENVIRONMENT).exists()
    assert write_environment(tmp_path, {}) == []
    assert (tmp_path / ENVIRONMENT).exists()
