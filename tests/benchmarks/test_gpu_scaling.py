"""Numbers of runs on several devices, from logs that are written as a cohort writes them."""

from __future__ import annotations

import argparse
import logging
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from benchmarks.gpu_scaling import (
    Sampler,
    Scaled,
    Use,
    changed,
    powers_of_two,
    surroundings,
    told,
    within,
    work_by_device,
)
from tunebench.tuning.trial_log import LOGS, log_to
from tunebench.tuning.work_log import WorkLine, WorkLog, on_gpu

START = datetime(2026, 11, 23, 1, 0, 0)


def line(began_s: float, ended_s: float, worked_s: float, trial_steps: int, waits_s: float = 0.0) -> WorkLine:
    """A line of which evaluations are a quarter of the work, and files and orders as long as `waits_s` each."""
    begins, ends = (START + timedelta(seconds=seconds) for seconds in (began_s, ended_s))
    return WorkLine(
        began=begins,
        ended=ends,
        worked_s=worked_s,
        evaluating_s=worked_s / 4,
        writing_s=waits_s,
        obeying_s=2 * waits_s,
        trial_steps=trial_steps,
    )


def test_a_line_counts_by_the_part_of_it_that_is_in_the_window() -> None:
    lines = [line(0, 10, 8, 1000, 0.5), line(10, 20, 10, 2000), line(30, 40, 5, 400, 1.0)]
    assert within(lines, *(START + timedelta(seconds=s) for s in (5, 35))) == line(5, 35, 16.5, 2700, 0.75)


def test_cohorts_that_had_one_gpu_after_the_other_are_one_device(tmp_path: Path) -> None:
    for number, gpu in enumerate(("1", "0", "1")):
        with log_to(tmp_path / LOGS / f"cohort-{number}.log"):
            logging.getLogger("a").warning(on_gpu(number, gpu))
            WorkLog().worked(0.5, 10 * (number + 1))
    found = work_by_device(tmp_path)
    assert {device: sum(line.trial_steps for line in lines) for device, lines in found.items()} == {
        "GPU 0": 20,
        "GPU 1": 40,
    }


def test_a_device_is_idle_by_its_log_and_by_nvml() -> None:
    sampler = Sampler()
    sampler.samples = [
        (START + timedelta(seconds=second), {"0": share}) for second, share in ((0, 0.0), (1, 0.75), (2, 1.0))
    ]
    assert sampler.idle("0", START + timedelta(seconds=1), START + timedelta(seconds=2)) == pytest.approx(0.125)
    assert sampler.idle("1", START, START + timedelta(seconds=2)) is None


def test_a_run_is_told_with_a_line_for_each_device() -> None:
    spent = {"evaluating": 0.1, "writing": 0.01, "obeying": 0.005}
    uses = (Use(device="GPU 0", idle=0.02, nvml=0.05, **spent), Use(device="GPU 1", idle=0.5, nvml=None, **spent))
    one = Scaled(
        devices=2, wall_s=100.0, window_s=50.0, trials=8, failed=0, trial_steps=1000, window_steps=900, uses=uses
    )
    whole, window, *devices = told(one)
    assert "10.0 per second" in whole
    assert "18.0 per second" in window
    rest = "; evaluations 10.0%, files 1.0%, joining and leaving 0.5%"
    assert devices == [
        f"  GPU 0: idle for 2.0% of the window by its cohort's log, 5.0% by NVML{rest}",
        f"  GPU 1: idle for 50.0% of the window by its cohort's log{rest}",
    ]


def test_the_study_is_changed_as_the_command_line_says() -> None:
    study = {
        "workloads": [{"name": "a", "max_steps": 400}],
        "tune": {"asha": {"sentinels": 0}},
        "resources": {"slots": 8},
    }
    options = argparse.Namespace(trials=6, steps=90, evaluate_every=None, device="cpu")
    found = changed(study, options)
    assert found["workloads"] == [{"name": "a", "max_steps": 90}]
    assert found["tune"] == {"trials_per_arm": 6, "asha": {"sentinels": 0, "grace_steps": 30}}
    assert found["resources"] == {"slots": 8, "gpus_per_trial": 0}
    assert study["tune"] == {"asha": {"sentinels": 0}}


def test_a_run_is_left_so_many_devices() -> None:
    assert surroundings({"resources": {}}, 2, ["2", "5", "7"])["CUDA_VISIBLE_DEVICES"] == "2,5"
    assert surroundings({"resources": {"cpus_per_trial": 2}}, 2, []) == {"RAY_OVERRIDE_RESOURCES": '{"CPU": 4}'}
    assert powers_of_two(6) == [1, 2, 4]
