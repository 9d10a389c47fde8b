"""Who was given how many trials, steps and device-seconds, and how the trials ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from analysis.load import Run
from analysis.step_costs import total_calibrated_s
from tunebench.study.record import Reason, Stage, TrialRecord


@dataclass(frozen=True, kw_only=True)
class ArmLedger:
    """What one arm was given in one stage; stopped and failed work is part of it.

    Attributes:
        trials: trials in the journal, ended or not.
        steps: optimizer steps done, those at shorter horizons and those that a kill or a crash took among them.
        device_s: device-seconds of training as spent, without evaluation; a slot of a cohort has its share of a step.
        calibrated_s: steps times solo step times; None where `calibration.json` does not cover the trials.
        wall_s: seconds of training by the clock on the wall.
        reasons: number of ended trials by reason.
        unfinished: trials that have not ended.
    """

    workload: str
    optimizer: str
    stage: Stage
    trials: int
    steps: int
    device_s: float
    calibrated_s: float | None
    wall_s: float
    reasons: dict[Reason, int]
    unfinished: int

    @property
    def failed(self) -> int:
        """Ended trials that neither reached the horizon nor were stopped by ASHA."""
        return sum(count for reason, count in self.reasons.items() if reason in FAILURES)


FAILURES = tuple(reason for reason in Reason if reason not in (Reason.FINISHED, Reason.STOPPED_ASHA))


def arm_ledger(run: Run, workload: str, optimizer: str, stage: Stage) -> ArmLedger:
    """Add up what an arm's trials of one stage were given."""
    trials = run.arm(workload, optimizer, stage)
    return ArmLedger(
        workload=workload,
        optimizer=optimizer,
        stage=stage,
        trials=len(trials),
        steps=int(_total(trials, "steps") + _total(trials, "lost_steps")),
        device_s=_total(trials, "device_s"),
        calibrated_s=total_calibrated_s(run, trials),
        wall_s=_total(trials, "wall_s"),
        reasons={reason: count for reason in Reason if (count := sum(trial.reason is reason for trial in trials))},
        unfinished=sum(trial.reason is None for trial in trials),
    )


def ledgers(run: Run) -> tuple[ArmLedger, ...]:
    """The ledger of every arm and stage, workload by workload."""
    return tuple(
        arm_ledger(run, workload, optimizer, stage)
        for workload in run.workloads
        for optimizer in run.optimizers
        for stage in Stage
    )


def spread(values: Iterable[float]) -> float | None:
    """Largest over smallest of the arms' shares; ``None`` when an arm was given nothing."""
    shares = list(values)
    if not shares or min(shares) <= 0.0:
        return None
    return max(shares) / min(shares)


def _total(trials: Sequence[TrialRecord], entry: str) -> float:
    return float(sum(trial.ledger.get(entry, 0.0) for trial in trials))
