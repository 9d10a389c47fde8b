"""Which weights and which configuration speak for an arm: both are chosen on validation alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.load import Run
from tunebench.study.objective import objective_value, selected_readout
from tunebench.study.record import Reason, Split, Stage, TrialRecord
from tunebench.study.spec import Objective

POLICY = "policy"
"""Stands in a record where the readout was chosen by the study's `objective.readout`."""


def chosen_readout(trial: TrialRecord, objective: Objective) -> str | None:
    """Readout that counts for a trial under the study's policy, by its validation errors when it ended.

    Returns:
        ``None`` when the trial has no validation errors of an allowed readout.
    """
    validation = trial.result.get(Split.VAL, {})
    objectives = {readout: objective_value(errors, objective) for readout, errors in validation.items()}
    return selected_readout(objectives, objective)


def error_of(trial: TrialRecord, split: str, readout: str, metric: str, objective: Objective) -> float | None:
    """One error of an ended trial (lower is better): ``inf`` if the trial failed, ``None`` if nothing was measured.

    Args:
        trial: a trial with a reason.
        split: ``val``, ``test`` or ``ood:NAME``.
        readout: a `Readout`, or `POLICY` for the one the study's policy chooses.
        metric: a `Metric`.
        objective: the study's objective, which holds the policy.
    """
    if trial.reason is not Reason.FINISHED:
        return math.inf
    chosen = chosen_readout(trial, objective) if readout == POLICY else readout
    value = trial.result.get(split, {}).get(chosen or "", {}).get(metric)
    if value is None:
        return None
    return float(value) if math.isfinite(value) else math.inf


def rule_shares(trial: TrialRecord) -> dict[str, float]:
    """Share of the trainable weights that each update rule really treats, by rule; empty before the trial's start."""
    shares: dict[str, float] = {}
    for group in trial.groups:
        shares[str(group["rule"])] = shares.get(str(group["rule"]), 0.0) + float(group["share"])
    return shares


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One configuration in the confirm stage, with what became of each of its seeds.

    Attributes:
        config_index: the configuration's number in the tune stage.
        params: sampled hyperparameters.
        trials: ended trials by seed index.
        missing: planned seed indices without an ended trial.
    """

    config_index: int
    params: dict[str, Any]
    trials: dict[int, TrialRecord]
    missing: tuple[int, ...]

    @property
    def finished(self) -> tuple[int, ...]:
        """Seed indices that reached the horizon."""
        return tuple(seed for seed, trial in self.trials.items() if trial.reason is Reason.FINISHED)

    @property
    def failed(self) -> tuple[int, ...]:
        """Seed indices that ended in any other way."""
        return tuple(seed for seed in self.trials if seed not in self.finished)


def candidates(trials: Sequence[TrialRecord], seeds: int) -> tuple[Candidate, ...]:
    """Configurations of an arm's confirm trials, in order of their number; ``seeds`` are planned for each."""
    by_config: dict[int, list[TrialRecord]] = {}
    for trial in trials:
        by_config.setdefault(trial.key.config_index, []).append(trial)
    found = []
    for config_index, group in sorted(by_config.items()):
        ended = {trial.key.seed_index: trial for trial in group if trial.reason is not None}
        planned = set(range(seeds)) | {trial.key.seed_index for trial in group}
        found.append(
            Candidate(
                config_index=config_index,
                params=group[0].params,
                trials=dict(sorted(ended.items())),
                missing=tuple(sorted(planned - set(ended))),
            )
        )
    return tuple(found)


def mean_validation(candidate: Candidate, objective: Objective) -> float | None:
    """Mean validation objective over a configuration's ended seeds, ``inf`` if one failed, ``None`` if none ended."""
    if not candidate.trials:
        return None
    return float(np.mean([_validation_of(trial, objective) for trial in candidate.trials.values()]))


def best_candidate(found: Sequence[Candidate], objective: Objective) -> Candidate | None:
    """The configuration that speaks for the arm: the lowest mean validation objective over its seeds.

    A failed seed makes that mean infinite. Among configurations that all have failures the fewest failures count first;
    in an unfinished run configurations with more ended seeds come first, which makes the choice provisional.
    """
    tried = [candidate for candidate in found if candidate.trials]
    return min(tried, key=lambda candidate: candidate_order(candidate, objective), default=None)


def candidate_order(candidate: Candidate, objective: Objective) -> tuple[int, int, float, int]:
    """What an arm's configurations are sorted by, the best one first."""
    values = [_validation_of(candidate.trials[seed], objective) for seed in candidate.finished]
    mean = float(np.mean(values)) if values else math.inf
    return len(candidate.missing), len(candidate.failed), mean, candidate.config_index


def confirm_candidates(run: Run, workload: str, optimizer: str) -> tuple[Candidate, ...]:
    """Configurations of an arm in the confirm stage of a run."""
    return candidates(run.arm(workload, optimizer, Stage.CONFIRM), run.study.confirm.seeds)


def finished_trials(run: Run, workload: str, optimizer: str, config_index: int | None) -> tuple[TrialRecord, ...]:
    """Confirm trials of one configuration that reached the horizon; of no configuration there are none."""
    trials = run.arm(workload, optimizer, Stage.CONFIRM)
    return tuple(t for t in trials if t.key.config_index == config_index and t.reason is Reason.FINISHED)


def _validation_of(trial: TrialRecord, objective: Objective) -> float:
    readout = chosen_readout(trial, objective)
    if trial.reason is not Reason.FINISHED or readout is None:
        return math.inf
    return objective_value(trial.result[Split.VAL][readout], objective)
