"""Which arm of a workload to use, and in words how well that is founded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from analysis.arm_result import ArmResult
from analysis.ranking import WorkloadRanking
from analysis.verdict import Verdict
from analysis.wording import listed


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A configuration to train with.

    Attributes:
        config_index: number of the configuration in the arm's search. params: its searched hyperparameters.
        why: one sentence; says so where nothing shows that the choice is the best.
    """

    workload: str
    optimizer: str
    config_index: int
    params: dict[str, Any]
    why: str


def choose(workload: WorkloadRanking, optimizer: str | None = None) -> Choice | None:
    """The winner; in a tie the cheapest of the tied arms, where steps were timed alone; else the leading arm.

    Args:
        workload: its ranking.
        optimizer: this arm whatever the verdict is.

    Returns:
        ``None`` where the arm, or every one, has no confirmed configuration.
    """
    usable = {arm.optimizer: arm for arm in workload.arms if arm.config_index is not None and not _failed(arm)}
    if optimizer is not None:
        return _of(workload, usable[optimizer], _asked(workload, optimizer)) if optimizer in usable else None
    name, why = _best(workload, usable)
    return None if name is None else _of(workload, usable[name], why)


def _best(workload: WorkloadRanking, usable: dict[str, ArmResult]) -> tuple[str | None, str]:
    decision = workload.decision
    if decision.winner in usable:
        return decision.winner, f"{decision.winner} wins on {workload.workload}"
    tied = [name for name in decision.tied if name in usable]
    if tied:
        return _of_tied(workload, tied)
    if decision.verdict is Verdict.EXPLORATORY:
        objective = {name: value for name, arm in usable.items() if (value := arm.validation_objective) is not None}
        best = min(objective, key=lambda name: objective[name], default=None)
        return best, f"exploratory: nothing is ranked; {best} has the lowest validation objective"
    leading = next((arm.optimizer for arm in workload.arms if arm.optimizer in usable and arm.rank is not None), None)
    unbeaten = _unbeaten(workload, leading)
    not_shown = f"not shown to be better than {listed(unbeaten)}" if unbeaten else "not shown to be the best"
    return leading, f"unresolved: {leading} leads on {workload.workload}, but is {not_shown}"


def _of_tied(workload: WorkloadRanking, tied: Sequence[str]) -> tuple[str, str]:
    """The cheapest of tied arms; a slot's share of a cohort's steps says nothing of what an optimizer costs."""
    tie = f"tie of {listed(workload.decision.tied)}"
    cost = {point.optimizer: point.device_s for point in workload.pareto if point.alone}
    if not all(name in cost for name in tied):
        return tied[0], f"{tie}; {tied[0]} leads, and which is the cheapest is not known: steps were not timed alone"
    cheapest = min(tied, key=lambda name: cost[name])
    return cheapest, f"{tie}; {cheapest} is the cheapest of them"


def _unbeaten(workload: WorkloadRanking, leading: str | None) -> Sequence[str]:
    return [one.second for one in workload.comparisons if one.first == leading and not one.resolved]


def _asked(workload: WorkloadRanking, optimizer: str) -> str:
    best = choose(workload)
    if best is not None and best.optimizer == optimizer:
        return best.why
    return f"{optimizer} was asked for; {workload.decision.verdict} on {workload.workload}" + (
        f", where the choice is {best.optimizer}" if best is not None else ""
    )


def _failed(arm: ArmResult) -> bool:
    """Whether not one seed of the configuration reached the horizon."""
    return arm.n_seeds == len(arm.failed_seeds)


def _of(workload: WorkloadRanking, arm: ArmResult, why: str) -> Choice:
    assert arm.config_index is not None
    return Choice(
        workload=workload.workload,
        optimizer=arm.optimizer,
        config_index=arm.config_index,
        params=arm.params,
        why=why,
    )
