from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.deployment import wait_for
from tests.cluster.lan import CHECKOUT
from tests.tuning.conftest import STUDY, write_study
from tunebench.cluster.launch import STORAGE_VARIABLE, _how_to_go_on, driver_command, main, run_folder
from tunebench.study.errors import RunError
from tunebench.study.lock import LOCK, is_held

LAUNCH = CHECKOUT / "cluster" / "launch.py"
# A driver that says something, and ends by itself, by SIGTERM, or when a file is there.
DRIVER = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
print("at work", flush=True)
while not pathlib.Path("end").exists():
    time.sleep(0.05)
print("report: written", flush=True)
sys.exit(3)
"""
WATCHER = """
import pathlib, sys
from tunebench.cluster.launch import follow, start_driver
output = pathlib.Path("launch.log")
output.write_text("of an earlier start\\n")
driver = start_driver([sys.executable, "driver.py"], output)
pathlib.Path("driver.pid").write_text(str(driver.pid))
sys.exit(follow(driver, output, len("of an earlier start\\n")))
"""


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has started a driver and shows what it says."""
    (tmp_path / "driver.py").write_text(DRIVER)
    watcher = subprocess.Popen([sys.executable, "-c", WATCHER], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == "at work\n"
    yield watcher
    watcher.kill()
    with suppress(ProcessLookupError):
        os.kill(driver_of(tmp_path), signal.SIGKILL)


def driver_of(folder: Path) -> int:
    """Process id of the driver."""
    return int((folder / "driver.pid").read_text())


def lives(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", [signal.SIGHUP, signal.SIGINT])
def test_a_driver_outlives_whoever_watches_it(
    watched: subprocess.Popen[str], tmp_path: Path, how: signal.Signals
) -> None:
    watched.send_signal(how)
    assert watched.wait(10) == 0
    time.sleep(0.3)
    assert lives(driver_of(tmp_path))
    assert os.getsid(driver_of(tmp_path)) == driver_of(tmp_path)  # no terminal's end reaches it


def test_a_stopped_job_stops_its_driver_which_keeps_its_state(watched: subprocess.Popen[str], tmp_path: Path) -> None:
    watched.terminate()
    assert watched.wait(10) == 130
    assert not lives(driver_of(tmp_path))


def test_the_end_of_the_driver_is_shown_and_its_exit_code_is_the_jobs(
    watched: subprocess.Popen[str], tmp_path: Path
) -> None:
    (tmp_path / "end").touch()
    assert watched.communicate(timeout=10)[0] == "report: written\n"
    assert watched.returncode == 3


def test_a_killed_driver_ends_its_job_like_a_shell_would_say(watched: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(driver_of(tmp_path), signal.SIGKILL)
    assert watched.wait(10) == 128 + signal.SIGKILL


def test_a_second_driver_on_one_run_is_refused(tmp_path: Path) -> None:
    study, run = write_study(tmp_path), tmp_path / "run"
    run.mkdir()
    with (run / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert is_held(run)
        arguments = ["--study", str(study), "--run", str(run)]
        done = subprocess.run([sys.executable, str(LAUNCH), *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr.startswith(f"tunebench: {run}: found a driver at work on it, allowed: one at a time; ")
        assert done.stderr.count("\n") == 1
    assert not is_held(run)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda study: ["--study", study], "--storage: found nothing, nor TUNEBENCH_STORAGE, allowed: a folder"),
        (lambda study: ["--study", study.with_name("no.yaml"), "--storage", "x"], "no.yaml"),
        (lambda study: ["--study", study.parent, "--storage", "x"], "allowed:"),
        (lambda study: ["--study", study, "--storage", study], "study.yaml/runs/small-"),
        (lambda study: ["--study", study, "--run", "x", "--set", "A B=1"], "--set: found 'A B=1', allowed: NAME=VALUE"),
    ],
)
def test_bad_input_ends_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: Callable[[Path], list[Path | str]],
    said: str,
) -> None:
    monkeypatch.delenv(STORAGE_VARIABLE, raising=False)
    assert main([str(word) for word in arguments(write_study(tmp_path))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tunebench: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_study_finds_its_run_again_below_the_storage(tmp_path: Path) -> None:
    study = write_study(tmp_path)
    run = run_folder(study, str(tmp_path / "storage"))
    assert run == run_folder(study, str(tmp_path / "storage"))
    assert run.parent == tmp_path / "storage" / "runs"
    with pytest.raises(RunError, match="--storage"):
        run_folder(study, None)


def test_a_variable_that_is_given_reaches_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TUNEBENCH_TEST_DATA", "")
    monkeypatch.delenv("TUNEBENCH_TEST_DATA")
    frames = {"train": 5, "val": 2, "test": 2}
    data = {"source": "extxyz", "train": "${TUNEBENCH_TEST_DATA}/train.xyz", "frames": frames}
    study = write_study(tmp_path, workloads=[{**STUDY["workloads"][0], "data": data}])
    blocked = ["--study", str(study), "--storage", str(study)]
    assert main(blocked) == 2
    assert "TUNEBENCH_TEST_DATA" in capsys.readouterr().err
    assert main([*blocked, "--set", f"TUNEBENCH_TEST_DATA={tmp_path}"]) == 2
    assert f"{tmp_path}/train.xyz is none" in capsys.readouterr().err


def test_a_study_whose_files_go_to_an_address_has_its_run_on_the_head(tmp_path: Path) -> None:
    run = run_folder(write_study(tmp_path), "s3://bucket/studies")
    assert run.parent == Path("runs")
    command = driver_command(Path("s.yaml"), run, "auto", 0, "s3://bucket/studies")
    assert command[-2:] == ["--storage", "s3://bucket/studies"]


def test_gpus_are_held_by_a_process_beside_the_driver(tmp_path: Path) -> None:
    plain = driver_command(Path("s.yaml"), tmp_path, "auto", 0)
    held = driver_command(Path("s.yaml"), tmp_path, "auto", 8)
    assert held[1:6] == ["-m", "tunebench.cluster.demand", "--gpus", "8", "--address"]
    assert held[held.index("--") + 1 :] == plain


def test_several_drivers_are_started_by_one_command(tmp_path: Path) -> None:
    one = driver_command(Path("s.yaml"), tmp_path, "auto", 0)
    assert driver_command(Path("s.yaml"), tmp_path, "auto", 0, drivers=12) == [*one, "--drivers", "12"]


def test_waiting_says_what_did_not_come(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not within 0 s: the impossible"):
        wait_for(lambda: False, 0.0, "the impossible")


def test_a_job_of_slurm_is_told_that_its_driver_ends_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert "the driver goes on by itself" in _how_to_go_on(tmp_path, tmp_path / "launch.log")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert "the driver ends with job 17" in _how_to_go_on(tmp_path, tmp_path / "launch.log")
