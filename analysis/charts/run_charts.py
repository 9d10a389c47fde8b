"""Every chart of a run that has something to show, in the order of the page."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.charts.chart import Chart
from analysis.charts.search_charts import best_of_n_chart, sensitivity_chart, tuning_chart
from analysis.charts.study_charts import study_charts
from analysis.charts.workload_charts import endings_chart, error_chart, learning_chart, pareto_chart
from analysis.load import Run
from analysis.ranking import Ranking

_OF_WORKLOAD = (
    error_chart,
    learning_chart,
    pareto_chart,
    tuning_chart,
    best_of_n_chart,
    sensitivity_chart,
    endings_chart,
)


@dataclass(frozen=True, kw_only=True)
class Charts:
    """Charts by workload, and those over all workloads."""

    by_workload: dict[str, tuple[Chart, ...]]
    of_study: tuple[Chart, ...]

    @property
    def every(self) -> tuple[Chart, ...]:
        """All of them."""
        return (*(chart for charts in self.by_workload.values() for chart in charts), *self.of_study)


def run_charts(run: Run, ranking: Ranking) -> Charts:
    """The charts of a ranked run."""
    by_workload = {
        workload.workload: tuple(chart for make in _OF_WORKLOAD if (chart := make(run, workload)) is not None)
        for workload in ranking.workloads
    }
    return Charts(by_workload=by_workload, of_study=tuple(study_charts(run, ranking)))
