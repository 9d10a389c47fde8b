"""The numbers behind the page as CSV files, in eV, Å and s."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.ledger import ArmLedger, ledgers
from analysis.load import Run
from analysis.ranking import Ranking, WorkloadRanking
from analysis.step_costs import calibrated_s
from analysis.wording import why
from tunebench.study.record import Reason, TrialRecord
from tunebench.study.step_times import DeviceTimes, SoloStep

STEP_TIMES = "step_times.csv"


def write_tables(run: Run, ranking: Ranking, folder: Path) -> None:
    """Write arms.csv, ledger.csv, trials.csv and, where steps were timed, step_times.csv, in eV, Å and s."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_csv(folder / "arms.csv", [row for workload in ranking.workloads for row in _arm_rows(workload)])
    _write_csv(folder / "ledger.csv", [_ledger_row(ledger) for ledger in ledgers(run)])
    _write_csv(folder / "trials.csv", [_trial_row(run, trial) for trial in run.trials])
    (folder / STEP_TIMES).unlink(missing_ok=True)
    if run.calibration is not None:
        rows = [row for table in run.calibration.tables for step in table.steps for row in _step_rows(table, step)]
        _write_csv(folder / STEP_TIMES, rows)


def _write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _arm_rows(workload: WorkloadRanking) -> list[dict[str, Any]]:
    return [
        {
            "workload": workload.workload,
            "optimizer": arm.optimizer,
            "rank": arm.rank,
            "split": summary.split,
            "readout": summary.readout,
            "metric": summary.metric.value,
            "n_seeds": len(summary.values),
            "failed_seeds": len(arm.failed_seeds),
            "iqm": summary.iqm,
            "low": summary.interval.low if summary.interval else None,
            "high": summary.interval.high if summary.interval else None,
            "median": summary.median,
            "mean": summary.mean,
        }
        for arm in workload.arms
        for summary in arm.errors
    ]


def _ledger_row(ledger: ArmLedger) -> dict[str, Any]:
    return {
        "workload": ledger.workload,
        "optimizer": ledger.optimizer,
        "stage": ledger.stage.value,
        "trials": ledger.trials,
        "unfinished": ledger.unfinished,
        "steps": ledger.steps,
        "device_s": ledger.device_s,
        "calibrated_s": ledger.calibrated_s,
        "wall_s": ledger.wall_s,
        **{reason.value: ledger.reasons.get(reason, 0) for reason in Reason},
    }


def _trial_row(run: Run, trial: TrialRecord) -> dict[str, Any]:
    return {
        "trial": trial.key.trial_id,
        "workload": trial.key.workload,
        "optimizer": trial.key.optimizer,
        "stage": trial.key.stage.value,
        "config": trial.key.config_index,
        "seed": trial.key.seed_index,
        "state": trial.state,
        "reason": trial.reason.value if trial.reason else None,
        "detail": why(trial),
        "steps": trial.ledger.get("steps"),
        "device_s": trial.ledger.get("device_s"),
        "calibrated_s": calibrated_s(run, trial),
        "value": trial.value,
        **{f"param.{name}": value for name, value in trial.params.items()},
    }


def _step_rows(table: DeviceTimes, step: SoloStep) -> list[dict[str, Any]]:
    kinds = {"plain": step.plain, "refresh": step.refresh}
    return [
        {
            "device": table.device,
            "workload": step.workload,
            "optimizer": step.optimizer,
            "engine": step.engine,
            "step": kind,
            "median_s": timed.median_s,
            "low_s": timed.low_s,
            "high_s": timed.high_s,
            "rounds": len(timed.rounds_s),
            "steps_per_round": timed.steps_per_round,
            **{f"setting.{name}": value for name, value in step.settings.items()},
        }
        for kind, timed in kinds.items()
        if timed is not None
    ]
