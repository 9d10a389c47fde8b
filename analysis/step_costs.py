"""What trials cost in calibrated device-seconds: steps times the solo step time of their arm and settings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

from analysis.load import Run
from tunebench.study.record import TrialRecord
from tunebench.study.spec import Engine
from tunebench.study.step_times import (
    CALIBRATION,
    LARGEST_SPREAD,
    UNSTEADY,
    Calibration,
    DeviceTimes,
    StepTime,
    cost_settings,
)

TIMED_PACKAGES = ("tunebench", "torch", "nequip", "nequip-allegro", "e3nn")
"""Packages that decide how long a step takes."""


def step_time(run: Run, trial: TrialRecord) -> StepTime | None:
    """Mean seconds of a trial's steps alone on its kind of device; None where the run's tables do not have them."""
    space = run.resolved.spaces.get(trial.key.optimizer)
    if run.calibration is None or space is None:
        return None
    return run.calibration.step_time(space, trial.key.workload, trial.params, trial.device)


def calibrated_s(run: Run, trial: TrialRecord) -> float | None:
    """Calibrated device-seconds of a trial's steps, without evaluation; None where no table has them.

    Steps that a kill or a crash took are among them: they were paid for.
    """
    return _priced(trial, step_time(run, trial))


def total_calibrated_s(run: Run, trials: Sequence[TrialRecord]) -> float | None:
    """Calibrated device-seconds of several trials; None where some trial that made steps has none.

    Where the tables say what all would cost on one kind of device, they are counted in its seconds: who was given how
    much must not depend on which devices were free.
    """
    spent = [_in_reference_s(run, trial) for trial in trials if trial.ledger.get("steps")]
    known = [seconds for seconds in spent if seconds is not None]
    return sum(known) if run.calibration is not None and len(known) == len(spent) else None


def _in_reference_s(run: Run, trial: TrialRecord) -> float | None:
    space = run.resolved.spaces.get(trial.key.optimizer)
    if run.reference is None or space is None:
        return calibrated_s(run, trial)
    return _priced(trial, run.reference.step_time(space, trial.key.workload, trial.params))


def _priced(trial: TrialRecord, cost: StepTime | None) -> float | None:
    steps = trial.ledger.get("steps", 0.0) + trial.ledger.get("lost_steps", 0.0)
    return steps * cost.median_s if cost is not None else None


@dataclass(frozen=True, kw_only=True)
class TimeAxis:
    """What the seconds in a workload's figures are.

    Attributes:
        run: the run.
        calibrated: steps times solo step times; else device-seconds as they were spent, which for the slots of a
            cohort are shares of steps made together.
    """

    run: Run
    calibrated: bool

    @property
    def words(self) -> str:
        """Name of the axis."""
        return "calibrated device-seconds" if self.calibrated else "device-seconds"

    def of_trial(self, trial: TrialRecord) -> float:
        """Seconds of all steps of a trial."""
        seconds = calibrated_s(self.run, trial) if self.calibrated else trial.ledger.get("device_s")
        return seconds or 0.0

    def of_kept_steps(self, trial: TrialRecord) -> float:
        """Seconds of a trial's steps without those that a kill or a crash took, which another run need not pay."""
        steps = trial.ledger.get("steps", 0.0)
        made = steps + trial.ledger.get("lost_steps", 0.0)
        return self.of_trial(trial) * steps / made if made else 0.0

    def are_of_one(self, trials: Sequence[TrialRecord]) -> bool:
        """Whether these seconds tell trials apart: those of steps made alone, not shares of a cohort's steps."""
        return self.calibrated or all(trial.engine == Engine.LIGHTNING for trial in trials)


def time_axis(run: Run, workload: str) -> TimeAxis:
    """The axis of a workload: calibrated where the tables cover all its trials, so that all arms are timed alike."""
    if run.calibration is None:
        return TimeAxis(run=run, calibrated=False)
    own = [trial for trial in run.trials if trial.key.workload == workload and _belongs(run, trial)]
    own = [trial for trial in own if _has_begun(trial) or run.calibration.of(trial.device) is not None]
    return TimeAxis(run=run, calibrated=bool(own) and all(step_time(run, trial) is not None for trial in own))


def untimed(run: Run) -> Iterator[str]:
    """One line for each reason why times of this run are not those of steps made alone, under its own conditions."""
    if run.calibration is None:
        if any(trial.engine == "cohort" for trial in run.trials):
            command = f"`tunebench calibrate {run.path}` makes it"
            yield f"no {CALIBRATION} that can be read, and slots of a cohort share their steps; {command}"
        return
    own = [trial for trial in run.trials if _belongs(run, trial)]
    yield from _kinds_without_a_table(run, run.calibration, own)
    of_known = [trial for trial in own if run.calibration.of(trial.device) is not None]
    missing = dict.fromkeys(_arm_and_settings(run, trial) for trial in of_known if step_time(run, trial) is None)
    yield from (
        f"{name}: {CALIBRATION} has no step time of it; `tunebench calibrate {run.path}` measures anew"
        for name in missing
    )
    used = [table for table in run.calibration.tables if any(run.calibration.of(t.device) is table for t in of_known)]
    steps = [step for table in used for step in table.steps]
    unsteady = sum(step.spread > LARGEST_SPREAD for step in steps)
    if unsteady:
        yield f"{unsteady} of {len(steps)} entries of {CALIBRATION} {UNSTEADY}"
    known = any(trial.device for trial in of_known)
    for table in used:
        yield from _other_conditions(run, table, compares_device=not known)


def _kinds_without_a_table(run: Run, calibration: Calibration, trials: Sequence[TrialRecord]) -> Iterator[str]:
    begun = Counter(trial.device or "" for trial in trials if trial.ledger.get("steps"))
    there = ", ".join(table.accelerator or table.device for table in calibration.tables)
    for kind, count in sorted(begun.items()):
        if calibration.of(kind) is None:
            what = f"devices of kind {kind}" if kind else "devices of a kind that was not written down"
            mend = f"`tunebench calibrate {run.path}` on such a device, or with --address on its cluster, adds them"
            yield f"{count} trials were on {what}, {CALIBRATION} has steps on {there}; {mend}"


def _belongs(run: Run, trial: TrialRecord) -> bool:
    return trial.key.optimizer in run.optimizers and trial.key.workload in run.workloads


def _has_begun(trial: TrialRecord) -> bool:
    return trial.device is not None or bool(trial.ledger.get("steps"))


def _arm_and_settings(run: Run, trial: TrialRecord) -> str:
    settings = cost_settings(run.resolved.spaces[trial.key.optimizer], trial.params)
    return trial.key.arm + (f" {json.dumps(settings)}" if settings else "")


def _other_conditions(run: Run, table: DeviceTimes, *, compares_device: bool) -> Iterator[str]:
    """What differs between the environments of the run and of a table."""
    own = reduce(or_, run.environment.get("later", []), run.environment)
    for name in TIMED_PACKAGES:
        found, allowed = ((part.get("packages") or {}).get(name) for part in (table.environment, own))
        if found and allowed and found != allowed:
            yield f"steps were timed with {name} {found}, trials ran with {allowed}"
    others = own.get("gpus", []) if table.kind == "cuda" else [own["processor"]] if "processor" in own else []
    if compares_device and others and not any(table.device in other for other in others):
        yield f"steps were timed on {table.device}, the run began on {', '.join(others)}"
