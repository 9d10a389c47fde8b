"""A disk that fills up in the middle of a study stops the run, and nothing that counts is lost."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tuning.conftest import COMMAND, TRIALS, ended, tunebench
from tests.tuning.test_kill import decisions
from tunebench.study.files import KEPT_FREE_BYTES
from tunebench.study.record import CHECKPOINTS

pytestmark = pytest.mark.skipif(
    not os.environ.get("TUNEBENCH_FULL_DISK"), reason="takes minutes: TUNEBENCH_FULL_DISK=1 runs it"
)

_SIZE = "240m"  # a run does not start with less than 200 MiB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, which can be filled."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("no right to mount a small disk here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path) -> Path:
    """Leave less room than checkpoints may take."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - KEPT_FREE_BYTES // 2)
    return filler


def test_a_study_whose_disk_fills_up_stops_and_goes_on_to_the_same_decisions(
    small_disk: Path, finished_study: Path, finished_run: Path
) -> None:
    study, run = finished_study, small_disk / "run"
    command = [*COMMAND, "run", str(study), "--run", str(run), "--no-report"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as driver:
        while not any((run / CHECKPOINTS).glob("*/last.pt")):
            assert driver.poll() is None, "it ended before it had written a checkpoint"
        filler = fill(small_disk)
        _, said = driver.communicate(timeout=300)
    assert driver.returncode not in (0, 2)
    assert said.strip().splitlines()[-1] == f"tunebench: {run}: the disk is full; free some space and run again"
    before = ended(run)
    assert len(before) < TRIALS
    filler.unlink()

    tunebench("run", study, "--run", run, "--no-report")
    after = ended(run)
    assert all(after[name] == trial for name, trial in before.items())
    assert decisions(run) == decisions(finished_run)
