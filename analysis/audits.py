"""Arms that audit others: does a larger budget find what the usual one has missed (rule F17)?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from analysis.arm_result import ArmResult
from analysis.checks import Check, Status, checked
from analysis.comparison import pooled_deviation
from analysis.load import Run
from analysis.statistics import Floats, iqm
from analysis.wording import milli
from tunebench.study.record import Metric, Split
from tunebench.study.spec import Arm

_NAME = "a larger budget finds no better configuration of a baseline (F17)"


def budget_audits(run: Run, results: Mapping[str, Sequence[ArmResult]]) -> tuple[Check, ...]:
    """A warning for each workload where an arm with a larger budget is better by more than a seed standard deviation.

    A study without audits has no such check.

    Args:
        run: the run.
        results: of all its arms, by workload.
    """
    pairs = [(audit, arm) for audit in run.study.optimizers if audit.budget > 1 for arm in _audited(run, audit)]
    if not pairs:
        return ()
    return tuple(checked(_NAME, Status.WARNING, name, _undertuned(results[name], pairs)) for name in run.workloads)


def _audited(run: Run, audit: Arm) -> tuple[Arm, ...]:
    """Ranked arms of the same update rule."""
    return tuple(arm for arm in run.study.optimizers if arm.name in run.rivals and arm.rule == audit.rule)


def _undertuned(results: Sequence[ArmResult], pairs: list[tuple[Arm, Arm]]) -> Iterator[str]:
    errors = {result.optimizer: _test_errors(result) for result in results}
    for audit, arm in pairs:
        better, usual = errors[audit.name], errors[arm.name]
        deviation = pooled_deviation(better, usual, fewest=2)
        if deviation is None or not np.isfinite([*better, *usual]).all():
            continue
        found, expected = float(iqm(better)), float(iqm(usual))
        if expected - found > deviation:
            yield (
                f"{audit.budget} times the budget lowers the test force error of {arm.name} from {milli(expected)} to "
                f"{milli(found)} meV/Å, by more than one seed standard deviation ({milli(deviation)}): it was tuned "
                "too little"
            )


def _test_errors(result: ArmResult) -> Floats:
    summary = result.summary(Split.TEST, Metric.FORCES_MAE)
    return np.array(list(summary.values.values()) if summary else [], dtype=np.float64)
