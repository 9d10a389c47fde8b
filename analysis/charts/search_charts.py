"""The charts of one workload's search: what it found after which budget, and how much the learning rate matters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from analysis.best_of_n import BestOfN, budget_grid
from analysis.charts.chart import Axis, Chart, Fill, Kind, Mark, Panel, limits
from analysis.figure_style import NEUTRAL, Look, look
from analysis.load import Run
from analysis.ranking import WorkloadRanking
from analysis.statistics import Floats
from analysis.step_costs import time_axis
from analysis.tuning_curve import TuningCurve, ended_value, tuning_curve
from analysis.wording import listed
from tunebench.study.record import Reason, Stage, TrialRecord
from tunebench.study.seeds import named_seed
from tunebench.study.spec import Fidelity, Objective

_PANELS = 4
_MOST_DOTS = 250
"""More trials of an arm are drawn as quantiles over bins of the learning rate."""
_MOST_BANDS = 2
"""More bands of random orders than this hide each other; the expected best of n says the same arm by arm."""
_BINS = 24
_FEWEST_IN_BIN = 3
_MOST_POINTS = 120
_FAINT = Look(light="#B4B8BD", dark="#565C63", marker="")
_ENDINGS = {
    "when stopped by ASHA": Fill.HOLLOW,
    "at the horizon": Fill.FULL,
    "diverged or failed (no value)": Fill.CROSS,
}


def objective_label(objective: Objective) -> str:
    """What the objective adds up, for an axis: weights, quantities and error."""
    weights = {
        "E/atom (eV)": objective.energy_per_atom,
        "F (eV/Å)": objective.forces,
        "σ (eV/Å³)": objective.stress,  # noqa: RUF001
    }
    terms = " + ".join(f"{weight:g}·{name}" for name, weight in weights.items() if weight > 0.0)
    return f"{objective.metric.upper()}: {terms}"


def tuning_chart(run: Run, ranking: WorkloadRanking) -> Chart | None:
    """Best validation objective so far against trials and against device-seconds, stopped and failed work included."""
    axis = time_axis(run, ranking.workload)
    found = {
        arm.optimizer: tuning_curve(
            run.arm(ranking.workload, arm.optimizer, Stage.TUNE),
            named_seed(run.study.seed, "orders", ranking.workload, arm.optimizer),
            axis,
        )
        for arm in ranking.arms
    }
    drawn = {name: curve for name, curve in found.items() if curve is not None and np.isfinite(curve.best).any()}
    if not drawn:
        return None
    low, high = limits((value for curve in drawn.values() for value in curve.best), log=True)
    y = Axis(title=f"best validation objective\n{objective_label(run.study.objective)}", log=True, low=low, high=high)
    bands = len(drawn) <= _MOST_BANDS

    def marks(x_of: Callable[[TuningCurve], Floats], with_band: bool) -> tuple[Mark, ...]:
        found = []
        for name, curve in drawn.items():
            kept = _turning_points(curve.best, with_band)
            low, high = (values[kept] if with_band else None for values in (curve.low, curve.high))
            own = look(name, run.optimizers)
            x, best = x_of(curve)[kept], curve.best[kept]
            found.append(Mark(kind=Kind.STEPS, label=name, look=own, x=x, y=best, low=low, high=high))
        return tuple(found)

    trials = Axis(title="trials of the tune stage", integer=True)
    return Chart(
        name=f"{ranking.workload}-tuning",
        title="What the search had found",
        caption="What the search had found, against the number of trials and against device-seconds, stopped and "
        "failed work included. A stopped trial counts with its objective when it was stopped."
        + (" Band: 80 % of random orders of the same trials." if bands else ""),
        panels=(
            Panel(x=trials, y=y, marks=marks(lambda curve: curve.trials, bands)),
            Panel(x=Axis(title=f"cumulative {axis.words}"), y=y, marks=marks(lambda curve: curve.device_s, False)),
        ),
        columns=2,
    )


def _turning_points(best: Floats, with_band: bool) -> list[int]:
    """Where a curve falls, its ends, and for a band a grid between them."""
    last = len(best) - 1
    falls = np.flatnonzero(np.diff(best, prepend=np.inf) < 0.0).tolist()
    grid = (budget_grid(len(best), most=_MOST_POINTS) - 1).tolist() if with_band else []
    return sorted({0, last, *falls, *grid})


def best_of_n_chart(run: Run, ranking: WorkloadRanking) -> Chart | None:
    """Expected best of n configurations: all trials, with bounds for stopped ones, and sentinels alone."""
    searches = {arm.optimizer: arm.search for arm in ranking.arms if arm.search.best_of_n is not None}
    if not searches:
        return None
    curves = {name: search.best_of_n for name, search in searches.items() if search.best_of_n is not None}
    values = [value for curve in curves.values() for value in (*curve.optimistic, *curve.pessimistic)]
    low, high = limits(values, log=True)
    fewest, most = limits((n for curve in curves.values() for n in curve.n), log=True)
    panels = tuple(
        Panel(
            title=name,
            x=Axis(title="configurations", log=True, low=fewest, high=most, integer=True),
            y=Axis(title="expected best objective", log=True, low=low, high=high),
            marks=(
                *(_stopped_never_improve(other, curve, _FAINT) for other, curve in curves.items() if other != name),
                _all_trials(name, curves[name], look(name, run.optimizers)),
                *_sentinels(name, search.sentinels_best_of_n, look(name, run.optimizers)),
            ),
        )
        for name, search in searches.items()
    )
    return Chart(
        name=f"{ranking.workload}-best-of-n",
        title="Expected best of n configurations",
        caption="What a search of n configurations may expect to find (U-statistic; no order of the trials enters), "
        "grey: the other arms. Line: a stopped trial never improves; band: from there down to stopped trials that end "
        "like their arm's best finisher, with 80 % of bootstraps. Dots with bars: sentinels alone, which nothing "
        f"stopped, with 80 % of bootstraps. Objective: {objective_label(run.study.objective)}.",
        panels=panels,
        columns=min(_PANELS, len(panels)),
        height=11.0,
    )


def _stopped_never_improve(name: str, curve: BestOfN, own: Look) -> Mark:
    return Mark(
        kind=Kind.LINE,
        label=name,
        look=own,
        x=np.array(curve.n, dtype=np.float64),
        y=np.array(curve.pessimistic, dtype=np.float64),
        key=False,
    )


def _all_trials(name: str, curve: BestOfN, own: Look) -> Mark:
    low, high = (np.array(bound, dtype=np.float64) for bound in (curve.low, curve.high))
    return replace(_stopped_never_improve(name, curve, own), low=low, high=high)


def _sentinels(name: str, curve: BestOfN | None, own: Look) -> tuple[Mark, ...]:
    if curve is None:
        return ()
    mark = Mark(
        kind=Kind.DOTS,
        label=f"{name}, sentinels",
        look=own,
        x=np.array(curve.n, dtype=np.float64),
        y=np.array(curve.pessimistic, dtype=np.float64),
        low=np.array(curve.low, dtype=np.float64),
        high=np.array(curve.high, dtype=np.float64),
        key=False,
        words=tuple(f"{name}, best of {n} sentinels" for n in curve.n),
    )
    return (mark,)


def sensitivity_chart(run: Run, ranking: WorkloadRanking) -> Chart | None:
    """Validation objective of every tune trial against its learning rate, one panel per arm."""
    tune = {arm.optimizer: run.arm(ranking.workload, arm.optimizer, Stage.TUNE) for arm in ranking.arms}
    arms = {name: [t for t in trials if t.reason and "learning_rate" in t.params] for name, trials in tune.items()}
    arms = {name: trials for name, trials in arms.items() if trials}
    values = {name: np.array([ended_value(trial) for trial in trials]) for name, trials in arms.items()}
    if not any(np.isfinite(found).any() for found in values.values()):
        return None
    many = max(map(len, arms.values())) > _MOST_DOTS
    low, high = limits(_inner(values.values()) if many else np.concatenate(list(values.values())), log=True)
    y = Axis(title="validation objective", log=True, low=low, high=high * 1.08)
    panels = tuple(
        Panel(
            title=name,
            x=_rate_axis(trials),
            y=y,
            marks=(
                *_sensitivity_marks(trials, values[name], look(name, run.optimizers), high * 1.08),
                *(_ending_keys() if place == 0 and not many else ()),
            ),
        )
        for place, (name, trials) in enumerate(arms.items())
    )
    crosses = " A cross at the top diverged or failed." if any(len(own) <= _MOST_DOTS for own in arms.values()) else ""
    how = (
        f"Arms with more than {_MOST_DOTS} trials are drawn by bins of the learning rate: line: median; band: "
        "quartiles; dots: the best trial of each bin."
        if many
        else "The other hyperparameters vary too."
    )
    return Chart(
        name=f"{ranking.workload}-sensitivity",
        title="Sensitivity to the learning rate",
        caption=f"Sensitivity to the learning rate: every trial of the tune stage. Objective: "
        f"{objective_label(run.study.objective)}. {how}{_stopped_words(run, arms)}{crosses}",
        panels=panels,
        columns=min(_PANELS, len(panels)),
        height=11.0,
    )


def _stopped_words(run: Run, arms: Mapping[str, Sequence[TrialRecord]]) -> str:
    """What the value of a stopped trial is, where some were stopped: rungs may cut a schedule or complete one."""
    stopped = [name for name, own in arms.items() if any(trial.reason is Reason.STOPPED_ASHA for trial in own)]
    rescaled = [name for name in stopped if run.fidelity(name) is Fidelity.RESCALE]
    if not stopped:
        return ""
    whose = f", those of {listed(rescaled)}" if len(rescaled) < len(stopped) else ","
    complete = f"{whose} at the end of a complete schedule of that length" if rescaled else ""
    return f" Stopped trials were measured after fewer steps than finished ones{complete}."


def _rate_axis(trials: Sequence[TrialRecord]) -> Axis:
    low, high = limits((trial.params["learning_rate"] for trial in trials), log=True)
    return Axis(title="learning rate", log=True, low=low, high=high)


def _inner(values: Iterable[Floats]) -> Floats:
    """All but the worst tenth of each arm, which would squeeze the rest."""
    kept = [found[found <= np.quantile(found[np.isfinite(found)], 0.9)] for found in values if np.isfinite(found).any()]
    return np.concatenate(kept)


def _sensitivity_marks(trials: Sequence[TrialRecord], values: Floats, own: Look, top: float) -> tuple[Mark, ...]:
    rates = np.array([trial.params["learning_rate"] for trial in trials], dtype=np.float64)
    if len(trials) > _MOST_DOTS:
        return _binned(rates, values, own)
    finished = np.array([trial.reason is Reason.FINISHED for trial in trials])
    valued = np.isfinite(values)
    marks = []
    for (label, fill), some in zip(_ENDINGS.items(), (valued & ~finished, valued & finished, ~valued), strict=True):
        places = np.flatnonzero(some).tolist()
        y = values[some] if fill is not Fill.CROSS else np.full(len(places), top, dtype=np.float64)
        words = tuple(f"{trials[place].key.trial_id}, {label}" for place in places)
        if places:
            marks.append(
                Mark(kind=Kind.DOTS, label=label, look=own, x=rates[some], y=y, fill=fill, words=words, key=False)
            )
    return tuple(marks)


def _ending_keys() -> list[Mark]:
    """Grey entries of the legend, for every arm's dots have a colour of their own."""
    nothing = np.empty(0, dtype=np.float64)
    return [
        Mark(kind=Kind.DOTS, label=label, look=NEUTRAL, x=nothing, y=nothing, fill=fill)
        for label, fill in _ENDINGS.items()
    ]


def _binned(rates: Floats, values: Floats, own: Look) -> tuple[Mark, ...]:
    """Median, quartiles and best trial over bins of equal width in the logarithm of the rate."""
    edges = np.geomspace(rates.min(), rates.max() * (1.0 + 1e-9), _BINS + 1)
    place = np.clip(np.searchsorted(edges, rates, side="right") - 1, 0, _BINS - 1)
    rows = []
    for bin_number in range(_BINS):
        inside = values[place == bin_number]
        if len(inside) >= _FEWEST_IN_BIN and np.isfinite(inside).any():
            middle = math.sqrt(edges[bin_number] * edges[bin_number + 1])
            quartiles = np.quantile(inside, (0.25, 0.5, 0.75), method="higher")
            rows.append((middle, *quartiles, inside.min()))
    if not rows:
        return ()
    x, low, centre, high, best = np.array(rows, dtype=np.float64).T
    return (
        Mark(kind=Kind.LINE, label="median of a bin", look=own, x=x, y=centre, low=low, high=high, key=False),
        Mark(kind=Kind.DOTS, label="best of a bin", look=own, x=x, y=best, fill=Fill.FAINT, key=False),
    )
