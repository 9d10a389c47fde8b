"""Steps are measured for a cap on a busy device: what `tunebench status` says of it, and what the verbs do to it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.study.test_step_times import solo_step, table
from tests.tuning.conftest import python_path, write_study
from tunebench.study.control import Wish, ask
from tunebench.study.notice import NOTICE, posted
from tunebench.study.resolve import resolve

MEASURES_WHEN_TOLD = """
import os, sys, time, types
from pathlib import Path
if any("default_worker" in a for a in sys.argv):
    def solo_steps(*arguments):
        from tunebench.study.step_times import DeviceTimes
        folder = Path({folder!r})
        (folder / "process").write_text(str(os.getpid()))
        while not (folder / "measure").exists():
            time.sleep(0.05)
        return DeviceTimes.model_validate_json((folder / "table.json").read_bytes())
    solo = types.ModuleType("tunebench.engine.solo")
    solo.SoloPlan, solo.solo_steps = dict, solo_steps
    sys.modules["tunebench.engine.solo"] = solo
"""

DRIVER = """
import sys, time
from pathlib import Path
from rich.console import Console
from tunebench.tuning.ray_environment import set_ray_environment
set_ray_environment(None)
import ray
from tunebench.study.control import Wish, ask
from tunebench.study.errors import Interrupted
from tunebench.study.resolve import resolve
from tunebench.tuning import step_measurement
from tunebench.tuning.errand import Errand
from tunebench.tuning.stage import join_ray

step_measurement._TOLD_AFTER_S = 2.0
folder, run = Path(sys.argv[1]), Path(sys.argv[1], "run")
resolved = resolve(folder / "study.yaml")
console = Console(file=sys.stdout, width=300)
join_ray(None, resolved.study.resources, run, None, console)

class Busy:
    pass

busy = ray.remote(num_cpus=1)(Busy).remote()
ray.get(busy.__ray_ready__.remote())
for attempt in range(3):
    if attempt == 2:
        ray.kill(busy)
    try:
        errand = Errand(resolved=resolved, data={}, searched={}, run=run)
        found = step_measurement.measured_steps(errand, None, console)
        print("measured", found.date, flush=True)
    except Interrupted as error:
        print(error, flush=True)
        ask(run, Wish.RESUME)
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory of a study whose trials take every core, and what its processes import."""
    study = resolve(write_study(tmp_path))
    (tmp_path / "run").mkdir()
    study.write(tmp_path / "run")
    (tmp_path / "table.json").write_text(table(solo_step("adamw", [1.0])).model_dump_json())
    (tmp_path / "sitecustomize.py").write_text(MEASURES_WHEN_TOLD.format(folder=str(tmp_path)))
    return tmp_path / "run"


@pytest.fixture
def driver(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Measures three times: while somebody has the device, still so, and when it is free."""
    environment = {**os.environ, "PYTHONPATH": python_path(run.parent)}
    command = [sys.executable, "-c", DRIVER, str(run.parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield process
        process.kill()


def wait(condition: Callable[[], object], timeout_s: float = 120.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.05)


def test_who_measures_waits_for_a_device_and_is_cancelled_drained_paused_and_resumed(
    run: Path, driver: subprocess.Popen[str]
) -> None:
    assert driver.stdout is not None
    waits = "waiting for a free device to measure steps on"
    assert driver.stdout.readline().startswith("measuring steps for the cap on device-seconds on a device of this ma")
    assert driver.stdout.readline() == f"{waits}\n", "it is told on the screen, too, where it takes long"
    assert posted(run) == waits
    ask(run, Wish.CANCEL)
    assert driver.stdout.readline() == f"{run}: cancelled; `tunebench resume` lets `tunebench run` go on\n"
    assert not (run / NOTICE).exists()

    driver.stdout.readline()
    ask(run, Wish.DRAIN)
    while (line := driver.stdout.readline()) == f"{waits}\n":
        continue
    assert line == f"{run}: drained; `tunebench run` goes on\n"

    process = run.parent / "process"
    wait(process.exists)
    assert posted(run) == "measuring steps for the cap on device-seconds"
    ask(run, Wish.PAUSE)
    wait(lambda: posted(run) == "paused, without a device")
    first = Path("/proc", process.read_text())
    wait(lambda: not first.exists())
    process.unlink()
    ask(run, Wish.RESUME)
    wait(process.exists)
    (run.parent / "measure").touch()
    said, _ = driver.communicate(timeout=120)
    assert (driver.returncode, said.splitlines()[-1]) == (0, "measured 2026-11-22T08:00:00+00:00")
    assert not (run / NOTICE).exists()
