from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.__main__ import CHECK_FAILED, DONE, main
from analysis.checks import Status, run_checks
from analysis.learning_curve import learning_curve
from analysis.ledger import arm_ledger
from analysis.load import Run, load
from analysis.ranking import rank
from analysis.step_costs import calibrated_s, time_axis, total_calibrated_s, untimed
from analysis.tuning_curve import tuning_curve
from analysis.wording import ABSENT
from tests.analysis.synthetic_run import HORIZON, RUNG, Plan, write_run
from tunebench.study.record import ENVIRONMENT, Stage
from tunebench.study.step_times import (
    CALIBRATION,
    Calibration,
    DeviceTimes,
    SoloStep,
    TimedStep,
    settings_of,
    write_calibration,
)

ARMS = {"adamw": (0.03, 0.031, 0.032), "soap": (0.02, 0.021, 0.022)}
WORKLOAD = "ethanol-nequip"
PLAIN, REFRESH = 0.010, 0.050
TIMED = {"packages": {"torch": "2.13.0"}, "processor": "EPYC", "gpus": []}


@pytest.fixture(scope="module")
def untimed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("costs") / "run", Plan(arms=ARMS))
    (folder / ENVIRONMENT).write_text(json.dumps(TIMED), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def timed_run(untimed_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shutil.copytree(untimed_run, tmp_path_factory.mktemp("timed") / "run")
    write_calibration(folder, calibration(load(folder)))
    return folder


def calibration(run: Run, **changes: Any) -> Calibration:
    """A file with one table, of which something is changed."""
    return Calibration(schema_version=2, study_hash=run.resolved.hash, tables=(times(run, **changes),))


def times(run: Run, slower: float = 1.0, **changes: Any) -> DeviceTimes:
    """AdamW steps of 10 ms; SOAP steps of 20 ms, 50 ms with a refresh; a spread of a tenth around them."""
    steps = []
    for name, plain, refresh in (("adamw", PLAIN, None), ("soap", 2 * PLAIN, REFRESH)):
        own = [trial.params for trial in run.trials if trial.key.optimizer == name]
        steps += [
            SoloStep(
                workload=WORKLOAD,
                optimizer=name,
                settings=settings,
                engine="cohort",
                threads=1,
                plain=rounds(slower * plain),
                refresh=None if refresh is None else rounds(slower * refresh),
            )
            for settings in settings_of(own, run.resolved.spaces[name])
        ]
    content = {
        "date": "2026-11-22T08:00:00+00:00",
        "device": "EPYC",
        "kind": "cpu",
        "rounds": 3,
        "environment": TIMED,
        "steps": tuple(steps),
    }
    return DeviceTimes(**{**content, **changes})


def rounds(seconds: float) -> TimedStep:
    return TimedStep.of([0.9 * seconds, seconds, 1.1 * seconds], 20)


def warnings(run: Run) -> list[str]:
    return [line for check in run_checks(run) if check.status is not Status.PASSED for line in check.findings]


def test_a_trial_costs_its_steps_times_the_mean_step_of_its_own_refresh_period(timed_run: Path) -> None:
    run = load(timed_run)
    periods = set()
    for trial in run.trials:
        expected = PLAIN
        if trial.key.optimizer == "soap":
            periods.add(period := trial.params["precondition_frequency"])
            expected = 2 * PLAIN + (REFRESH - 2 * PLAIN) / period
        assert calibrated_s(run, trial) == pytest.approx(trial.ledger["steps"] * expected, rel=1e-9)
    assert len(periods) > 2


def test_a_full_run_costs_the_steps_to_the_horizon_and_not_those_lost_to_a_kill(
    timed_run: Path, untimed_run: Path
) -> None:
    for run in (load(timed_run), load(untimed_run)):
        killed = tuple(
            replace(
                trial,
                ledger={**trial.ledger, "lost_steps": float(HORIZON), "device_s": 2.0 * trial.ledger["device_s"]},
            )
            if trial.key.stage is Stage.CONFIRM
            else trial
            for trial in run.trials
        )
        whole, cut = (rank(one).workloads[0].pareto for one in (run, replace(run, trials=killed)))
        assert [point.device_s for point in cut] == pytest.approx([point.device_s for point in whole])
        assert whole[0].device_s == pytest.approx(HORIZON * (PLAIN if whole[0].calibrated else 2 * PLAIN))


def test_the_ledger_keeps_what_was_spent_beside_what_it_costs_alone(timed_run: Path) -> None:
    run = load(timed_run)
    ledger = arm_ledger(run, WORKLOAD, "adamw", Stage.CONFIRM)
    assert ledger.device_s == pytest.approx(3 * HORIZON * 0.02)
    assert ledger.calibrated_s == pytest.approx(3 * HORIZON * PLAIN)


def test_curves_are_drawn_over_calibrated_seconds_for_all_arms_of_a_workload_or_for_none(
    timed_run: Path, untimed_run: Path
) -> None:
    timed, spent = load(timed_run), load(untimed_run)
    assert time_axis(timed, WORKLOAD).words == "calibrated device-seconds"
    assert time_axis(spent, WORKLOAD).words == "device-seconds"
    curve, before = (learning_curve(run, WORKLOAD, "adamw") for run in (timed, spent))
    assert curve is not None
    assert before is not None
    np.testing.assert_allclose(curve.device_s, curve.step * PLAIN)
    np.testing.assert_allclose(before.device_s, before.step * 0.02)
    soap_alone = tuple(step for step in times(timed).steps if step.optimizer == "soap")
    half = replace(timed, calibration=calibration(timed, steps=soap_alone))
    assert not time_axis(half, WORKLOAD).calibrated
    curve = learning_curve(half, WORKLOAD, "soap")
    assert curve is not None
    np.testing.assert_allclose(curve.device_s, curve.step * 0.05)


def test_the_tuning_curve_adds_up_calibrated_seconds_of_stopped_trials_too(timed_run: Path) -> None:
    run = load(timed_run)
    trials = run.arm(WORKLOAD, "adamw", Stage.TUNE)
    curve = tuning_curve(trials, 0, time_axis(run, WORKLOAD))
    assert curve is not None
    assert curve.device_s[-1] == pytest.approx(total_calibrated_s(run, trials))
    assert curve.device_s[-1] == pytest.approx(PLAIN * (3 * HORIZON + 2 * RUNG + RUNG // 2))


def test_a_run_whose_table_fits_it_has_no_finding_about_it(timed_run: Path) -> None:
    assert list(untimed(load(timed_run))) == []


def test_shared_steps_without_a_table_are_a_warning_that_names_the_command(untimed_run: Path) -> None:
    run = load(untimed_run)
    assert list(untimed(run)) == []
    shared = replace(run, trials=tuple(replace(trial, engine="cohort") for trial in run.trials))
    (line,) = untimed(shared)
    assert f"tunebench calibrate {run.path}" in line
    assert line in warnings(shared)


def test_a_table_measured_beside_other_work_is_a_warning(timed_run: Path) -> None:
    run = load(timed_run)
    first, *others = times(run).steps
    shaken = first.model_copy(update={"plain": TimedStep.of([0.5 * PLAIN, PLAIN, 3 * PLAIN], 20)})
    (line,) = untimed(replace(run, calibration=calibration(run, steps=(shaken, *others))))
    assert line.startswith(
        f"1 of {1 + len(others)} entries of {CALIBRATION} have quartiles more than 20% of the median"
    )
    assert line in warnings(replace(run, calibration=calibration(run, steps=(shaken, *others))))


def test_an_arm_that_the_table_leaves_out_is_named_with_its_settings(timed_run: Path) -> None:
    run = load(timed_run)
    steps = tuple(s for s in times(run).steps if s.settings.get("fctp_view") != "merged")
    lines = list(untimed(replace(run, calibration=calibration(run, steps=steps))))
    assert lines
    assert all(line.startswith(f'{WORKLOAD}/soap {{"fctp_view": "merged"}}: ') for line in lines)
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"device": "H200", "kind": "cpu"}, "steps were timed on H200, the run began on EPYC"),
        (
            {"environment": {**TIMED, "packages": {"torch": "2.14.0"}}},
            "steps were timed with torch 2.14.0, trials ran with 2.13.0",
        ),
    ],
)
def test_a_table_from_other_conditions_is_a_warning(timed_run: Path, changes: dict[str, Any], expected: str) -> None:
    run = load(timed_run)
    assert list(untimed(replace(run, calibration=calibration(run, **changes)))) == [expected]


def test_conditions_are_compared_with_those_of_the_runs_last_start(timed_run: Path) -> None:
    run = load(timed_run)
    later = {**run.environment, "later": [{"packages": {"torch": "2.14.0"}}]}
    assert list(untimed(replace(run, environment=later))) == [
        "steps were timed with torch 2.13.0, trials ran with 2.14.0"
    ]


def test_equal_budgets_are_judged_in_calibrated_seconds_where_there_are_such(
    timed_run: Path, untimed_run: Path
) -> None:
    assert any("share of calibrated device-seconds" in line for line in warnings(load(timed_run)))
    (line,) = [line for line in warnings(load(untimed_run)) if "device-seconds" in line]
    assert "calibrated" not in line


def test_the_ranking_says_what_a_step_of_each_winner_takes(timed_run: Path, untimed_run: Path) -> None:
    (workload,) = rank(load(timed_run)).workloads
    (adamw,) = [arm for arm in workload.arms if arm.optimizer == "adamw"]
    assert adamw.step_time is not None
    assert adamw.step_time.median_s == pytest.approx(PLAIN)
    assert adamw.step_time.low_s == pytest.approx(0.95 * PLAIN)
    assert adamw.step_time.high_s == pytest.approx(1.05 * PLAIN)
    (workload,) = rank(load(untimed_run)).workloads
    assert [arm.step_time for arm in workload.arms] == [None, None]


@pytest.fixture(scope="module")
def mixed_run(timed_run: Path) -> Run:
    """A run whose every other trial was on a device that takes twice as long, with tables of both kinds."""
    run = load(timed_run)
    kinds = ("H200", "L4")
    trials = tuple(replace(trial, device=kinds[place % 2]) for place, trial in enumerate(run.trials))
    gpu = {"kind": "cuda", "environment": {}}
    tables = (times(run, device="NVIDIA H200", **gpu), times(run, 2.0, device="NVIDIA L4", accelerator="L4", **gpu))
    own = Calibration(schema_version=2, study_hash=run.resolved.hash, tables=tables)
    return replace(run, trials=trials, calibration=own)


def test_a_trial_is_timed_on_the_kind_of_device_that_trained_it(mixed_run: Run) -> None:
    assert time_axis(mixed_run, WORKLOAD).calibrated
    for trial in mixed_run.arm(WORKLOAD, "adamw"):
        step_s = {"H200": PLAIN, "L4": 2 * PLAIN}[trial.device or ""]
        assert calibrated_s(mixed_run, trial) == pytest.approx(trial.ledger["steps"] * step_s)
    assert list(untimed(mixed_run)) == []


def test_budgets_do_not_depend_on_the_devices_that_trials_met(mixed_run: Run, timed_run: Path) -> None:
    alike = load(timed_run)
    for optimizer in ARMS:
        mixed, same = (arm_ledger(run, WORKLOAD, optimizer, Stage.TUNE) for run in (mixed_run, alike))
        assert mixed.calibrated_s == pytest.approx(same.calibrated_s)


def test_a_kind_of_device_without_a_table_is_named_with_its_trials(mixed_run: Run) -> None:
    assert mixed_run.calibration is not None
    fast = mixed_run.calibration.tables[0]
    without = replace(mixed_run, calibration=mixed_run.calibration.model_copy(update={"tables": (fast,)}))
    (line,) = untimed(without)
    number = sum(trial.device == "L4" for trial in mixed_run.trials)
    assert line.startswith(f"{number} trials were on devices of kind L4, {CALIBRATION} has steps on NVIDIA H200; ")
    assert "--address" in line
    assert line in warnings(without)
    assert not time_axis(without, WORKLOAD).calibrated
    lost = replace(mixed_run, trials=tuple(replace(trial, device=None) for trial in mixed_run.trials))
    (line,) = untimed(lost)
    assert "of a kind that was not written down" in line


def test_trials_that_have_not_begun_need_no_table(mixed_run: Run) -> None:
    waiting = replace(mixed_run.trials[0], device=None, ledger={}, reason=None)
    assert time_axis(replace(mixed_run, trials=(*mixed_run.trials, waiting)), WORKLOAD).calibrated


def words(page: Path) -> str:
    return " ".join(re.sub(r"<[^>]*>|\s+", " ", page.read_text(encoding="utf-8")).split())


def test_the_page_shows_the_table_and_both_sorts_of_seconds(timed_run: Path, tmp_path: Path) -> None:
    assert main([str(timed_run), "--out", str(tmp_path)]) == DONE
    text = words(tmp_path / "index.html")
    assert "alone on EPYC" in text
    assert f"ethanol-nequip adamw cohort 10.0 [9.50, 10.5] {ABSENT} 1.00" in text
    assert re.search(r"soap fctp_view \w+ cohort 20\.0 \[19\.0, 21\.0\] 50\.0 \[47\.5, 52\.5\] 2\.00", text)
    assert "Steps have not been timed" not in text
    with (tmp_path / "tables" / "step_times.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert {(row["optimizer"], row["step"], float(row["median_s"])) for row in rows} == {
        ("adamw", "plain", PLAIN),
        ("soap", "plain", 2 * PLAIN),
        ("soap", "refresh", REFRESH),
    }
    with (tmp_path / "tables" / "trials.csv").open(encoding="utf-8") as stream:
        assert all(float(row["calibrated_s"]) > 0 for row in csv.DictReader(stream))


def test_the_page_of_a_run_without_a_table_says_so_and_which_command_makes_it(
    untimed_run: Path, timed_run: Path, tmp_path: Path
) -> None:
    assert main([str(timed_run), "--out", str(tmp_path)]) == DONE
    assert main([str(untimed_run), "--out", str(tmp_path)]) == DONE
    assert (
        f"Steps have not been timed: no calibration.json that can be read, so times on this page are "
        f"device-seconds as spent; tunebench calibrate {untimed_run} times them." in words(tmp_path / "index.html")
    )
    assert not (tmp_path / "tables" / "step_times.csv").exists()


def test_a_damaged_table_is_a_failed_check_and_the_report_goes_on_without_it(
    timed_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(timed_run, tmp_path / "run")
    text = (folder / CALIBRATION).read_text(encoding="utf-8")
    (folder / CALIBRATION).write_text(text[: len(text) // 2], encoding="utf-8")
    assert main([str(folder)]) == CHECK_FAILED
    assert f"{CALIBRATION}: found" in capsys.readouterr().out
    assert "Steps have not been timed" in words(folder / "report" / "index.html")
    assert load(folder).calibration is None
