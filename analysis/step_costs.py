"""What trials cost in calibrated device-seconds: steps times the solo step time of their arm and settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any

from analysis.load import Run
from tunebench.study.record import TrialRecord
from tunebench.study.spec import Engine
from tunebench.study.step_times import CALIBRATION, LARGEST_SPREAD, UNSTEADY, StepTime, cost_settings

TIMED_PACKAGES = ("tunebench", "torch", "nequip", "nequip-allegro", "e3nn")
"""Packages that decide how long a step takes."""


def step_time(run: Run, trial: TrialRecord) -> StepTime | None:
    """Mean seconds of a trial's steps alone on the device; None where the run's table does not have them."""
    space = run.resolved.spaces.get(trial.key.optimizer)
    if run.calibration is None or space is None:
        return None
    return run.calibration.step_time(space, trial.key.workload, trial.params)


def calibrated_s(run: Run, trial: TrialRecord) -> float | None:
    """Calibrated device-seconds of a trial's steps, without evaluation; None where the table does not have them.

    Steps that a kill or a crash took are among them: they were paid for.
    """
    steps, cost = trial.ledger.get("steps", 0.0) + trial.ledger.get("lost_steps", 0.0), step_time(run, trial)
    return steps * cost.median_s if cost is not None else None


def total_calibrated_s(run: Run, trials: Sequence[TrialRecord]) -> float | None:
    """Calibrated device-seconds of several trials; None where some trial that made steps has none."""
    spent = [calibrated_s(run, trial) for trial in trials if trial.ledger.get("steps")]
    known = [seconds for seconds in spent if seconds is not None]
    return sum(known) if run.calibration is not None and len(known) == len(spent) else None


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
    """The axis of a workload: calibrated where the table covers all its trials, so that all arms are timed alike."""
    if run.calibration is None:
        return TimeAxis(run=run, calibrated=False)
    own = [trial for trial in run.trials if trial.key.workload == workload and _belongs(run, trial)]
    return TimeAxis(run=run, calibrated=bool(own) and all(step_time(run, trial) is not None for trial in own))


def untimed(run: Run) -> Iterator[str]:
    """One line for each reason why times of this run are not those of steps made alone, under its own conditions."""
    if run.calibration is None:
        if any(trial.engine == "cohort" for trial in run.trials):
            command = f"`tunebench calibrate {run.path}` makes it"
            yield f"no {CALIBRATION} that can be read, and slots of a cohort share their steps; {command}"
        return
    missing = dict.fromkeys(
        _arm_and_settings(run, trial) for trial in run.trials if _belongs(run, trial) and step_time(run, trial) is None
    )
    yield from (
        f"{name}: {CALIBRATION} has no step time of it; `tunebench calibrate {run.path}` measures anew"
        for name in missing
    )
    unsteady = [step for step in run.calibration.steps if step.spread > LARGEST_SPREAD]
    if unsteady:
        yield f"{len(unsteady)} of {len(run.calibration.steps)} entries of {CALIBRATION} {UNSTEADY}"
    yield from _other_conditions(run, run.calibration.environment)


def _belongs(run: Run, trial: TrialRecord) -> bool:
    return trial.key.optimizer in run.optimizers and trial.key.workload in run.workloads


def _arm_and_settings(run: Run, trial: TrialRecord) -> str:
    settings = cost_settings(run.resolved.spaces[trial.key.optimizer], trial.params)
    return trial.key.arm + (f" {json.dumps(settings)}" if settings else "")


def _other_conditions(run: Run, timed: dict[str, Any]) -> Iterator[str]:
    """What differs between the environments of the run and of the table."""
    own = reduce(or_, run.environment.get("later", []), run.environment)
    for name in TIMED_PACKAGES:
        found, allowed = ((part.get("packages") or {}).get(name) for part in (timed, own))
        if found and allowed and found != allowed:
            yield f"steps were timed with {name} {found}, trials ran with {allowed}"
    assert run.calibration is not None
    device = run.calibration.device
    others = own.get("gpus", []) if run.calibration.kind == "cuda" else [own["processor"]] if "processor" in own else []
    if others and not any(device in other for other in others):
        yield f"steps were timed on {device}, the run began on {', '.join(others)}"
