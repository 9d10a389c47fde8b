from __future__ import annotations

from pathlib import Path

from analysis.checks import Status
from analysis.load import load
from analysis.ranking import rank
from benchmarks.report_scale import OPTIMIZERS, POINTS, SEEDS, TOP_K, WORKLOADS, write_run
from tunebench.study.record import Reason


def test_written_run_is_one_that_the_program_could_have_written(tmp_path: Path) -> None:
    run = load(write_run(tmp_path, 300))
    assert len(run.trials) == 300
    assert len(run.curves) == 300 * POINTS
    assert not run.damages
    ranking = rank(run)
    assert ranking.finished
    assert not [check for check in ranking.checks if check.status is Status.FAILED]
    assert {trial.reason for trial in run.trials} == {Reason.FINISHED, Reason.STOPPED_ASHA, Reason.DIVERGED}
    assert [len(workload.arms) for workload in ranking.workloads] == [len(OPTIMIZERS)] * len(WORKLOADS)
    assert {arm.n_seeds for workload in ranking.workloads for arm in workload.arms} == {SEEDS}
    assert {arm.n_configs for workload in ranking.workloads for arm in workload.arms} == {TOP_K}
