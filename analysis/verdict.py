"""Who may be called winner: the one place where an ordering becomes a claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from analysis.statistics import Interval, iqm, iqm_difference, paired_iqm_interval
from analysis.wording import milli, milli_interval

MINIMUM_SEEDS = 5
"""Rule F11: fewer seeds never name a winner."""


class Verdict(StrEnum):
    """WINNER: better than every other arm beyond its interval. EXPLORATORY: an adaptive search, never ranked."""

    WINNER = "winner"
    UNRESOLVED = "unresolved"
    EXPLORATORY = "exploratory"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An arm's test force errors by seed index, eV/Å, ``inf`` for a failed seed; empty before the first has ended."""

    optimizer: str
    values: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The leading arm against another one, over the seeds that both have.

    Attributes:
        difference: IQM of the first minus IQM of the second in eV/Å; negative when the first is better.
        interval: paired 95 % bootstrap interval; ``None`` (not available) for fewer than three pairs.
        n_pairs: seeds that both arms have ended, failed ones included.
    """

    first: str
    second: str
    difference: float
    interval: Interval | None
    n_pairs: int

    @property
    def resolved(self) -> bool:
        """Whether the first arm is better beyond the interval."""
        return self.interval is not None and self.interval.high < 0.0


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A verdict with its evidence in words; ``winner`` is set only when there is one."""

    verdict: Verdict
    winner: str | None
    sentence: str
    smallest_n: int


def decide(
    ordered: Sequence[Contender],
    *,
    exploratory: bool,
    missing: Sequence[str],
    failed_checks: Sequence[str],
    seed: Callable[[str, str], int],
) -> tuple[Decision, tuple[Comparison, ...]]:
    """Compare the leading arm with every other one and say what that allows.

    A winner needs a finished workload, at least `MINIMUM_SEEDS` paired seeds with every other arm, no failed check, and
    a paired interval below zero against every other arm.

    Args:
        ordered: arms, lowest IQM of the test force error first; in study order if exploratory.
        exploratory: the search adapted itself to results, so nothing is ranked.
        missing: what an unfinished workload lacks.
        failed_checks: names of checks that failed.
        seed: bootstrap seed of a pair of arms.
    """
    smallest = min((len(contender.values) for contender in ordered), default=0)
    if exploratory:
        sentence = "Exploratory: the configurations were searched by TPE, which adapts to results, so no arm is ranked."
        return Decision(verdict=Verdict.EXPLORATORY, winner=None, sentence=sentence, smallest_n=smallest), ()
    comparisons = tuple(
        compare(ordered[0], other, seed(ordered[0].optimizer, other.optimizer))
        for other in ordered[1:]
        if ordered[0].values and other.values
    )
    objections = _objections(ordered, comparisons, missing, failed_checks)
    evidence = _evidence(ordered, comparisons)
    winner = None if objections else ordered[0].optimizer
    opening = f"{winner} wins" if winner else f"Unresolved: {'; '.join(objections)}"
    return (
        Decision(
            verdict=Verdict.WINNER if winner else Verdict.UNRESOLVED,
            winner=winner,
            sentence=f"{opening}. {evidence}".strip(),
            smallest_n=smallest,
        ),
        comparisons,
    )


def compare(first: Contender, second: Contender, seed: int) -> Comparison:
    """Difference of two arms over their common seeds, with its paired bootstrap interval."""
    common = sorted(set(first.values) & set(second.values))
    ours = np.array([first.values[index] for index in common], dtype=np.float64)
    theirs = np.array([second.values[index] for index in common], dtype=np.float64)
    return Comparison(
        first=first.optimizer,
        second=second.optimizer,
        difference=iqm_difference(ours, theirs) if common else 0.0,
        interval=paired_iqm_interval(ours, theirs, seed),
        n_pairs=len(common),
    )


def _objections(
    ordered: Sequence[Contender],
    comparisons: Sequence[Comparison],
    missing: Sequence[str],
    failed_checks: Sequence[str],
) -> list[str]:
    objections = []
    if missing:
        objections.append("the study is unfinished")
    if failed_checks:
        objections.append(f"a check failed ({', '.join(failed_checks)})")
    if len(ordered) < 2:
        objections.append("a single arm has nothing to be compared with")
    absent = [contender.optimizer for contender in ordered if not contender.values]
    if absent:
        objections.append(f"no confirm trial of {', '.join(absent)} has ended")
    smallest = min((comparison.n_pairs for comparison in comparisons), default=0)
    if comparisons and smallest < MINIMUM_SEEDS:
        objections.append(f"the smallest number of paired seeds is {smallest}, a winner needs {MINIMUM_SEEDS}")
    open_against = [comparison.second for comparison in comparisons if not comparison.resolved]
    if open_against:
        objections.append(f"{ordered[0].optimizer} is not separated from {', '.join(open_against)}")
    return objections


def _evidence(ordered: Sequence[Contender], comparisons: Sequence[Comparison]) -> str:
    """The leading arm's error and its difference to the arms it is not separated from, else to the closest one."""
    if not ordered or not ordered[0].values:
        return ""
    values = np.array(list(ordered[0].values.values()), dtype=np.float64)
    lead = f"Lowest IQM test force MAE: {ordered[0].optimizer}, {milli(float(iqm(values)))} meV/Å (n = {len(values)})."
    if not comparisons:
        return lead
    unresolved = [comparison for comparison in comparisons if not comparison.resolved]
    shown = unresolved or [max(comparisons, key=lambda comparison: comparison.difference)]
    differences = "; ".join(f"to {comparison.second} {_difference_text(comparison)}" for comparison in shown)
    opening = "Difference" if unresolved or len(comparisons) == 1 else "Smallest difference"
    return f"{lead} {opening} in meV/Å, with paired 95 % interval: {differences}."


def _difference_text(comparison: Comparison) -> str:
    """Difference, interval and number of pairs, times 1000 (meV/Å)."""
    if comparison.interval is None:
        return f"{milli(comparison.difference)} (no interval from n = {comparison.n_pairs})"
    return f"{milli(comparison.difference)} {milli_interval(comparison.interval)} (n = {comparison.n_pairs})"
