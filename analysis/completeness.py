"""What a run still lacks: trials that have not ended and confirm trials that were never planned."""

from __future__ import annotations

from collections.abc import Sequence

from analysis.load import Run
from analysis.selection import confirm_candidates
from tunebench.study.record import Reason, Stage, TrialRecord


def missing_work(run: Run, workload: str) -> tuple[str, ...]:
    """One line per arm and stage that is not complete; empty when the workload is finished."""
    return tuple(line for optimizer in run.optimizers for line in _missing_of_arm(run, workload, optimizer))


def _missing_of_arm(run: Run, workload: str, optimizer: str) -> list[str]:
    arm = f"{workload}/{optimizer}"
    tune = run.arm(workload, optimizer, Stage.TUNE)
    planned = run.planned(workload, optimizer)
    lines = []
    ended = sum(trial.reason is not None for trial in tune)
    if ended < planned:
        lines.append(f"{arm}: {ended} of {planned} tune trials have ended")
    confirm_ended = sum(trial.reason is not None for trial in run.arm(workload, optimizer, Stage.CONFIRM))
    confirm_planned = expected_confirm_trials(run, workload, optimizer)
    if confirm_ended < confirm_planned:
        lines.append(f"{arm}: {confirm_ended} of {confirm_planned} confirm trials have ended")
    return lines


def expected_confirm_trials(run: Run, workload: str, optimizer: str) -> int:
    """Confirm trials that the study owes an arm; none when the tune stage left no configuration to confirm.

    Until the tune stage has ended this is what the study promises.
    """
    seeds, top_k = run.study.confirm.seeds, run.study.confirm.top_k
    planned = len(confirm_candidates(run, workload, optimizer))
    tune = run.arm(workload, optimizer, Stage.TUNE)
    if not tune_has_ended(run, workload, optimizer, tune):
        return seeds * max(min(top_k, run.planned(workload, optimizer)), planned)
    return seeds * max(min(top_k, sum(map(can_be_confirmed, tune))), planned)


def tune_has_ended(run: Run, workload: str, optimizer: str, tune: Sequence[TrialRecord]) -> bool:
    """Whether every planned tune trial of an arm has ended."""
    return len(tune) >= run.planned(workload, optimizer) and all(trial.reason is not None for trial in tune)


def left_no_candidate(run: Run, workload: str, optimizer: str) -> bool:
    """Whether an arm's tune stage ended without one configuration that could be confirmed."""
    tune = run.arm(workload, optimizer, Stage.TUNE)
    if any(map(can_be_confirmed, tune)) or run.arm(workload, optimizer, Stage.CONFIRM):
        return False
    return tune_has_ended(run, workload, optimizer, tune)


def can_be_confirmed(trial: TrialRecord) -> bool:
    """Whether a tune trial may enter the confirm stage: it finished, or was stopped while it still had a value."""
    return trial.reason in (Reason.FINISHED, Reason.STOPPED_ASHA) and trial.value is not None
