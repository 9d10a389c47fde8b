"""A `tunebench run` in a process of its own, and all processes that come of it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.tuning.conftest import COMMAND, python_path
from tunebench.study.record import CHECKPOINTS

COHORT, POOL, RECEPTION = "CohortActor", "ray::Pool", "ray::Reception"
KINDS = {COHORT, POOL, RECEPTION}


class Driver:
    """Runs a study without a report.

    Args:
        study: the file, or the run directory of a run that goes on.
        run: the run directory.
        options: of the command.
        site: folder whose `sitecustomize` each of its processes imports.
    """

    def __init__(self, study: Path, run: Path, *options: str, site: Path | None = None) -> None:
        self.run, self._mark = run, f"TUNEBENCH_TEST={uuid.uuid4().hex}"
        name, value = self._mark.split("=")
        path = {"PYTHONPATH": python_path(site)} if site else {}
        where = [str(study)] if study == run else [str(study), "--run", str(run)]
        self.process = subprocess.Popen(
            [*COMMAND, "run", *where, "--no-report", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={**os.environ, name: value, **path},
        )

    def processes(self, name: str) -> list[int]:
        """Ids of processes of this run whose title holds a name."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and self._mark.encode() in (folder / "environ").read_bytes():
                    found += [int(folder.name)] if name.encode() in (folder / "cmdline").read_bytes() else []
            except OSError:  # it has just ended
                continue
        return found

    def kinds(self) -> set[str]:
        """Which of its cohorts, its pool and its reception are there."""
        return {name for name in KINDS if self.processes(name)}

    def wait(self, condition: Callable[[], object], timeout_s: float = 300.0) -> None:
        """Wait for something to become true while the driver runs."""
        until = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"the run ended: {self.process.communicate()[0][-2000:]}"
            assert time.monotonic() < until, "it never came true"
            time.sleep(0.1)

    def saved(self) -> dict[str, float]:
        """Time at which each trial's checkpoint was last written."""
        found = {}
        for file in (self.run / CHECKPOINTS).glob("*/last.pt"):
            with suppress(FileNotFoundError):  # the trial has just ended
                found[file.parent.name] = file.stat().st_mtime
        return found

    def finish(self, timeout_s: float = 600.0) -> tuple[int, str]:
        """Let it run to its end; returns its exit code and what it said."""
        said, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, said

    def end(self) -> None:
        """Leave no process behind, whatever the test did."""
        for process in [self.process.pid, *self.processes("")]:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.communicate()
