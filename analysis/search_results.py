"""What each arm's search offers for re-selection: its configurations in the order in which selection prefers them."""

from __future__ import annotations

import math

import numpy as np

from analysis.load import Run
from analysis.reselection import Search
from analysis.selection import POLICY, candidate_order, chosen_readout, confirm_candidates, error_of
from tunebench.study.record import Metric, Reason, Split, Stage, TrialRecord


def search_of(run: Run, workload: str, optimizer: str, test_per_validation: float) -> Search | None:
    """The search of an arm as `reselection` wants it; ``None`` before a confirm trial has ended.

    Confirmed configurations lead, in the order that selects the arm's best one. The others follow as the tune stage
    ranks them: finished ones by objective, stopped ones by how long they ran, failed ones last. Their stand-in for the
    test force error is the validation force error of the tune trial times `test_per_validation`; a stopped trial's is
    the one it had when it was stopped, so it is pessimistic.

    Args:
        run: the run.
        workload: its workload.
        optimizer: the arm's optimizer.
        test_per_validation: as the function of this name returns it.
    """
    objective = run.study.objective
    confirmed = [found for found in confirm_candidates(run, workload, optimizer) if found.trials]
    confirmed.sort(key=lambda candidate: candidate_order(candidate, objective))
    if not confirmed:
        return None
    numbers = {candidate.config_index for candidate in confirmed}
    tune = [trial for trial in run.arm(workload, optimizer, Stage.TUNE) if trial.key.config_index not in numbers]
    others = sorted((trial for trial in tune if trial.reason is not None), key=_tune_order)
    values = [
        {
            seed: error
            for seed, trial in candidate.trials.items()
            if (error := error_of(trial, Split.TEST, POLICY, Metric.FORCES_MAE, objective)) is not None
        }
        for candidate in confirmed
    ]
    return Search(
        order=(*(candidate.config_index for candidate in confirmed), *(trial.key.config_index for trial in others)),
        confirmed=tuple(values),
        tuned=tuple(_validation_force(run, trial) * test_per_validation for trial in others),
    )


def test_per_validation(run: Run, workload: str) -> float:
    """Median over a workload's finished confirm trials of test over validation force error; 1 where there are none."""
    objective = run.study.objective
    ratios = []
    for optimizer in run.optimizers:
        for trial in run.arm(workload, optimizer, Stage.CONFIRM):
            if trial.reason is Reason.FINISHED:
                test, validation = (
                    error_of(trial, split, POLICY, Metric.FORCES_MAE, objective) for split in (Split.TEST, Split.VAL)
                )
                if test and validation and math.isfinite(test) and math.isfinite(validation):
                    ratios.append(test / validation)
    return float(np.median(ratios)) if ratios else 1.0


def searches_of(run: Run, workload: str) -> dict[str, Search]:
    """The search of every arm of a workload that has one, by optimizer."""
    factor = test_per_validation(run, workload)
    found = {optimizer: search_of(run, workload, optimizer, factor) for optimizer in run.optimizers}
    return {optimizer: search for optimizer, search in found.items() if search is not None}


def _tune_order(trial: TrialRecord) -> tuple[bool, bool, float, float, int]:
    stopped = trial.reason is Reason.STOPPED_ASHA
    usable = (stopped or trial.reason is Reason.FINISHED) and trial.value is not None
    value = trial.value if usable and trial.value is not None else math.inf
    return not usable, stopped, -trial.ledger.get("steps", 0.0) if stopped else 0.0, value, trial.key.config_index


def _validation_force(run: Run, trial: TrialRecord) -> float:
    if trial.reason not in (Reason.FINISHED, Reason.STOPPED_ASHA):
        return math.inf
    readout = chosen_readout(trial, run.study.objective)
    value = trial.result.get(Split.VAL, {}).get(readout or "", {}).get(Metric.FORCES_MAE)
    return float(value) if value is not None and math.isfinite(value) else math.inf
