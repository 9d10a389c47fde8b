"""The charts of one workload's answer: test errors, learning curves, error against cost, endings."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from analysis.arm_result import ArmResult, Summary
from analysis.charts.chart import Along, Axis, Chart, Fill, Kind, Mark, Panel, limits
from analysis.figure_style import REASON_LOOKS, REASON_WORDS, UNENDED, Look, look
from analysis.learning_curve import LearningCurve, learning_curve
from analysis.ledger import FAILURES
from analysis.load import Run
from analysis.ranking import WorkloadRanking
from analysis.statistics import Floats
from analysis.step_costs import time_axis
from tunebench.study.record import OOD_PREFIX, Metric, Reason, Split, TrialRecord

MILLI = 1000.0
_MOST_BANDS = 4
"""More bands than this hide each other and are left out."""
_PANELS = 4
_MILLI_UNITS = {Metric.FORCES_MAE: "force MAE (meV/Å)", Metric.ENERGY_PER_ATOM_MAE: "energy MAE (meV/atom)"}


def error_chart(run: Run, ranking: WorkloadRanking) -> Chart | None:
    """Errors of every arm's best configuration: a dot per seed, IQM and its 95 % interval, best arm on top."""
    if not any(arm.errors for arm in ranking.arms):
        return None
    splits = sorted({s.split for arm in ranking.arms for s in arm.errors if s.split.startswith(OOD_PREFIX)})
    wanted = [(Split.TEST.value, Metric.FORCES_MAE), (Split.TEST.value, Metric.ENERGY_PER_ATOM_MAE)]
    wanted += [(split, Metric.FORCES_MAE) for split in splits]
    panels = tuple(_error_panel(run, ranking, split, metric) for split, metric in wanted[:_PANELS])
    return Chart(
        name=f"{ranking.workload}-errors",
        title="Test errors",
        caption="Test errors of each arm's best configuration. Large mark: interquartile mean over seeds; bar: its "
        "95 % interval, an arrow where it has no end; small dots: seeds. Lower is better.",
        panels=panels,
        columns=len(panels),
        height=3.0 + 2.1 * len(ranking.arms),
    )


def _error_panel(run: Run, ranking: WorkloadRanking, split: str, metric: Metric) -> Panel:
    summaries = {arm.optimizer: arm.summary(split, metric) for arm in ranking.arms}
    known = [(place, name, s) for place, (name, s) in enumerate(summaries.items()) if s is not None]
    low, high = limits((value for _, _, s in known for value in _drawn(s)), log=False, margin=0.06)
    marks = [mark for place, name, s in known for mark in _error_marks(place, name, s, look(name, run.optimizers))]
    return Panel(
        title=split,
        x=Axis(title=_MILLI_UNITS[metric], low=low, high=high),
        y=Axis(title="", ticks=tuple(map(_arm_label, ranking.arms))),
        marks=tuple(marks),
    )


def _drawn(summary: Summary) -> list[float]:
    ends = [summary.interval.low, summary.interval.high] if summary.interval else []
    return [MILLI * value for value in (*summary.values.values(), summary.iqm, *ends)]


def _error_marks(place: int, name: str, summary: Summary, own: Look) -> tuple[Mark, Mark]:
    seeds = MILLI * np.array(list(summary.values.values()), dtype=np.float64)
    words = tuple(f"{name}, seed {seed}" for seed in summary.values)
    faint = Mark(
        kind=Kind.DOTS,
        label=f"{name}, seeds",
        look=own,
        x=seeds,
        y=np.full(len(seeds), place + 0.24, dtype=np.float64),
        fill=Fill.FAINT,
        words=words,
        key=False,
    )
    interval = summary.interval
    ends = (math.nan, math.nan) if interval is None else (MILLI * interval.low, MILLI * interval.high)
    centre = Mark(
        kind=Kind.DOTS,
        label=name,
        look=own,
        x=np.array([MILLI * summary.iqm], dtype=np.float64),
        y=np.array([place - 0.08], dtype=np.float64),
        low=np.array(ends[:1], dtype=np.float64),
        high=np.array(ends[1:], dtype=np.float64),
        along=Along.X,
        words=(f"{name}, interquartile mean",),
        key=False,
    )
    return faint, centre


def _arm_label(arm: ArmResult) -> str:
    if arm.left_no_candidate:
        return f"{arm.optimizer}\n(no candidate)"
    if arm.failed_seeds:
        return f"{arm.optimizer}\n({len(arm.failed_seeds)} of {arm.n_seeds} seeds failed)"
    return arm.optimizer


def learning_chart(run: Run, ranking: WorkloadRanking) -> Chart | None:
    """Validation force error along training of every arm's best configuration, over steps and over device-seconds."""
    found = {arm.optimizer: learning_curve(run, ranking.workload, arm.optimizer) for arm in ranking.arms}
    drawn = {name: curve for name, curve in found.items() if curve is not None}
    if not drawn:
        return None
    bands = len(drawn) <= _MOST_BANDS
    values = [MILLI * value for curve in drawn.values() for value in (*curve.middle, *curve.low, *curve.high)]
    low, high = limits(values, log=True)
    y = Axis(title="validation force MAE (meV/Å)", log=True, low=low, high=high)
    seconds = f"{time_axis(run, ranking.workload).words}, evaluation excluded"

    def marks(x_of: Callable[[LearningCurve], Floats]) -> tuple[Mark, ...]:
        return tuple(
            Mark(
                kind=Kind.LINE,
                label=f"{name}{_seeds_drawn(curve)}",
                look=look(name, run.optimizers),
                x=x_of(curve),
                y=MILLI * curve.middle,
                low=MILLI * curve.low if bands else None,
                high=MILLI * curve.high if bands else None,
            )
            for name, curve in drawn.items()
        )

    return Chart(
        name=f"{ranking.workload}-learning",
        title="Learning curves",
        caption="Learning curves of the best configurations in the confirm stage. Line: median over the seeds that "
        "finished" + ("; band: lowest to highest of them." if bands else "."),
        panels=(
            Panel(x=Axis(title="optimizer steps"), y=y, marks=marks(lambda curve: curve.step)),
            Panel(x=Axis(title=seconds), y=y, marks=marks(lambda curve: curve.device_s)),
        ),
        columns=2,
    )


def _seeds_drawn(curve: LearningCurve) -> str:
    return "" if curve.drawn_seeds == curve.seeds else f" ({curve.drawn_seeds} of {curve.seeds} seeds)"


def pareto_chart(run: Run, ranking: WorkloadRanking) -> Chart | None:
    """Error against device-seconds of a full run; a line joins the arms that nobody beats in both."""
    points = [point for point in ranking.pareto if math.isfinite(point.error)]
    if len(points) < 2:
        return None
    front = [point for point in points if point.on_front]
    kind = "calibrated" if points[0].calibrated else "as spent"
    joined = Mark(
        kind=Kind.STEPS,
        label="front",
        look=Look(light="#555555", dark="#B0B0B0", marker="", dash=2),
        x=np.array([point.device_s for point in front], dtype=np.float64),
        y=MILLI * np.array([point.error for point in front], dtype=np.float64),
        key=False,
    )
    marks = [
        Mark(
            kind=Kind.DOTS,
            label=point.optimizer,
            look=look(point.optimizer, run.optimizers),
            x=np.array([point.device_s], dtype=np.float64),
            y=np.array([MILLI * point.error], dtype=np.float64),
            fill=Fill.FULL if point.on_front else Fill.HOLLOW,
            words=("on the front" if point.on_front else f"beaten in both by {', '.join(point.dominated_by)}",),
        )
        for point in points
    ]
    costs, errors = [point.device_s for point in points], [MILLI * point.error for point in points]
    x, y = limits(costs, log=False, margin=0.12), limits(errors, log=False, margin=0.12)
    return Chart(
        name=f"{ranking.workload}-pareto",
        title="Error against cost",
        caption="Error against the cost of one full run of the best configuration. Filled: on the front, no other arm "
        "is at least as good in both and better in one; dotted: what the front reaches at a cost.",
        panels=(
            Panel(
                x=Axis(title=f"device-seconds of a full run, {kind}", low=x[0], high=x[1]),
                y=Axis(title="test force MAE (meV/Å)", low=y[0], high=y[1]),
                marks=(joined, *marks),
            ),
        ),
        columns=1,
        height=14.0,
    )


def endings_chart(run: Run, ranking: WorkloadRanking) -> Chart | None:
    """How the trials of every arm ended, as numbers of trials and as device-seconds, both stages together."""
    names = [arm.optimizer for arm in ranking.arms]
    if not any(run.arm(ranking.workload, name) for name in names):
        return None
    counted = _endings(run, ranking.workload, names, lambda trial: 1.0)
    spent = _endings(run, ranking.workload, names, lambda trial: trial.ledger.get("device_s", 0.0))
    y = Axis(title="", ticks=tuple(names))
    return Chart(
        name=f"{ranking.workload}-endings",
        title="How trials ended",
        caption="Where every trial ended, both stages together.",
        panels=(
            Panel(x=Axis(title="trials", integer=True), y=y, marks=counted),
            Panel(x=Axis(title="device-seconds"), y=y, marks=spent),
        ),
        columns=2,
        height=3.0 + 1.9 * len(names),
    )


def _endings(run: Run, workload: str, names: list[str], weight: Callable[[TrialRecord], float]) -> tuple[Mark, ...]:
    start = np.zeros(len(names), dtype=np.float64)
    totals: dict[Reason | None, Floats] = {}
    for place, name in enumerate(names):
        for trial in run.arm(workload, name):
            totals.setdefault(trial.reason, np.zeros(len(names), dtype=np.float64))[place] += weight(trial)
    marks = []
    for reason in (Reason.FINISHED, Reason.STOPPED_ASHA, *FAILURES, None):
        if reason not in totals:
            continue
        end = start + totals[reason]
        marks.append(
            Mark(
                kind=Kind.BARS,
                label="not ended" if reason is None else REASON_WORDS[reason],
                look=UNENDED if reason is None else REASON_LOOKS[reason],
                x=totals[reason],
                y=np.arange(len(names), dtype=np.float64),
                low=start,
                high=end,
                along=Along.X,
            )
        )
        start = end
    return tuple(marks)
