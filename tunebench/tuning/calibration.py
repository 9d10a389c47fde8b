"""`tunebench calibrate`: the solo step times of a run's arms, measured while nobody else works on the run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tunebench.study.errors import RunError
from tunebench.study.journal import read_trials
from tunebench.study.record import JOURNAL
from tunebench.study.resolve import ResolvedStudy, load_run, resolve
from tunebench.study.run_copy import named_storage
from tunebench.study.step_times import (
    CALIBRATION,
    LARGEST_SPREAD,
    UNSTEADY,
    Calibration,
    DeviceTimes,
    add_tables,
    read_calibration,
)
from tunebench.tuning.console_lines import say
from tunebench.tuning.devices import kind_here
from tunebench.tuning.errand import Errand
from tunebench.tuning.preparation import prepare_workloads
from tunebench.tuning.ray_environment import leaving_ray, set_ray_environment
from tunebench.tuning.run_folder import check_data, default_run_folder, held_run
from tunebench.workloads.data import graphs_folder
from tunebench.workloads.stored_data import store_prepared


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """How to measure.

    Attributes:
        run: the run directory; None for that of the study, as `tunebench run` would name it.
        address: Ray cluster of which each kind of device is measured; None for the device at hand.
        rounds: times that every step is measured.
        seconds: what one measurement takes at least.
    """

    run: Path | None = None
    address: str | None = None
    rounds: int = 5
    seconds: float = 0.5


def calibrate_run(source: Path, options: CalibrateOptions, console: Console) -> tuple[Path, Calibration]:
    """Measure, and write RUN/calibration.json with the new tables in place of those of the same kinds of device.

    Args:
        source: a run directory or a study file.
        options: how to measure.
        console: takes progress and what failed, a line each.

    Returns:
        The file and all that is in it.

    Raises:
        StudyError: the study is not valid, or asks for a GPU where there is none.
        RunError: the directory belongs to another study or other data, a driver works on it, its calibration.json
            cannot be read, the cluster has no device to measure on, or nothing could be measured on a device; tables of
            other kinds stay as they are.
    """
    resolved, run = _found(source, options.run)
    storage = None if options.address is None else named_storage(run, None)
    with held_run(resolved, run, storage):
        calibration = _read(run, resolved.hash)  # before minutes of measuring, not after them
        data = prepare_workloads(resolved, console)
        check_data(run, data)
        errand = Errand(
            resolved=resolved,
            data=data,
            searched=searched_by_arm(run),
            run=run,
            storage=storage,
            rounds=options.rounds,
            seconds=options.seconds,
        )
        measured = _here(errand, console) if options.address is None else _in_cluster(errand, options.address, console)
        for table in measured:
            _judge(table, run, console)
            calibration = add_tables(run, resolved.hash, [table])
        assert calibration is not None
        return run / CALIBRATION, calibration


def _read(run: Path, study_hash: str) -> Calibration | None:
    try:
        return read_calibration(run, study_hash)
    except RunError as error:
        raise RunError(f"{run}: {error}; delete the file to measure anew") from error


def _here(errand: Errand, console: Console) -> Iterator[DeviceTimes]:
    from tunebench.engine.solo import SoloPlan, solo_steps  # imports torch and NequIP

    kind = kind_here(errand.resolved.study.resources.device)
    plan = SoloPlan(rounds=errand.rounds, seconds=errand.seconds, cache=graphs_folder(), accelerator=kind)
    yield solo_steps(errand.resolved, errand.data, errand.searched, plan, partial(say, console))


def _in_cluster(errand: Errand, address: str, console: Console) -> Iterator[DeviceTimes]:
    if errand.storage is not None:
        for prepared in errand.data.values():
            store_prepared(errand.storage, prepared)
    set_ray_environment(address)
    from tunebench.tuning.step_measurement import measured_kinds  # imports Ray, which reads its environment now

    with leaving_ray():
        yield from measured_kinds(errand, address, console)


def _judge(table: DeviceTimes, run: Path, console: Console) -> None:
    """Refuse an empty table, and say where one is unsteady."""
    if not table.steps:
        allowed = "at least one; the lines above say why"
        raise RunError(f"{run}: found no step that could be measured on {table.device}, allowed: {allowed}")
    unsteady = sum(step.spread > LARGEST_SPREAD for step in table.steps)
    if unsteady:
        say(console, f"warning: {table.device}: {unsteady} of {len(table.steps)} entries {UNSTEADY}")


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
