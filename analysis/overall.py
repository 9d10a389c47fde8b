"""One answer over all workloads of a study: winner, tie or unresolved; the unit of a general claim is the workload."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from analysis.nested_bootstrap import Redrawn, pooled
from analysis.power import workloads_to_resolve
from analysis.stability import LeftOut, leave_one_out
from analysis.statistics import DRAWS, Floats, Interval, percentile_interval
from analysis.verdict import Decision, Verdict
from analysis.wording import listed, number
from analysis.workload_tests import (
    MINIMUM_WORKLOADS,
    PracticalProbabilities,
    bayesian_signed_rank,
    holm,
    probability_of_improvement,
    wilcoxon,
)

Answer = tuple[Verdict, tuple[str, ...], str]
"""A verdict, the optimizers it names and its sentence."""

LEVEL = 0.05
PRACTICALLY_ALIKE = 0.95
"""Posterior probability of the region of practical equivalence above which optimizers are called alike."""


@dataclass(frozen=True, kw_only=True)
class WorkloadErrors:
    """What one workload says of every optimizer.

    Attributes:
        errors: IQM of the test force error by optimizer, eV/Å, ``inf`` for a failed arm.
        runs: test force errors of the seeds by optimizer, each of shape (runs,).
        deviation: seed standard deviation over the error, by optimizer: what one seed changes, as a share.
        decision: the workload's own verdict.
        redrawn: draws of the nested bootstrap; ``None`` where the searches are not known.
    """

    workload: str
    errors: dict[str, float]
    runs: dict[str, Floats]
    deviation: dict[str, float]
    decision: Decision
    redrawn: Redrawn | None = None


@dataclass(frozen=True, kw_only=True)
class OverallComparison:
    """The leading optimizer against another one over workloads, on logs of error ratios.

    Attributes:
        ratio: geometric mean of first over second error, below 1 when the first is better.
        interval: 95 % of the nested bootstrap of that ratio; workloads are drawn from six on.
        wilcoxon_p, holm_p: exact signed-rank p, raw and adjusted over the comparisons; ``None`` below six workloads.
        bayes: Bayesian signed rank with a region of one mean seed standard deviation, ``rope`` as a log ratio.
        improvement: probability that a run of the first beats one of the second on a workload picked at random.
        workloads_to_resolve: workloads that would show this ratio with 80 % power; ``None`` where a thousand would not,
            and with one workload, which says nothing of how workloads differ.
    """

    first: str
    second: str
    ratio: float
    interval: Interval | None
    wilcoxon_p: float | None
    holm_p: float | None
    rope: float
    bayes: PracticalProbabilities
    improvement: float
    workloads_to_resolve: int | None


@dataclass(frozen=True, kw_only=True)
class Overall:
    """The verdict over all workloads with its evidence.

    Attributes:
        ratios: geometric mean over workloads of each optimizer's error over the leading one's, 1 or more, best first.
        left_out: the order without each optimizer in turn.
        stable: no two optimizers change places by the absence of a third.
    """

    verdict: Verdict
    winner: str | None
    tied: tuple[str, ...]
    sentence: str
    resolve: tuple[str, ...]
    n_workloads: int
    ratios: dict[str, float]
    comparisons: tuple[OverallComparison, ...]
    left_out: tuple[LeftOut, ...]
    stable: bool


def decide_overall(workloads: Sequence[WorkloadErrors], *, seed: int, draws: int = DRAWS) -> Overall:
    """Say what holds over all workloads.

    With six workloads or more a winner needs Wilcoxon's test with Holm's correction against every other optimizer and
    the lead by geometric mean. With fewer no test can reach 5 %, so a winner must win on each workload, and the
    sentence says that nothing is claimed beyond them. A tie needs a Bayesian probability of practical equivalence above
    95 %, or a tie of the same optimizers on each workload. Unfinished workloads and failed checks leave it unresolved,
    as does an adaptive search. A single workload's own verdict is that of the study.

    Args:
        workloads: at least one.
        seed: seed of every draw.
        draws: number of draws of the Bayesian test.
    """
    names = [name for name in workloads[0].errors if all(name in workload.errors for workload in workloads)]
    exploratory = any(workload.decision.verdict is Verdict.EXPLORATORY for workload in workloads)
    if exploratory or len(names) < 2:
        verdict = Verdict.EXPLORATORY if exploratory else Verdict.UNRESOLVED
        sentence = "Exploratory: nothing is ranked." if exploratory else "Unresolved: nothing to compare."
        return _overall(workloads, (verdict, (), sentence))
    table = _logs({name: np.array([w.errors[name] for w in workloads], dtype=np.float64) for name in names})
    order = _order(table)
    comparisons = _compare(workloads, table, order, seed, draws)
    ratios = {name: _geometric(table[name] - table[order[0]]) for name in order}
    left_out = leave_one_out(table, _order)
    unbeaten = [c for c in comparisons if c.holm_p is None or c.holm_p > LEVEL or c.ratio >= 1.0]
    answer = _decide(workloads, comparisons, unbeaten, order[0])
    return _overall(workloads, answer, ratios, comparisons, unbeaten, left_out)


def _decide(
    workloads: Sequence[WorkloadErrors],
    comparisons: Sequence[OverallComparison],
    unbeaten: Sequence[OverallComparison],
    first: str,
) -> Answer:
    number_of = len(workloads)
    if number_of == 1:
        return _decide_as(workloads[0].decision)
    lead = f"Lowest geometric-mean error over {number_of} workloads: {first}."
    barred = [workload.workload for workload in workloads if workload.decision.barred]
    if barred:
        return Verdict.UNRESOLVED, (), f"Unresolved: no verdict is allowed on {listed(barred)}. {lead}"
    if number_of < MINIMUM_WORKLOADS:
        return _decide_by_each(workloads, first, lead)
    if not unbeaten:
        closest = max(comparisons, key=lambda comparison: comparison.ratio)
        evidence = f"Wilcoxon-Holm p at most {number(max(c.holm_p or 0.0 for c in comparisons), 2)}"
        text = f"{evidence}; error {number(closest.ratio, 3)} times that of {closest.second}, the closest."
        return Verdict.WINNER, (first,), f"{first} wins over {number_of} workloads. {text}"
    if all(comparison.bayes.alike > PRACTICALLY_ALIKE for comparison in unbeaten):
        tied = (first, *(comparison.second for comparison in unbeaten))
        return Verdict.TIE, tied, f"Tie over {number_of} workloads: {listed(tied)}, within one seed deviation. {lead}"
    names = listed(comparison.second for comparison in unbeaten)
    sentence = f"Unresolved over {number_of} workloads: {first} is not separated from {names}. {lead}"
    return Verdict.UNRESOLVED, (), sentence


def _decide_as(decision: Decision) -> Answer:
    """The answer of a study's only workload."""
    tied = decision.tied if decision.winner is None else (decision.winner,)
    return decision.verdict, tied, f"{decision.sentence} With one workload nothing is claimed beyond it.".strip()


def _decide_by_each(workloads: Sequence[WorkloadErrors], first: str, lead: str) -> Answer:
    """Below six workloads no test over workloads can reach 5 %: all of them must say the same."""
    beyond = f"With fewer than {MINIMUM_WORKLOADS} workloads nothing is claimed beyond them."
    winners = {workload.decision.winner for workload in workloads}
    if winners == {first}:
        return Verdict.WINNER, (first,), f"{first} wins on each of {len(workloads)} workloads. {beyond}"
    ties = {frozenset(workload.decision.tied) for workload in workloads}
    if len(ties) == 1 and (tied := tuple(sorted(*ties))):
        return Verdict.TIE, tied, f"Tie of {listed(tied)} on each of {len(workloads)} workloads. {beyond}"
    if {workload.decision.verdict for workload in workloads} == {Verdict.UNRESOLVED}:
        return Verdict.UNRESOLVED, (), f"Unresolved on each of {len(workloads)} workloads. {lead} {beyond}"
    found = "; ".join(f"{w.workload}: {w.decision.winner or w.decision.verdict.value}" for w in workloads)
    return Verdict.UNRESOLVED, (), f"Unresolved: the workloads do not all say the same ({found}). {lead} {beyond}"


def _compare(
    workloads: Sequence[WorkloadErrors], table: Mapping[str, Floats], order: Sequence[str], seed: int, draws: int
) -> tuple[OverallComparison, ...]:
    first = order[0]
    differences = {name: table[first] - table[name] for name in order[1:]}
    raw = {name: wilcoxon(values) for name, values in differences.items()}
    tested = len(workloads) >= MINIMUM_WORKLOADS
    adjusted = dict(zip(raw, holm(list(raw.values())), strict=True))
    intervals = _intervals(workloads, order, seed)
    return tuple(
        OverallComparison(
            first=first,
            second=name,
            ratio=_geometric(values),
            interval=intervals.get(name),
            wilcoxon_p=raw[name] if tested else None,
            holm_p=adjusted[name] if tested else None,
            rope=(rope := _rope(workloads, first, name)),
            bayes=bayesian_signed_rank(values, rope, seed=seed, draws=draws),
            improvement=probability_of_improvement(
                [workload.runs[first] for workload in workloads], [workload.runs[name] for workload in workloads]
            ),
            workloads_to_resolve=_wanted(values),
        )
        for name, values in differences.items()
    )


def _intervals(workloads: Sequence[WorkloadErrors], order: Sequence[str], seed: int) -> dict[str, Interval]:
    """Nested bootstrap of the geometric-mean ratio, where all searches are known."""
    drawn = [workload.redrawn for workload in workloads if workload.redrawn is not None]
    if len(drawn) < len(workloads) or not all(name in part.values for part in drawn for name in order):
        return {}
    logs = pooled(drawn, seed=seed, baseline=order[0])
    found = {}
    for name in order[1:]:
        with np.errstate(over="ignore"):
            found[name] = percentile_interval(np.exp(-logs[name]))
    return found


def _logs(errors: Mapping[str, Floats]) -> dict[str, Floats]:
    """Logs of errors; failures get a common, very large one so that two of them are alike."""
    with np.errstate(divide="ignore"):
        return {
            name: np.where(np.isinf(values), _FAILED, np.log(np.where(np.isinf(values), 1.0, values)))
            for name, values in errors.items()
        }


_FAILED = 100.0
"""Log of the error of a failed arm: e^100, larger than anything that can be measured."""


def _order(table: Mapping[str, Floats]) -> list[str]:
    return sorted(table, key=lambda name: (float(table[name].mean()), name))


def _geometric(logs: Floats) -> float:
    return float(np.exp(logs.mean()))


def _rope(workloads: Sequence[WorkloadErrors], first: str, second: str) -> float:
    """One seed standard deviation as a log ratio: mean over workloads and the two optimizers."""
    shares = [w.deviation[name] for w in workloads for name in (first, second) if name in w.deviation]
    return float(np.log1p(np.mean(shares))) if shares else 0.0


def _wanted(differences: Floats) -> int | None:
    if len(differences) < 2:
        return None
    return workloads_to_resolve(float(differences.mean()), float(differences.std(ddof=1)), MINIMUM_WORKLOADS)


def _overall(
    workloads: Sequence[WorkloadErrors],
    answer: Answer,
    ratios: Mapping[str, float] = MappingProxyType({}),
    comparisons: tuple[OverallComparison, ...] = (),
    unbeaten: Sequence[OverallComparison] = (),
    left_out: tuple[LeftOut, ...] = (),
) -> Overall:
    verdict, tied, sentence = answer
    have = len(workloads)
    open_question = verdict is Verdict.UNRESOLVED and have > 1
    winner = tied[0] if verdict is Verdict.WINNER else None
    return Overall(
        verdict=verdict,
        winner=winner,
        tied=tied if verdict is Verdict.TIE else (),
        sentence=sentence,
        resolve=tuple(_remedy(comparison, have) for comparison in unbeaten) if open_question else (),
        n_workloads=have,
        ratios=dict(ratios),
        comparisons=comparisons,
        left_out=left_out,
        stable=not any(one.swapped for one in left_out),
    )


def _remedy(comparison: OverallComparison, have: int) -> str:
    """What would separate two optimizers that so many workloads, at least two, do not separate."""
    pair = f"{comparison.first} and {comparison.second}"
    if comparison.workloads_to_resolve is None:
        return f"{pair}: as far as these workloads can tell, 1000 would not resolve a ratio like this one."
    wanted = max(comparison.workloads_to_resolve, MINIMUM_WORKLOADS, have + 1)
    return f"{pair}: about {wanted} workloads would show a general difference of this size (80 % power; {have} so far)."
