"""How the search of one arm went so far, told from its journal alone: what it spent, what it found, who is left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tunebench.study.record import Reason, Stage, TrialRecord
from tunebench.study.spec import Fidelity


@dataclass(frozen=True, kw_only=True)
class ArmState:
    """An arm's search after one of its trials has reached a rung or its end.

    Attributes:
        steps_spent: optimizer steps of all trials so far, stopped and failed ones included.
        trials_ended: trials that have ended, in whatever way.
        device_s: device-seconds of the trials that have ended.
        best_objective: lowest validation objective at a rung or an end so far; infinite before the first finite one.
    """

    steps_spent: int
    trials_ended: int
    device_s: float
    best_objective: float


def arm_history(
    trials: Mapping[str, TrialRecord],
    passages: Iterable[tuple[str, int | None]],
    fidelity: Fidelity = Fidelity.TRUNCATE,
) -> list[ArmState]:
    """States of an arm's search in the order of its journal, the first of them before anything happened.

    Args:
        trials: the arm's records by trial id; those of the confirm stage are left out.
        passages: what `read_passages` gives, of this arm or of all.
        fidelity: of the arm; a rung that ends a complete schedule costs all its steps.
    """
    steps: dict[str, int] = {}
    spent = ended = 0
    device_s, best = 0.0, math.inf
    states = [ArmState(steps_spent=0, trials_ended=0, device_s=0.0, best_objective=math.inf)]
    for name, rung in passages:
        trial = trials.get(name)
        if trial is None or trial.key.stage is not Stage.TUNE:
            continue
        if rung is None:
            reached, objective = _end(trial)
        else:
            before = sum(step for step in trial.rungs if step < rung) if fidelity is Fidelity.RESCALE else 0
            reached, objective = before + rung, trial.rungs.get(rung)
        spent += max(reached - steps.get(name, 0), 0)  # a rung is reached again after a crash
        steps[name] = max(reached, steps.get(name, 0))
        if rung is None:
            ended += 1
            device_s += trial.ledger.get("device_s", 0.0)
        if objective is not None and math.isfinite(objective):
            best = min(best, objective)
        states.append(ArmState(steps_spent=spent, trials_ended=ended, device_s=device_s, best_objective=best))
    return states


def rung_survivors(trials: Iterable[TrialRecord], rungs: Sequence[int], horizon: int) -> dict[int, int]:
    """Trials of an arm's search that train beyond each step, sentinels among them; at the horizon, those that arrived.

    Args:
        trials: the arm's records; those of the confirm stage are left out.
        rungs: ascending steps. A rung that has decided about nobody is left out.
        horizon: steps of a full trial.
    """
    search = [trial for trial in trials if trial.key.stage is Stage.TUNE]
    survivors = {0: len(search)}
    for rung in rungs:
        said = [decision for trial in search for decision in trial.decisions if decision["rung"] == rung]
        if said:
            deciding = sum(decision["goes_on"] or decision["sentinel"] for decision in said)
            survivors[rung] = deciding + sum(_went_on_unjudged(trial, rung) for trial in search)
    survivors[horizon] = sum(trial.reason is Reason.FINISHED for trial in search)
    return survivors


def _went_on_unjudged(trial: TrialRecord, rung: int) -> bool:
    """Whether a sentinel has passed a rung that does not judge it, as an earlier one would have stopped it."""
    stopped = any(decision["rung"] < rung and not decision["goes_on"] for decision in trial.decisions)
    return stopped and trial.sentinel and rung in trial.rungs


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What is known of an arm by validation objectives, lower is better; no verdict, which the test split gives.

    Attributes:
        found: best objective of the search, None before there is one.
        confirmed: objectives of the seeds of its best confirmed configuration; empty before the first has ended.
        failed: seeds of that configuration that ended without an objective.
    """

    optimizer: str
    found: float | None
    confirmed: tuple[float, ...] = ()
    failed: int = 0

    @property
    def objective(self) -> float:
        """What it is ordered by: the mean over its confirmed seeds, before there are any the best of its search."""
        if self.confirmed:
            return math.fsum(self.confirmed) / len(self.confirmed)
        return math.inf if self.found is None else self.found


def standings(trials: Iterable[TrialRecord], workload: str) -> list[Standing]:
    """The arms of a workload, the best one first; those of which nothing is known last."""
    of_arm: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        if trial.key.workload == workload:
            of_arm.setdefault(trial.key.optimizer, []).append(trial)
    return sorted((_standing(name, own) for name, own in of_arm.items()), key=lambda standing: standing.objective)


def _end(trial: TrialRecord) -> tuple[int, float | None]:
    return int(trial.ledger.get("steps", 0)), trial.value


def _standing(optimizer: str, trials: Sequence[TrialRecord]) -> Standing:
    search = [t.value for t in trials if t.key.stage is Stage.TUNE and t.value is not None]
    rungs = [value for t in trials if t.key.stage is Stage.TUNE for value in t.rungs.values()]
    found = min([*search, *rungs], default=None)
    seeds: dict[int, list[float | None]] = {}
    for trial in trials:
        if trial.key.stage is Stage.CONFIRM and trial.reason is not None:
            seeds.setdefault(trial.key.config_index, []).append(trial.value)
    candidates = [
        Standing(
            optimizer=optimizer,
            found=found,
            confirmed=tuple(value for value in values if value is not None),
            failed=values.count(None),
        )
        for values in seeds.values()
    ]
    # a configuration that fails is not better for the seeds it leaves out
    return min(
        candidates,
        key=lambda standing: (standing.failed, standing.objective),
        default=Standing(optimizer=optimizer, found=found),
    )
