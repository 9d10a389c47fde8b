"""Arms that audit others: does a larger budget find what the usual one has missed (rule F17)?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from analysis.arm_result import arm_result
from analysis.checks import Check, Status, checked
from analysis.load import Run
from analysis.statistics import Floats, iqm
from analysis.wording import milli
from tunebench.study.record import Metric, Split
from tunebench.study.spec import Arm

_NAME = "a larger budget finds no better configuration of a baseline (F17)"


def budget_audits(run: Run) -> tuple[Check, ...]:
    """A warning for each workload where an arm with a larger budget is better by more than a seed standard deviation.

    A study without audits has no such check.
    """
    pairs = [(audit, arm) for audit in run.study.optimizers if audit.budget > 1 for arm in _audited(run, audit)]
    if not pairs:
        return ()
    return tuple(checked(_NAME, Status.WARNING, name, _undertuned(run, name, pairs)) for name in run.workloads)


def _audited(run: Run, audit: Arm) -> tuple[Arm, ...]:
    """Ranked arms of the same update rule."""
    return tuple(arm for arm in run.study.optimizers if arm.name in run.rivals and arm.rule == audit.rule)


def _undertuned(run: Run, workload: str, pairs: list[tuple[Arm, Arm]]) -> Iterator[str]:
    for audit, arm in pairs:
        better, usual = (_test_errors(run, workload, name) for name in (audit.name, arm.name))
        if min(len(better), len(usual)) < 2 or not np.isfinite([*better, *usual]).all():
            continue
        found, expected = float(iqm(better)), float(iqm(usual))
        deviation = float(np.sqrt((better.var(ddof=1) + usual.var(ddof=1)) / 2))
        if expected - found > deviation:
            yield (
                f"{audit.budget} times the budget lowers the test force error of {arm.name} from {milli(expected)} to "
                f"{milli(found)} meV/Å, by more than one seed standard deviation ({milli(deviation)}): it was tuned "
                "too little"
            )


def _test_errors(run: Run, workload: str, optimizer: str) -> Floats:
    summary = arm_result(run, workload, optimizer).summary(Split.TEST, Metric.FORCES_MAE)
    return np.array(list(summary.values.values()) if summary else [], dtype=np.float64)
