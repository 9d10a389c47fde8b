"""The answer in Markdown, for a pull request or a message."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from analysis.arm_result import ArmResult
from analysis.checks import Status
from analysis.choice import choose
from analysis.headline import cost, evidence, remedies
from analysis.load import Run
from analysis.ranking import Ranking, WorkloadRanking
from analysis.wording import ABSENT, milli, milli_interval, number, params
from tunebench.study.record import Metric, Split

_SPECIAL = str.maketrans({character: f"\\{character}" for character in "\\`*_{}[]<>|#~$@&"})
_LINKS = re.compile(r"(?<=www)\.|://", re.IGNORECASE)
"""Where a bare address begins, of which GitHub's Markdown makes a link."""
_MOST_FINDINGS = 5


def summary(run: Run, ranking: Ranking, page: Path) -> str:
    """Verdict, evidence, a table per workload, cost and what to use; everything that came from files is escaped.

    Args:
        run: the run.
        ranking: its ranking.
        page: the page of its report, which the summary names.
    """
    state = "" if ranking.finished else " (unfinished: provisional)"
    lines = [f"## {escaped(ranking.study)}{state}", "", f"**{escaped(ranking.overall.sentence)}**", ""]
    for workload in ranking.workloads:
        lines += _workload(workload, has_own_answer=len(ranking.workloads) > 1)
    lines += ["### How sure", "", *_items(evidence(ranking)), ""]
    wanted = remedies(ranking)
    lines += ["What would resolve what is open:", "", *_items(wanted), ""] if wanted else []
    failed = [
        f"{check.name}: {finding}"
        for check in ranking.checks
        if check.status is Status.FAILED
        for finding in check.findings
    ]
    if failed:
        more = [f"and {len(failed) - _MOST_FINDINGS} more"] if len(failed) > _MOST_FINDINGS else []
        lines += ["### Failed checks", "", *_items([*failed[:_MOST_FINDINGS], *more]), ""]
    lines += ["### Cost", "", escaped(cost(run).sentence), ""]
    lines += [f"Study `{ranking.study_hash[:12]}`. The report with every trial: {escaped(str(page))}"]
    return "\n".join(lines) + "\n"


def _workload(workload: WorkloadRanking, *, has_own_answer: bool) -> list[str]:
    lines = [f"### {escaped(workload.workload)}", ""]
    lines += [escaped(workload.decision.sentence), ""] if has_own_answer else []
    lines += _table(("rank", "optimizer", "test force MAE, meV/Å", "95 %", "seeds", "failed"), map(_row, workload.arms))
    choice = choose(workload)
    if choice is not None:
        settings = params(choice.params) or "defaults"
        lines += ["", f"To use: {escaped(choice.optimizer)}, {escaped(settings)} ({escaped(choice.why)})."]
    return [*lines, ""]


def _row(arm: ArmResult) -> Sequence[str]:
    found = arm.summary(Split.TEST, Metric.FORCES_MAE)
    error = (ABSENT, ABSENT) if found is None else (milli(found.iqm), milli_interval(found.interval))
    return (number(arm.rank), arm.optimizer, *error, str(arm.n_seeds), str(len(arm.failed_seeds)))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"| {' | '.join('---' for _ in header)} |"]
    return lines + [f"| {' | '.join(map(escaped, row))} |" for row in rows]


def _items(lines: Iterable[str]) -> list[str]:
    return [f"- {escaped(line)}" for line in lines]


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in one line; it mentions nobody and links nowhere."""
    return _LINKS.sub(r"\\\g<0>", " ".join(text.split()).translate(_SPECIAL))
