"""The top of the report: how sure the answer is, what it cost, what to use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from analysis.checks import Status
from analysis.choice import Choice, choose
from analysis.figure_style import Look, look
from analysis.ledger import arm_ledger
from analysis.load import Run
from analysis.nequip_text import config_text
from analysis.page_tables import Table
from analysis.ranking import Ranking, WorkloadRanking
from analysis.verdict import Verdict
from analysis.wording import listed, milli, milli_interval, number, percent
from tunebench.study.record import Stage

_HOUR = 3600.0


def evidence(ranking: Ranking) -> list[str]:
    """What the answer rests on, one sentence per workload and a few on the whole."""
    lines = [line for workload in ranking.workloads for line in _workload_evidence(workload)]
    failed = sum(check.status is Status.FAILED for check in ranking.checks)
    warned = sum(check.status is Status.WARNING for check in ranking.checks)
    lines.append(
        f"{failed} of {len(ranking.checks)} checks failed, which forbids a winner where it concerns one; {warned} warn."
        if failed
        else f"No check of {len(ranking.checks)} failed, {warned} warn."
    )
    if len(ranking.workloads) > 1 and ranking.overall.left_out:
        stable = "keeps" if ranking.overall.stable else "does not keep"
        lines.append(f"Leaving out any one optimizer {stable} the order of the others.")
    lines.append(
        "In simulated studies without a difference these rules name a winner in at most 5 of 100; a winner holds for "
        "this workload, at this horizon and search budget."
    )
    return lines


def _workload_evidence(workload: WorkloadRanking) -> Iterator[str]:
    if not workload.comparisons:
        return
    closest = max(workload.comparisons, key=lambda one: one.difference)
    interval = "no interval" if closest.interval is None else f"95 % interval {milli_interval(closest.interval)}"
    better = "" if closest.improvement is None else f", better in {percent(closest.improvement)} of pairs of runs"
    family = ""
    if workload.decision.verdict is Verdict.WINNER and workload.family_p is not None:
        family = f"; p {number(workload.family_p, 2)} after Holm over workloads"
    yield (
        f"{workload.workload}: {closest.first} against {closest.second}, the closest: {milli(closest.difference)} "
        f"meV/Å, {interval} from {closest.n_pairs} paired seeds{better}{family}."
    )


def remedies(ranking: Ranking) -> list[str]:
    """What would turn open questions into answers."""
    return [f"{w.workload}: {line}" for w in ranking.workloads for line in w.decision.resolve] + [
        f"over all workloads: {line}" for line in ranking.overall.resolve
    ]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the study took: a sentence and a row per optimizer."""

    sentence: str
    table: Table


def cost(run: Run) -> Cost:
    """Trials, steps and device-hours by optimizer and in sum, stopped and failed work included."""
    rows, totals = [], [0.0, 0.0]
    for name in run.optimizers:
        stages = {stage: [arm_ledger(run, workload, name, stage) for workload in run.workloads] for stage in Stage}
        ledgers = [ledger for found in stages.values() for ledger in found]
        seconds = [sum(ledger.device_s for ledger in stages[stage]) for stage in Stage]
        totals = [total + spent for total, spent in zip(totals, seconds, strict=True)]
        rows.append(
            (
                name,
                str(sum(ledger.trials for ledger in ledgers)),
                str(sum(ledger.failed for ledger in ledgers)),
                str(sum(ledger.steps for ledger in ledgers)),
                *(number(spent / _HOUR, 3) for spent in seconds),
            )
        )
    hours = f"{number(sum(totals) / _HOUR, 3)} device-hours of training"
    split = listed(
        f"{number(spent / _HOUR, 3)} in the {stage} stage" for spent, stage in zip(totals, Stage, strict=True)
    )
    return Cost(
        sentence=f"{hours} in {len(run.trials)} trials: {split}. Evaluation is not counted.",
        table=Table(
            title="By optimizer",
            note="Over all workloads; stopped and failed work included.",
            columns=("optimizer", "trials", "failed", "steps", *(f"device-hours, {stage}" for stage in Stage)),
            rows=tuple(rows),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Use:
    """What to train a workload with, and the config's text."""

    choice: Choice
    look: Look
    text: str


def uses(run: Run, ranking: Ranking) -> list[Use]:
    """The choice on every workload that has one."""
    chosen = [choice for workload in ranking.workloads if (choice := choose(workload)) is not None]
    return [
        Use(choice=choice, look=look(choice.optimizer, run.optimizers), text=config_text(run, choice))
        for choice in chosen
    ]
