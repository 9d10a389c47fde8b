from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from tunebench.study.journal import read_trials
from tunebench.study.record import TrialRecord

COMMAND = [str(Path(sys.executable).parent / "tunebench")]

STUDY: dict[str, Any] = {
    "name": "small",
    "seed": 5,
    "workloads": [
        {
            "name": "ethanol",
            "data": {
                "source": "xtb",
                "system": "ethanol",
                "ood_temperature_kelvin": 600.0,
                "equilibration_fs": 25.0,
                "interval_fs": 10.0,
                "frames": {"train": 10, "val": 4, "test": 4, "ood": 3},
            },
            "model": {"family": "allegro", "r_max_angstrom": 4.0},
            "batch_size": 2,
            "max_steps": 12,
            "evaluate_every_steps": 3,
        }
    ],
    "optimizers": ["adamw", "soap"],
    "resources": {"cpus_per_trial": os.cpu_count()},  # one cohort: each takes seconds to start
    "tune": {"trials_per_arm": 3, "asha": {"grace_steps": 3, "reduction_factor": 2, "sentinels": 0}},
    "confirm": {"top_k": 1, "seeds": 2},
    "waive": {"F11": "a test of the machinery", "F12": "a test of the machinery"},
}
TRIALS = 2 * 3 + 2 * 2

# What `finished_run` has otherwise: rungs at 6 and 12 steps, so that a kill finds somebody between two of them; a
# sentinel in each arm; few tenants, because each process takes seconds to start; and a seed whose learning rates are
# so small that rounding stays rounding.
FINISHED: dict[str, Any] = {
    "seed": 299,
    "workloads": [{**STUDY["workloads"][0], "max_steps": 24, "evaluate_every_steps": 6}],
    "resources": {**STUDY["resources"], "concurrent_trials": 2},
    "tune": {"trials_per_arm": 3, "asha": {"grace_steps": 6, "reduction_factor": 2, "sentinels": 1}},
}


def python_path(folder: Path) -> str:
    """A value of PYTHONPATH that puts a folder before what is there already."""
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


def write_study(folder: Path, **changes: Any) -> Path:
    """A study that trains ten trials of a tiny Allegro; top-level sections are replaced by `changes`."""
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump({**STUDY, **changes}))
    return file


def tunebench(*arguments: str | Path, timeout: float = 600.0, check: bool = True, **environment: str) -> Any:
    """Run the installed command to its end."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def ended(run: Path) -> Mapping[str, TrialRecord]:
    """Closed trials of a run by id; empty where there is no journal yet."""
    try:
        return {trial.key.trial_id: trial for trial in read_trials(run) if trial.reason is not None}
    except FileNotFoundError:
        return {}


def ranking_of(run: Path) -> dict[str, Any]:
    """The run's ranking.json."""
    content: dict[str, Any] = json.loads((run / "report" / "ranking.json").read_text())
    return content


@pytest.fixture(scope="session")
def finished_study(shared_folder: Path) -> Path:
    """The file of the study that `finished_run` is a run of."""
    folder = shared_folder / "finished"
    folder.mkdir(exist_ok=True)
    return write_study(folder, **FINISHED)


@pytest.fixture(scope="session")
def finished_run(shared_folder: Path, finished_study: Path) -> Path:
    """A small study run to its end by the installed command, once for all workers."""
    run = finished_study.parent / "run"
    with FileLock(shared_folder / "finished.lock"):
        if not (run / "report" / "ranking.json").exists():
            tunebench("run", finished_study, "--run", run)
    return run
