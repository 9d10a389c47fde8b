"""`tunebench calibrate`: the solo step times of a run's arms, measured while nobody else works on the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from tunebench.study.errors import RunError
from tunebench.study.journal import read_trials
from tunebench.study.record import JOURNAL
from tunebench.study.resolve import ResolvedStudy, load_run, resolve
from tunebench.study.step_times import LARGEST_SPREAD, UNSTEADY, Calibration, write_calibration
from tunebench.tuning.console_lines import say
from tunebench.tuning.preparation import prepare_workloads
from tunebench.tuning.run_folder import check_data, default_run_folder, held_run
from tunebench.workloads.data import graphs_folder

"""Folder of traces and compiled graphs in the cache, which cohorts share."""


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """How to measure.

    Attributes:
        run: the run directory; None for that of the study, as `tunebench run` would name it.
        rounds: times that every step is measured.
        seconds: what one measurement takes at least.
    """

    run: Path | None = None
    rounds: int = 5
    seconds: float = 0.5


def calibrate_run(source: Path, options: CalibrateOptions, console: Console) -> tuple[Path, Calibration]:
    """Measure and write RUN/calibration.json in place of an earlier one; returns its path and content.

    Args:
        source: a run directory or a study file.
        options: how to measure.
        console: takes progress and what failed, a line each.

    Raises:
        StudyError: the study is not valid, or asks for a GPU where there is none.
        RunError: the directory belongs to another study or other data, a driver works on it, or nothing could be
            measured, which leaves an earlier table as it is.
    """
    resolved, run = _found(source, options.run)
    with held_run(resolved, run):
        data = prepare_workloads(resolved, console)
        check_data(run, data)
        from tunebench.engine.solo import SoloPlan, solo_steps  # imports torch and NequIP

        plan = SoloPlan(rounds=options.rounds, seconds=options.seconds, cache=graphs_folder())
        table = solo_steps(resolved, data, searched_by_arm(run), plan, lambda line: say(console, line))
        if not table.steps:
            raise RunError(
                f"{run}: found no step that could be measured, allowed: at least one; the lines above say why"
            )
        unsteady = sum(step.spread > LARGEST_SPREAD for step in table.steps)
        if unsteady:
            say(console, f"warning: {unsteady} of {len(table.steps)} entries {UNSTEADY}")
        return write_calibration(run, table), table


def _found(source: Path, run: Path | None) -> tuple[ResolvedStudy, Path]:
    if source.is_dir():
        return load_run(source), run or source
    resolved = resolve(source)
    return resolved, run or default_run_folder(resolved, Path("runs"))


def searched_by_arm(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Searched hyperparameters of a run's trials by arm; empty where it has not begun."""
    found: dict[str, list[dict[str, Any]]] = {}
    for trial in read_trials(run) if (run / JOURNAL).is_file() else []:
        found.setdefault(trial.key.arm, []).append(trial.params)
    return found
