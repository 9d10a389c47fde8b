from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from analysis.charts.chart import Along, Axis, Chart, Fill, Kind, Mark, Panel, chart_rows, log_ticks
from analysis.charts.drawn import draw
from analysis.charts.plotly_form import dark_colours, looks_of, plotly_form
from analysis.charts.run_charts import run_charts
from analysis.charts.search_charts import sensitivity_chart
from analysis.charts.study_charts import study_charts
from analysis.figure_style import NEUTRAL, REASON_LOOKS, figure_style, look
from analysis.load import Run, load
from analysis.mean_ranks import mean_ranks
from analysis.ranking import Ranking, WorkloadRanking, rank
from analysis.verdict import Verdict
from tests.analysis.contrast import contrast
from tests.analysis.synthetic_run import Plan, write_run
from tunebench.study.search_space import shipped_optimizers

ARMS = {"adamw": (0.03, 0.031, 0.032, 0.033, 0.034), "soap": (0.02, 0.021, np.inf, np.inf, np.inf)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    plan = Plan(arms=ARMS, workloads=("ethanol-nequip", "ethanol-allegro"), sentinels=5, trials_per_arm=9)
    return load(write_run(tmp_path_factory.mktemp("charts") / "run", plan))


@pytest.fixture(scope="module")
def ranking(run: Run) -> Ranking:
    return rank(run)


def one(mark: Mark, **axes: Any) -> Chart:
    panel = Panel(x=Axis(title="x", **axes), y=Axis(title="y"), marks=(mark,))
    return Chart(name="one", title="One", caption="One.", panels=(panel,), columns=1)


def test_plotly_accepts_every_trace_and_both_layouts(run: Run, ranking: Ranking) -> None:
    charts = run_charts(run, ranking).every
    assert len(charts) == 13  # with one arm that has an error there is no front
    for chart in charts:
        form = plotly_form(chart)
        for layout in (form["wide"], form["narrow"]):
            go.Figure(data=form["data"], layout=layout)


def test_panels_side_by_side_stand_one_below_the_other_in_a_narrow_window(run: Run, ranking: Ranking) -> None:
    chart = next(chart for chart in run_charts(run, ranking).every if chart.name.endswith("-learning"))
    form = plotly_form(chart)
    assert form["wide"]["xaxis2"]["domain"][0] > 0.5
    assert form["narrow"]["xaxis2"]["domain"] == [0.0, 1.0]
    assert form["narrow"]["yaxis2"]["domain"][1] < form["narrow"]["yaxis"]["domain"][0]
    assert form["narrow"]["height"] > form["wide"]["height"]


def test_an_interval_without_an_end_leaves_the_panel_as_an_arrow_and_stays_infinite_in_the_table() -> None:
    point, far = np.array([2.0]), np.array([np.inf])
    mark = Mark(kind=Kind.DOTS, label="a", look=NEUTRAL, x=point, y=point, low=point - 1.0, high=far, along=Along.X)
    chart = one(mark, low=0.0, high=5.0)
    assert next(chart_rows(chart))[-3:] == (1.0, np.inf, "")
    arrow, dot = plotly_form(chart)["data"]
    assert (arrow["x"], arrow["marker"]["symbol"]) == ([5.0], "triangle-right")
    assert (dot["error_x"]["array"], dot["error_x"]["arrayminus"]) == ([3.0], [1.0])
    with figure_style():
        lines = draw(chart).axes[0].lines
    assert [line.get_xdata()[-1] for line in lines] == [5.0, 5.0, 2.0]


def test_what_has_no_place_is_a_gap() -> None:
    mark = Mark(kind=Kind.LINE, label="a", look=NEUTRAL, x=np.array([1.0, 2.0]), y=np.array([1.0, np.inf]))
    assert plotly_form(one(mark))["data"][0]["y"] == [1.0, None]


def test_optimizers_look_different_and_can_be_seen_on_both_pages() -> None:
    names = shipped_optimizers()
    looks = [look(name, names) for name in names]
    assert len({(found.light, found.dark) for found in looks}) == len(names)
    assert len({found.marker for found in looks}) == len(names)
    for found in (*looks, *(look(name, ("x1", "x2", "x3")) for name in ("x1", "x2", "x3")), NEUTRAL):
        assert contrast(found.light, "#FFFFFF") >= 3.0, found
        assert contrast(found.dark, "#16191D") >= 3.0, found
    assert len({found.light for found in REASON_LOOKS.values()}) == len(REASON_LOOKS)


def test_every_colour_of_the_light_page_has_one_of_the_dark(run: Run, ranking: Ranking) -> None:
    charts = run_charts(run, ranking).every
    used = set(re.findall(r"#[0-9A-F]{6}", str([plotly_form(chart)["data"] for chart in charts])))
    assert used - {"#888888"} <= set(dark_colours(looks_of(charts)))


def test_many_trials_of_an_arm_are_drawn_by_bins(run: Run, ranking: Ranking) -> None:
    generator = np.random.default_rng(1)
    trials = list(run.trials)
    some = next(trial for trial in trials if trial.key.trial_id == "ethanol-nequip.adamw.tune.c001.s0")
    many = tuple(
        dataclasses.replace(
            some,
            key=dataclasses.replace(some.key, config_index=place),
            params={**some.params, "learning_rate": float(10.0 ** generator.uniform(-4, -1))},
            value=float(generator.uniform(0.1, 1.0)),
        )
        for place in range(5000)
    )
    crowded = dataclasses.replace(run, trials=many)
    chart = sensitivity_chart(crowded, ranking.workloads[0])
    assert chart is not None
    points = [len(mark.x) for panel in chart.panels for mark in panel.marks]
    assert max(points) <= 24
    assert "A cross" not in chart.caption
    assert "Stopped trials" not in chart.caption
    line = next(mark for mark in chart.panels[0].marks if mark.kind is Kind.LINE)
    assert line.low is not None
    assert line.high is not None
    assert (line.low <= line.y).all()
    assert (line.y <= line.high).all()


def test_a_stopped_trial_is_said_to_have_ended_a_schedule_where_rungs_rescale(
    run: Run, ranking: Ranking, tmp_path: Path
) -> None:
    chart = sensitivity_chart(run, ranking.workloads[0])
    assert chart is not None
    assert "after fewer steps than finished ones, at the end of a complete schedule of that length." in chart.caption
    assert "A cross at the top" in chart.caption
    constant = {"soap": {"schedule": {"kind": "constant"}}}
    mixed = load(write_run(tmp_path / "run", Plan(arms={"adamw": (0.03,), "soap": (0.02,)}, settings=constant)))
    found = sensitivity_chart(mixed, rank(mixed).workloads[0])
    assert found is not None
    assert "finished ones, those of adamw at the end of a complete schedule of that length." in found.caption


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Run:
    arms = {"adamw": (0.03, 0.031, 0.032, 0.033, 0.034), "soap": (0.02, 0.021, 0.022, 0.023, 0.024)}
    plan = Plan(arms=arms, workloads=tuple(f"w{place}" for place in range(6)), trials_per_arm=3)
    return load(write_run(tmp_path_factory.mktemp("six") / "run", plan))


def test_mean_ranks_are_drawn_for_six_workloads_that_separate_two_optimizers_and_only_if_all_may_speak(
    six: Run,
) -> None:
    ranking = rank(six)
    (chart,) = [chart for chart in study_charts(six, ranking) if chart.name == "mean-ranks"]
    assert {row[1] for row in chart_rows(chart)} >= {"adamw", "soap"}
    with figure_style():
        assert draw(chart).axes
    last = ranking.workloads[-1]
    changes: dict[str, WorkloadRanking] = {
        "no verdict is allowed on w5": dataclasses.replace(last, finished=False),
        "allowed on w5": dataclasses.replace(last, decision=dataclasses.replace(last.decision, barred=True)),
        "an exploratory search ranks nothing": dataclasses.replace(
            last, decision=dataclasses.replace(last.decision, verdict=Verdict.EXPLORATORY)
        ),
    }
    for reason, changed in changes.items():
        silent = dataclasses.replace(ranking, workloads=(*ranking.workloads[:-1], changed))
        assert reason in str(mean_ranks(silent))
        assert not [chart for chart in study_charts(six, silent) if chart.name == "mean-ranks"]


def test_sentinels_have_a_best_of_n_of_their_own(run: Run, ranking: Ranking) -> None:
    search = ranking.workloads[0].arms[0].search
    assert search.best_of_n is not None
    assert search.sentinels_best_of_n is not None
    assert search.sentinels_best_of_n.n == (1, 2, 3, 4, 5)
    assert search.sentinels_best_of_n.optimistic == search.sentinels_best_of_n.pessimistic
    assert search.censored == 2
    assert search.false_stops is not None
    assert search.false_stops.sentinels == 5
    chart = next(chart for chart in run_charts(run, ranking).every if chart.name == "ethanol-nequip-best-of-n")
    dots = [mark for panel in chart.panels for mark in panel.marks if mark.kind is Kind.DOTS]
    assert [mark.fill for mark in dots] == [Fill.FULL, Fill.FULL]


@pytest.mark.parametrize(
    ("low", "high", "most", "expected"),
    [
        (0.9, 1200.0, 4, [1.0, 10.0, 100.0, 1000.0]),
        (0.9, 1200.0, 8, [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]),
        (2.0, 7.0, 8, [2.0, 3.0, 4.0, 5.0, 6.0]),
        (0.0305, 0.0335, 8, [0.0305, 0.031, 0.0315, 0.032, 0.0325, 0.033, 0.0335]),
        (1e-9, 1e9, 4, [1e-9, 1e-4, 1e1, 1e6]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_round_and_few(
    low: float, high: float, most: int, expected: list[float]
) -> None:
    assert log_ticks(Axis(title="", log=True, low=low, high=high), most) == pytest.approx(expected)


def test_files_are_named_after_charts_alike_on_every_system(run: Run, ranking: Ranking) -> None:
    names = [chart.name for chart in run_charts(run, ranking).every]
    assert len(set(names)) == len(names)
    assert all(Path(name).name == name and re.fullmatch(r"[\w.-]+", name) for name in names)


def test_panels_of_a_row_share_one_title_of_the_vertical_axis_and_empty_places_stay_empty() -> None:
    mark = Mark(kind=Kind.LINE, label="a", look=NEUTRAL, x=np.array([1.0, 2.0]), y=np.array([1.0, 2.0]))
    panel = Panel(x=Axis(title="steps"), y=Axis(title="error"), marks=(mark,))
    chart = Chart(name="three", title="Three", caption="Three.", panels=(panel,) * 3, columns=2)
    with figure_style():
        axes = draw(chart).axes
    assert [one.get_ylabel() for one in axes] == ["error", "", "error", ""]
    assert [one.get_visible() for one in axes] == [True, True, True, False]
