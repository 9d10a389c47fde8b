"""The rules F1 to F19 of a fair comparison: what the study promised, what the run shows, what was waived."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from analysis.checks import Check, Status
from analysis.load import Run
from analysis.ranking import Ranking
from analysis.stability import LeftOut
from analysis.wording import listed, percent
from analysis.workload_tests import MINIMUM_WORKLOADS
from tunebench.study.lint import Verdict as Lint
from tunebench.study.lint import lint

_TITLES = {
    "F1": "every arm has its own sampler and its own rungs",
    "F2": "arms were given equal tuning budgets, in trials and in device-seconds",
    "F3": "search spaces give every arm as many decades of the learning rate",
    "F4": "configurations are drawn without looking at results, at common points",
    "F5": "the best learning rate lies inside its range",
    "F6": "settings that trade device time for progress are read on the time axis",
    "F7": "schedules end at one fixed horizon",
    "F8": "every arm is read out alike",
    "F9": "data, seeds, precision and conditions are alike; steps were timed alone",
    "F10": "every optimizer treats the weights it promises to",
    "F11": "early stopping selects, fresh seeds to the full horizon rank",
    "F12": "no trial is compared too early in its schedule",
    "F13": "sentinels tell how often early stopping errs",
    "F14": "every decision is recorded and can be replayed",
    "F15": "the workload is the unit of a general claim, never the seed",
    "F16": "intervals hold the luck of seeds and search; no general claim from too few workloads",
    "F17": "an untuned arm and an audit tell what the budget is worth",
    "F18": "failures count, none is dropped",
    "F19": "the order does not depend on who else takes part",
}


class Mark(StrEnum):
    """PASS, WARN and FAIL, as found; WAIVED: broken, and the study says why."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"
    WAIVED = "waived"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rule: the worst of what was found before and after, with the evidence for both."""

    rule: str
    title: str
    mark: Mark
    before: str
    after: str


def checklist(run: Run, ranking: Ranking) -> tuple[Row, ...]:
    """Every rule in the order of its number."""
    before = {finding.rule: finding for finding in lint(run.resolved)}
    rows = []
    for rule, title in _TITLES.items():
        after, found = _after(rule, run, ranking)
        planned = before.get(rule)
        marks = [after] if planned is None else [after, _MARK_OF_LINT[planned.verdict]]
        mark = max(marks, key=list(Mark).index)
        if rule in run.study.waive and mark is Mark.FAIL:
            mark = Mark.WAIVED
        told = "" if planned is None else planned.reason
        told += f" (waived: {run.study.waive[rule]})" if rule in run.study.waive else ""
        rows.append(Row(rule=rule, title=title, mark=mark, before=told, after=found))
    return tuple(rows)


_MARK_OF_LINT = {Lint.PASS: Mark.PASS, Lint.WARN: Mark.WARN, Lint.FAIL: Mark.FAIL}
_MARK_OF_CHECK = {Status.PASSED: Mark.PASS, Status.WARNING: Mark.WARN, Status.FAILED: Mark.FAIL}


def _after(rule: str, run: Run, ranking: Ranking) -> tuple[Mark, str]:
    own = _JUDGES.get(rule)
    if own is not None:
        return own(ranking)
    return _of_checks([check for check in ranking.checks if f"({rule})" in check.name])


def _of_checks(checks: Sequence[Check]) -> tuple[Mark, str]:
    worst = max((_MARK_OF_CHECK[check.status] for check in checks), key=list(Mark).index, default=Mark.PASS)
    findings = [_at(check, finding) for check in checks for finding in check.findings]
    more = f"; and {len(findings) - 2} more" if len(findings) > 2 else ""
    return worst, "; ".join(findings[:2]) + more


def _at(check: Check, finding: str) -> str:
    return f"{check.workload}: {finding}" if check.workload else finding


def _sentinels(ranking: Ranking) -> tuple[Mark, str]:
    found = [arm.search.false_stops for workload in ranking.workloads for arm in workload.arms]
    known = [one for one in found if one is not None and one.sentinels]
    if not known:
        return Mark.PASS, ""
    wrongly = sum(one.wrongly for one in known)
    reached = sum(one.sentinels for one in known)
    text = f"{wrongly} of {reached} sentinels at the horizon had been condemned and beat all that the rungs kept"
    worst = max(known, key=lambda one: one.rate or 0.0)
    if wrongly:
        text += f"; most often {worst.arm}, {percent(worst.rate)} [{percent(worst.low)}, {percent(worst.high)}]"
    return (Mark.WARN if wrongly else Mark.PASS), text


def _general_claim(ranking: Ranking) -> tuple[Mark, str]:
    number = len(ranking.workloads)
    drawn = sum(one.redrawn is not None for workload in ranking.workloads for one in workload.comparisons)
    total = sum(len(workload.comparisons) for workload in ranking.workloads)
    text = f"{drawn} of {total} comparisons redraw the search as well as the seeds"
    if number < MINIMUM_WORKLOADS:
        text += f"; {number} of {MINIMUM_WORKLOADS} workloads, so nothing is claimed beyond them"
    return (Mark.PASS if drawn == total else Mark.WARN), text


def _failures(ranking: Ranking) -> tuple[Mark, str]:
    arms = [arm for workload in ranking.workloads for arm in workload.arms]
    failed = [sum(stage.failed for stage in (arm.tune, arm.confirm)) for arm in arms]
    ended = sum(sum(stage.reasons.values()) for arm in arms for stage in (arm.tune, arm.confirm))
    return Mark.PASS, f"{sum(failed)} of {ended} ended trials failed; a failed seed is an infinite error"


def _stability(ranking: Ranking) -> tuple[Mark, str]:
    axes = [axis for axis in (ranking.targets.steps, ranking.targets.seconds) if axis is not None]
    swapped = [*_swapped(ranking.overall.left_out), *(name for axis in axes for name in _swapped(axis.left_out))]
    if not ranking.overall.left_out:
        return Mark.PASS, "fewer than three optimizers: nobody can be left out"
    if not swapped:
        return Mark.PASS, "leaving out any one optimizer keeps the order of the others"
    return Mark.WARN, f"places change without {listed(dict.fromkeys(swapped))}"


def _swapped(left_out: Iterable[LeftOut]) -> list[str]:
    return [one.without for one in left_out if one.swapped]


_JUDGES = {"F13": _sentinels, "F16": _general_claim, "F18": _failures, "F19": _stability}
