"""The figures of a report. Each function draws one workload and returns ``None`` when there is nothing to draw yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from analysis.arm_result import ArmResult, Summary
from analysis.figure_style import REASON_COLOURS, REASON_WORDS, WIDTH_INCHES, colour, marker
from analysis.learning_curve import LearningCurve, learning_curve
from analysis.ledger import FAILURES
from analysis.load import Run
from analysis.ranking import WorkloadRanking
from analysis.step_costs import time_axis
from analysis.tuning_curve import ended_value, tuning_curve
from tunebench.study.record import OOD_PREFIX, Metric, Reason, Split, Stage, TrialRecord
from tunebench.study.seeds import named_seed
from tunebench.study.spec import Objective

MILLI = 1000.0
_PANELS = 4
_BANDS = 4
"""More bands than this hide each other and are left out."""
_MILLI_UNITS = {Metric.FORCES_MAE: "force MAE (meV/Å)", Metric.ENERGY_PER_ATOM_MAE: "energy MAE (meV/atom)"}


# Ticks of a decade by the span (highest over lowest) of the axis.
_LOG_TICKS = (
    (4.0, (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)),
    (15.0, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)),
    (300.0, (1.0, 2.0, 5.0)),
    (math.inf, (1.0,)),
)


def objective_label(objective: Objective) -> str:
    """What the objective adds up, for an axis: weights, quantities and error."""
    weights = {
        "E/atom (eV)": objective.energy_per_atom,
        "F (eV/Å)": objective.forces,
        "σ (eV/Å³)": objective.stress,  # noqa: RUF001
    }
    terms = " + ".join(f"{weight:g}·{name}" for name, weight in weights.items() if weight > 0.0)
    return f"{objective.metric.upper()}: {terms}"


def error_figure(run: Run, ranking: WorkloadRanking) -> Figure | None:
    """Errors of every arm's best configuration: a dot per seed, IQM and its 95 % interval, best arm on top."""
    splits = sorted({s.split for arm in ranking.arms for s in arm.errors if s.split.startswith(OOD_PREFIX)})
    wanted = [(Split.TEST.value, Metric.FORCES_MAE), (Split.TEST.value, Metric.ENERGY_PER_ATOM_MAE)]
    wanted += [(split, Metric.FORCES_MAE) for split in splits]
    wanted = wanted[:_PANELS]
    if not any(arm.errors for arm in ranking.arms):
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 0.75 + 0.34 * len(ranking.arms)), layout="constrained")
    panels = figure.subplots(1, len(wanted), sharey=True, squeeze=False)[0]
    for axes, (split, metric) in zip(panels, wanted, strict=True):
        for place, arm in enumerate(ranking.arms):
            summary = arm.summary(split, metric)
            if summary is not None:
                _error_row(axes, place, summary, colour(arm.optimizer, run.optimizers))
        axes.set_title(split, loc="left")
        axes.set_xlabel(_MILLI_UNITS[metric])
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x")
        axes.margins(x=0.08)
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(ranking.arms)), [_arm_label(arm) for arm in ranking.arms])
    panels[0].set_ylim(len(ranking.arms) - 0.5, -0.5)
    figure.align_xlabels(panels)
    return figure


def _arm_label(arm: ArmResult) -> str:
    if arm.left_no_candidate:
        return f"{arm.optimizer}\n(no candidate)"
    if arm.failed_seeds:
        return f"{arm.optimizer}\n({len(arm.failed_seeds)} of {arm.n_seeds} seeds failed)"
    return arm.optimizer


def _error_row(axes: Axes, place: int, summary: Summary, shade: str) -> None:
    finite = [MILLI * value for value in summary.values.values() if math.isfinite(value)]
    axes.plot(finite, [place + 0.22] * len(finite), "o", color=shade, markersize=2.5, alpha=0.55, markeredgewidth=0)
    if math.isfinite(summary.iqm):
        axes.plot(MILLI * summary.iqm, place - 0.08, "o", color=shade, markersize=4.5)
    interval = summary.interval
    if interval is None or not math.isfinite(interval.low):
        return
    if math.isfinite(interval.high):
        ends = [MILLI * interval.low, MILLI * interval.high]
        axes.plot(ends, [place - 0.08] * 2, color=shade, linewidth=1.6, solid_capstyle="butt")
        return
    # Without an upper end the interval leaves the panel.
    start = (MILLI * interval.low, place - 0.08)
    edge: dict[str, Any] = {"textcoords": ("axes fraction", "data"), "xycoords": "data"}
    arrow = {"arrowstyle": "<-", "color": shade, "linewidth": 1.6, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=start, xytext=(1.0, place - 0.08), **edge, arrowprops=arrow)
    axes.update_datalim([start])


def learning_figure(run: Run, ranking: WorkloadRanking) -> Figure | None:
    """Validation force error along training of every arm's best configuration, over steps and over device-seconds."""
    curves = {arm.optimizer: learning_curve(run, ranking.workload, arm.optimizer) for arm in ranking.arms}
    drawn: dict[str, LearningCurve] = {name: curve for name, curve in curves.items() if curve is not None}
    if not drawn:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 2.7), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for name, curve in drawn.items():
        shade = colour(name, run.optimizers)
        style: dict[str, Any] = {"color": shade, "marker": marker(name, run.optimizers)}
        style["markevery"] = max(1, len(curve.step) // 6)
        by_step.fill_between(curve.step, MILLI * curve.low, MILLI * curve.high, color=shade, alpha=0.15, linewidth=0)
        by_step.plot(curve.step, MILLI * curve.middle, **style)
        by_time.plot(curve.device_s, MILLI * curve.middle, **style)
    by_step.set_xlabel("optimizer steps")
    by_time.set_xlabel(f"{time_axis(run, ranking.workload).words}, evaluation excluded")
    by_step.set_ylabel("validation force MAE (meV/Å)")
    for axes in (by_step, by_time):
        _log_y(axes)
        axes.margins(x=0.02)
    _legend(figure, run, {name: _seeds_drawn(curve) for name, curve in drawn.items()})
    return figure


def _seeds_drawn(curve: LearningCurve) -> str:
    return "" if curve.drawn_seeds == curve.seeds else f" ({curve.drawn_seeds} of {curve.seeds} seeds)"


def tuning_figure(run: Run, ranking: WorkloadRanking) -> Figure | None:
    """Best validation objective so far against trials and against device-seconds, stopped and failed work included."""
    workload = ranking.workload
    axis = time_axis(run, workload)
    curves = {
        arm.optimizer: tuning_curve(
            run.arm(workload, arm.optimizer, Stage.TUNE),
            named_seed(run.study.seed, "orders", workload, arm.optimizer),
            axis,
        )
        for arm in ranking.arms
    }
    drawn = {name: curve for name, curve in curves.items() if curve is not None and np.isfinite(curve.best).any()}
    if not drawn:
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 2.7), layout="constrained")
    by_trials, by_time = figure.subplots(1, 2, sharey=True)
    finite = np.concatenate([curve.best[np.isfinite(curve.best)] for curve in drawn.values()])
    low, high = float(finite.min()) / 1.15, 1.3 * float(finite.max())
    for name, curve in drawn.items():
        shade = colour(name, run.optimizers)
        style: dict[str, Any] = {"color": shade, "marker": marker(name, run.optimizers), "drawstyle": "steps-post"}
        band = np.minimum(curve.low, high), np.minimum(curve.high, high)
        if len(drawn) <= _BANDS:
            by_trials.fill_between(curve.trials, *band, step="post", color=shade, alpha=0.12, linewidth=0)
        by_trials.plot(curve.trials, curve.best, **style, markevery=_improvements(curve.best))
        by_time.plot(curve.device_s, curve.best, **style, markevery=_improvements(curve.best))
    by_trials.set_xlabel("trials of the tune stage")
    by_trials.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_time.set_xlabel(f"cumulative {axis.words}")
    by_trials.set_ylabel(f"best validation objective\n{objective_label(run.study.objective)}")
    for axes in (by_trials, by_time):
        axes.set_ylim(low, high)
        _log_y(axes)
    _legend(figure, run, dict.fromkeys(drawn, ""))
    return figure


def _improvements(best: np.ndarray[Any, Any]) -> list[int]:
    return [index for index in range(len(best)) if index == 0 or best[index] < best[index - 1]]


def sensitivity_figure(run: Run, ranking: WorkloadRanking) -> Figure | None:
    """Validation objective of every tune trial against its learning rate, one panel per arm."""
    tune = {arm.optimizer: run.arm(ranking.workload, arm.optimizer, Stage.TUNE) for arm in ranking.arms}
    arms = {name: [t for t in trials if t.reason and "learning_rate" in t.params] for name, trials in tune.items()}
    arms = {name: trials for name, trials in arms.items() if trials}
    values = [value for trials in arms.values() for trial in trials if math.isfinite(value := ended_value(trial))]
    if not values:
        return None
    columns = min(_PANELS, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure = Figure(figsize=(WIDTH_INCHES, 0.5 + 1.75 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    limits = min(values) / 1.25, 1.35 * max(values)
    for axes, (name, trials) in zip(panels.flat, arms.items(), strict=False):
        _sensitivity_panel(axes, trials, limits, colour(name, run.optimizers), marker(name, run.optimizers))
        axes.set_title(name, loc="left", pad=8.0)
        axes.set_xlabel("learning rate")
    for axes in panels.flat[len(arms) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("validation objective")
    figure.legend(handles=_sensitivity_key(), loc="outside lower center", ncols=3)
    return figure


def _sensitivity_panel(
    axes: Axes, trials: Sequence[TrialRecord], limits: tuple[float, float], shade: str, shape: str
) -> None:
    axes.set_xscale("log")
    axes.set_ylim(*limits)
    _log_y(axes)
    rates = np.array([trial.params["learning_rate"] for trial in trials], dtype=np.float64)
    values = np.array([ended_value(trial) for trial in trials], dtype=np.float64)
    valued, finished = np.isfinite(values), np.array([trial.reason is Reason.FINISHED for trial in trials])
    for some, face in ((valued & ~finished, "white"), (valued & finished, shade)):
        axes.plot(rates[some], values[some], shape, color=shade, markerfacecolor=face, markersize=4.5)
    if not valued.all():  # an empty line that is not clipped has no extent, and the layout gives up
        top = np.full(int((~valued).sum()), limits[1], dtype=np.float64)
        axes.plot(rates[~valued], top, "x", color=shade, markersize=5, clip_on=False, zorder=3)
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(LogLocator(numticks=4))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _sensitivity_key() -> list[Line2D]:
    grey = "#444444"
    return [
        Line2D([], [], marker="o", linestyle="", color=grey, label="at the horizon"),
        Line2D([], [], marker="o", linestyle="", color=grey, markerfacecolor="white", label="when stopped by ASHA"),
        Line2D([], [], marker="x", linestyle="", color=grey, label="diverged or failed (no value)"),
    ]


def endings_figure(run: Run, ranking: WorkloadRanking) -> Figure | None:
    """How the trials of every arm ended, as numbers of trials and as device-seconds, both stages together."""
    names = [arm.optimizer for arm in ranking.arms]
    if not any(trial.key.workload == ranking.workload for trial in run.trials):
        return None
    figure = Figure(figsize=(WIDTH_INCHES, 1.05 + 0.3 * len(names)), layout="constrained")
    by_count, by_time = figure.subplots(1, 2, sharey=True)
    _stack(by_count, run, ranking.workload, names, lambda trial: 1.0)
    _stack(by_time, run, ranking.workload, names, lambda trial: trial.ledger.get("device_s", 0.0))
    by_count.set_yticks(range(len(names)), names)
    by_count.set_ylim(len(names) - 0.5, -0.5)
    by_count.set_xlabel("trials")
    by_count.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    by_time.set_xlabel("device-seconds")
    by_time.xaxis.set_major_locator(MaxNLocator(5))
    for axes in (by_count, by_time):
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0.0, 1.04 * axes.dataLim.x1 or 1.0)
    handles, labels = by_count.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(handles)))
    return figure


def _stack(axes: Axes, run: Run, workload: str, names: Sequence[str], weight: Callable[[TrialRecord], float]) -> None:
    left = np.zeros(len(names), dtype=np.float64)
    for reason in (Reason.FINISHED, Reason.STOPPED_ASHA, *FAILURES, None):
        widths = np.array(
            [sum(weight(t) for t in run.arm(workload, name) if t.reason is reason) for name in names], dtype=np.float64
        )
        if not any(trial.reason is reason for name in names for trial in run.arm(workload, name)):
            continue
        shade, label = ("white", "not ended") if reason is None else (REASON_COLOURS[reason], REASON_WORDS[reason])
        edge = "#888888" if reason is None else shade
        style: dict[str, Any] = {"height": 0.62, "color": shade, "edgecolor": edge, "linewidth": 0.6, "label": label}
        axes.barh(range(len(names)), widths, left=left, **style)
        left += widths


def _log_y(axes: Axes) -> None:
    """Logarithmic axis with plain numbers, readable also when it spans less than a decade."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = next(subs for span, subs in _LOG_TICKS if high / low < span)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(axis="y")


def _legend(figure: Figure, run: Run, remarks: Mapping[str, str]) -> None:
    """One legend under the panels: optimizer names, each with its remark."""
    handles = [
        Line2D([], [], color=colour(name, run.optimizers), marker=marker(name, run.optimizers), label=f"{name}{remark}")
        for name, remark in remarks.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)))
