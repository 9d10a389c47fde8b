"""A whole study by `tunebench run` in a process of its own: what benchmarks of studies have in common."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tunebench.study.record import Reason, TrialRecord
from tunebench.study.resolve import resolve
from tunebench.workloads.data import prepare


def read_study(file: Path) -> dict[str, Any]:
    """What a study file says, to be changed and run."""
    study: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return study


def prepare_data(file: Path) -> None:
    """Make the data of a study's workloads, or find them already made."""
    for workload in resolve(file).study.workloads:
        prepare(workload.data)


def run_changed(file: Path, study: Mapping[str, Any], run: Path, environment: Mapping[str, str] | None = None) -> float:
    """Run a changed study without its report; returns seconds from the start of `tunebench run` to its end.

    Args:
        file: the study before it was changed, beside which it is written: its paths are relative.
        study: what is run.
        run: the run directory.
        environment: variables of the process beside this one's.

    Raises:
        subprocess.CalledProcessError: the run failed; what it printed is on the screen.
    """
    changed = file.resolve().with_name(f".{file.stem}-{uuid.uuid4().hex[:8]}.yaml")
    changed.write_text(yaml.safe_dump(dict(study), sort_keys=False), encoding="utf-8")
    main = "from tunebench.cli import main; main()"
    command = [sys.executable, "-c", main, "run", str(changed), "--run", str(run), "--no-report"]
    began = time.perf_counter()
    try:
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, **(environment or {})})
        return time.perf_counter() - began
    finally:
        changed.unlink()


def trial_steps(records: Sequence[TrialRecord]) -> int:
    """Training steps of all trials."""
    return sum(int(record.ledger["steps"]) for record in records)


def failures(records: Sequence[TrialRecord]) -> int:
    """Trials that diverged, crashed or ran out of memory or time."""
    return sum(record.reason not in (Reason.FINISHED, Reason.STOPPED_ASHA) for record in records)
