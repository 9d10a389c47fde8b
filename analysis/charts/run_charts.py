"""Every chart of a run that has something to show, in the order of the page."""

from __future__ import annotations

from dataclasses import dataclass

from analysis.charts.chart import Chart
from analysis.charts.curvature_charts import curvature_charts
from analysis.charts.property_charts import property_charts
from analysis.charts.search_charts import best_of_n_chart, sensitivity_chart, tuning_chart
from analysis.charts.study_charts import study_charts
from analysis.charts.workload_charts import endings_chart, error_chart, learning_chart, pareto_chart
from analysis.curvature import Curvature, curvature_of
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
    """Charts by workload, of properties, those over all workloads, and those of curvature with what they show."""

    by_workload: dict[str, tuple[Chart, ...]]
    of_properties: tuple[Chart, ...]
    of_study: tuple[Chart, ...]
    of_curvature: tuple[Chart, ...]
    curvature: Curvature

    @property
    def every(self) -> tuple[Chart, ...]:
        """All of them."""
        of_workloads = (chart for charts in self.by_workload.values() for chart in charts)
        return (*of_workloads, *self.of_properties, *self.of_study, *self.of_curvature)


def run_charts(run: Run, ranking: Ranking) -> Charts:
    """The charts of a ranked run."""
    by_workload = {
        workload.workload: tuple(chart for make in _OF_WORKLOAD if (chart := make(run, workload)) is not None)
        for workload in ranking.workloads
    }
    curvature = curvature_of(run)
    return Charts(
        by_workload=by_workload,
        of_properties=tuple(chart for workload in ranking.workloads for chart in property_charts(run, workload)),
        of_study=tuple(study_charts(run, ranking)),
        of_curvature=tuple(curvature_charts(run, curvature)),
        curvature=curvature,
    )
