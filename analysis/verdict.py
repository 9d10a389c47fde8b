"""Who may be called winner: the one place where an ordering becomes a claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from analysis.comparison import Comparison, Contender, compare
from analysis.statistics import iqm
from analysis.wording import listed, milli, milli_interval

MINIMUM_SEEDS = 5
"""Rule F11: fewer seeds never name a winner."""


class Verdict(StrEnum):
    """What may be said of the arms of a workload, or of the optimizers of a study.

    WINNER: better than every other one beyond its interval. TIE: the leading ones are practically alike, the others
    worse. UNRESOLVED: neither is shown. EXPLORATORY: an adaptive search, never ranked.
    """

    WINNER = "winner"
    TIE = "tie"
    UNRESOLVED = "unresolved"
    EXPLORATORY = "exploratory"


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A verdict with its evidence in words.

    Attributes:
        winner: set only when there is one. tied: the arms of a tie, the leading one first.
        budget: what every arm was given, in words; the verdict holds at this budget.
        resolve: what would turn an unresolved question into an answer, one sentence each.
        barred: something other than the differences forbids a claim: unfinished, a failed check, too few seeds or arms.
        smallest_n: smallest number of ended seeds.
    """

    verdict: Verdict
    winner: str | None
    tied: tuple[str, ...]
    sentence: str
    budget: str
    resolve: tuple[str, ...]
    barred: bool
    smallest_n: int


def decide(
    ordered: Sequence[Contender],
    *,
    exploratory: bool,
    missing: Sequence[str],
    failed_checks: Sequence[str],
    seed: Callable[[str, str], int],
    budget: str = "",
) -> tuple[Decision, tuple[Comparison, ...]]:
    """Compare the leading arm with every other one and say what that allows.

    A winner needs a finished workload, at least `MINIMUM_SEEDS` paired seeds with every other arm, no failed check, and
    a paired interval below zero against every other arm. A tie needs the same, but against the arms that are not beaten
    a 90 % interval inside one seed standard deviation.

    Args:
        ordered: arms, lowest IQM of the test force error first; in study order if exploratory.
        exploratory: the search adapted itself to results, so nothing is ranked.
        missing: what an unfinished workload lacks.
        failed_checks: names of checks that failed.
        seed: bootstrap seed of a pair of arms.
        budget: what every arm was given, in words.
    """
    smallest = min((len(contender.values) for contender in ordered), default=0)
    if exploratory:
        sentence = "Exploratory: the configurations were searched by TPE, which adapts to results, so no arm is ranked."
        return _decision(Verdict.EXPLORATORY, sentence, budget, smallest), ()
    comparisons = tuple(
        compare(ordered[0], other, seed(ordered[0].optimizer, other.optimizer))
        for other in ordered[1:]
        if ordered[0].values and other.values
    )
    objections = _objections(ordered, comparisons, missing, failed_checks)
    unbeaten = [comparison for comparison in comparisons if not comparison.resolved]
    evidence, at = _evidence(ordered, comparisons), f" at {budget}" if budget else ""
    if not objections and not unbeaten:
        name = ordered[0].optimizer
        return _decision(Verdict.WINNER, f"{name} wins{at}. {evidence}", budget, smallest, winner=name), comparisons
    if not objections and all(comparison.equivalent for comparison in unbeaten):
        tied = (ordered[0].optimizer, *(comparison.second for comparison in unbeaten))
        sentence = f"Tie{at}: {listed(tied)} differ by less than one seed standard deviation. {evidence}"
        return _decision(Verdict.TIE, sentence, budget, smallest, tied=tied), comparisons
    barred = bool(objections)
    if unbeaten:
        names = listed(comparison.second for comparison in unbeaten)
        objections.append(f"{ordered[0].optimizer} is not separated from {names}")
    sentence = f"Unresolved{at}: {'; '.join(objections)}. {evidence}".strip()
    resolve = tuple(_remedy(comparison) for comparison in unbeaten if comparison.n_pairs)
    return _decision(Verdict.UNRESOLVED, sentence, budget, smallest, resolve=resolve, barred=barred), comparisons


def _decision(
    verdict: Verdict,
    sentence: str,
    budget: str,
    smallest: int,
    *,
    winner: str | None = None,
    tied: tuple[str, ...] = (),
    resolve: tuple[str, ...] = (),
    barred: bool = False,
) -> Decision:
    return Decision(
        verdict=verdict,
        winner=winner,
        tied=tied,
        sentence=sentence.strip(),
        budget=budget,
        resolve=resolve,
        barred=barred,
        smallest_n=smallest,
    )


def _objections(
    ordered: Sequence[Contender],
    comparisons: Sequence[Comparison],
    missing: Sequence[str],
    failed_checks: Sequence[str],
) -> list[str]:
    """What forbids any claim, whatever the differences are."""
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
    return objections


def _remedy(comparison: Comparison) -> str:
    """What would separate the leading arm from another one, or show that they are alike."""
    pair, have = f"{comparison.first} and {comparison.second}", comparison.n_pairs
    if comparison.limited_by_search and comparison.search_error:
        return (
            f"{pair}: the luck of one search (± {milli(comparison.search_error)} meV/Å) is too large for this "
            "difference; more seeds cannot resolve it, more configurations per arm or a second search may."
        )
    ways = []
    wanted = comparison.seeds_to_resolve
    if wanted is not None:
        ways.append(f"about {max(wanted, MINIMUM_SEEDS, have + 1)} paired seeds would show a difference of this size")
    if comparison.seeds_to_tie is not None:
        number = f"about {max(comparison.seeds_to_tie, MINIMUM_SEEDS, have + 1)}{'' if ways else ' paired seeds'}"
        ways.append(f"{number} would show that they are alike")
    if not ways:
        return f"{pair}: no number of seeds up to 1000 would resolve a difference like this one."
    return f"{pair}: {', '.join(ways)} (80 % power; {have} so far)."


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
