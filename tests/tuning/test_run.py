from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch

from tests.tuning.conftest import FINISHED, TRIALS, python_path, ranking_of, tunebench, write_study
from tunebench.study.journal import read_trials
from tunebench.study.record import CHECKPOINTS, CURVES, SHORTER_CURVES, Reason, Stage, TrialRecord

RUNGS = (6, 12)


def trained_before(run: Path, trial: TrialRecord) -> dict[int, pd.DataFrame]:
    """Curves of a trial at the horizons before its last one, by horizon."""
    files = {step: run / SHORTER_CURVES / f"{trial.key.trial_id}.h{step}.parquet" for step in RUNGS}
    return {step: pd.read_parquet(file) for step, file in files.items() if file.exists()}


def test_a_study_runs_from_its_file_to_a_report(finished_run: Path):
    trials = read_trials(finished_run)
    assert len(trials) == TRIALS
    assert {trial.reason for trial in trials} <= {Reason.FINISHED, Reason.STOPPED_ASHA}
    assert (finished_run / "report" / "index.html").stat().st_size > 10_000
    assert ranking_of(finished_run)["finished"] is True
    environment = json.loads((finished_run / "environment.json").read_text())
    assert environment["packages"]["nequip"]
    assert list(environment["data"]) == ["ethanol"]


def test_every_trial_has_a_curve_that_agrees_with_its_journal_entry(finished_run: Path):
    for trial in read_trials(finished_run):
        curve = pd.read_parquet(finished_run / CURVES / f"{trial.key.trial_id}.parquet")
        assert trial.ledger["steps"] == sum([*trained_before(finished_run, trial), curve.step.max()])
        last = curve[(curve.step == curve.step.max()) & (curve.split == "val")]
        measured = {(row.readout, row.metric): row.value for row in last.itertuples() if row.metric == "forces_mae"}
        assert measured == {
            (readout, "forces_mae"): metrics["forces_mae"] for readout, metrics in trial.result["val"].items()
        }
        stopped = trial.reason is Reason.STOPPED_ASHA
        for step, objective in trial.rungs.items():
            ended = curve if stopped and step == curve.step.max() else trained_before(finished_run, trial)[step]
            assert ended[(ended.step == step) & (ended.metric == "objective")].value.min() == objective


def test_promoted_trials_have_trained_through_a_complete_schedule_at_every_rung(finished_run: Path):
    reached = [trial for trial in read_trials(finished_run) if trial.key.stage is Stage.TUNE and trial.value]
    assert any(len(trial.rungs) == len(RUNGS) and trial.reason is Reason.FINISHED for trial in reached)
    for trial in reached:
        for step, curve in trained_before(finished_run, trial).items():
            rates = curve[curve.metric == "learning_rate"].set_index("step").value
            assert rates.index.max() == step
            assert rates[step] == 0.0, "where its decay ends"


def test_the_ranking_agrees_with_the_journal_trial_by_trial(finished_run: Path):
    trials = [trial for trial in read_trials(finished_run) if trial.key.stage is Stage.CONFIRM]
    (workload,) = ranking_of(finished_run)["workloads"]
    for arm in workload["arms"]:
        of_arm = [trial for trial in trials if trial.key.optimizer == arm["optimizer"]]
        assert arm["n_seeds"] == len(of_arm) == 2
        for error in arm["errors"]:
            if error["readout"] == "raw":
                split, metric = error["split"], error["metric"]
                assert list(error["values"].values()) == [t.result[split]["raw"][metric] for t in of_arm]
        assert {error["split"] for error in arm["errors"]} == {"test", "ood:hot"}


def test_arms_share_seeds_and_the_points_of_shared_parameters(finished_run: Path):
    trials = read_trials(finished_run)
    for index in range(3):
        rates = {t.params["learning_rate"] for t in trials if t.key.config_index == index and t.key.stage is Stage.TUNE}
        assert len(rates) == 1
        points = [t.point for t in trials if t.key.config_index == index and t.key.stage is Stage.TUNE]
        shared = set.intersection(*(set(point) for point in points))
        assert {"learning_rate", "weight_decay"} <= shared
        assert all(point[name] == points[0][name] for point in points for name in shared)
    for seed_index in range(2):
        confirmed = [t for t in trials if t.key.stage is Stage.CONFIRM and t.key.seed_index == seed_index]
        assert len({json.dumps(trial.seeds, sort_keys=True) for trial in confirmed}) == 1
    assert len({json.dumps(t.seeds, sort_keys=True) for t in trials}) == 3


def test_asha_stops_inside_each_arm_and_keeps_its_reasons(finished_run: Path):
    stopped = [trial for trial in read_trials(finished_run) if trial.reason is Reason.STOPPED_ASHA]
    assert Counter(trial.key.optimizer for trial in stopped).keys() <= {"adamw", "soap"}
    assert stopped, "three trials per arm and a factor of two leave at least one behind"
    for trial in stopped:
        assert trial.detail["value"] > trial.detail["cutoff"]
        assert trial.detail["rung"] == max(trial.rungs)
        assert trial.ledger["steps"] == sum(trial.rungs)
        assert trial.state == "PRUNED"


def test_checkpoints_are_kept_for_the_confirm_stage_only(finished_run: Path):
    kept = {folder.name for folder in (finished_run / CHECKPOINTS).iterdir()}
    confirmed = {t.key.trial_id for t in read_trials(finished_run) if t.key.stage is Stage.CONFIRM}
    assert kept == confirmed


def test_a_second_start_repeats_nothing(finished_run: Path):
    journal = (finished_run / "journal.log").read_bytes()
    done = tunebench("run", finished_run, "--json")
    assert json.loads(done.stdout)["trials"] == TRIALS
    assert (finished_run / "journal.log").read_bytes() == journal


def test_a_trial_whose_process_always_dies_is_recorded_as_crashed_and_the_study_goes_on(tmp_path: Path):
    study = write_study(tmp_path, resources={"max_failures": 1}, optimizers=["adamw"], engine="lightning")
    run = tmp_path / "run"
    crash = tmp_path / "sitecustomize.py"
    crash.write_text(
        "import os, sys\n"
        "if any('default_worker' in a for a in sys.argv):\n"
        "    import tunebench.engine.curves as curves\n"
        "    write = curves.write_curve\n"
        "    def die(run, trial_id, rows):\n"
        "        if trial_id.endswith('tune.c001.s0'): os._exit(1)\n"
        "        write(run, trial_id, rows)\n"
        "    curves.write_curve = die\n"
    )
    tunebench("run", study, "--run", run, PYTHONPATH=python_path(tmp_path))
    trials = {trial.key.trial_id: trial for trial in read_trials(run)}
    crashed = trials.pop("ethanol.adamw.tune.c001.s0")
    assert crashed.reason is Reason.CRASHED
    assert crashed.detail["message"]
    assert all(trial.reason in (Reason.FINISHED, Reason.STOPPED_ASHA) for trial in trials.values())
    assert len(trials) == 3 + 2 - 1


def test_a_run_directory_of_another_study_is_refused(finished_run: Path, tmp_path: Path):
    other = write_study(tmp_path, **{**FINISHED, "seed": 6})
    done = tunebench("run", other, "--run", finished_run, check=False)
    assert done.returncode == 2
    assert "holds study" in done.stderr
    assert "they differ in seed: 299 there, 6 here" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_edited_run_directory_is_refused(finished_run: Path, tmp_path: Path):
    edited = tmp_path / "edited"
    shutil.copytree(finished_run, edited)
    study = edited / "study.yaml"
    study.write_text(study.read_text().replace("top_k: 1", "top_k: 2"))
    done = tunebench("run", edited, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_tpe_proposes_from_the_journal_and_is_never_ranked(tmp_path: Path):
    tune = {"trials_per_arm": 3, "sampler": "tpe", "asha": None}
    study = write_study(tmp_path, engine="lightning", tune=tune, optimizers=["adamw"])
    tunebench("run", study, "--run", tmp_path / "run")
    trials = read_trials(tmp_path / "run")
    assert {(trial.engine, trial.reason) for trial in trials} == {("lightning", Reason.FINISHED)}
    tuned = [trial for trial in trials if trial.key.stage is Stage.TUNE]
    assert len({trial.params["learning_rate"] for trial in tuned}) == len(tuned) == 3
    (workload,) = ranking_of(tmp_path / "run")["workloads"]
    assert workload["decision"]["verdict"] == "exploratory"
    assert all(arm["rank"] is None for arm in workload["arms"])


def test_a_run_whose_data_changed_is_refused(finished_run: Path, tmp_path: Path):
    other = tmp_path / "run"
    shutil.copytree(finished_run, other)
    data_hash = str(read_trials(finished_run)[0].data_hash)
    journal = other / "journal.log"
    journal.write_text(journal.read_text().replace(data_hash, "0" * len(data_hash)))
    done = tunebench("run", other, check=False)
    assert done.returncode == 2
    assert "workload ethanol has data" in done.stderr


def test_a_report_of_a_run_that_fails_a_check_exits_with_1(finished_run: Path, tmp_path: Path):
    damaged = tmp_path / "run"
    shutil.copytree(finished_run, damaged)
    next((damaged / CURVES).glob("*.confirm.*.parquet")).unlink()
    done = tunebench("report", damaged, check=False)
    assert done.returncode == 1
    assert "check failed" in done.stderr


@pytest.mark.parametrize("name", ["a-file", "a-file/below"])
def test_a_run_folder_that_cannot_be_made_is_bad_input(tmp_path: Path, name: str):
    (tmp_path / "a-file").write_text("")
    done = tunebench("run", write_study(tmp_path), "--run", tmp_path / name, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_gpu_study_on_a_machine_without_room_says_so_at_once(tmp_path: Path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = tunebench(
        "run", write_study(tmp_path, resources={"gpus_per_trial": 0.5}), "--run", tmp_path / "run", check=False
    )
    assert done.returncode == 2
    assert "0 GPUs, allowed: a node with 1 CPUs and 0.5 GPUs" in done.stderr


def test_several_trials_share_one_gpu_and_measure_what_the_cpu_measures(finished_run: Path, tmp_path: Path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    tunebench(
        "run", write_study(tmp_path, **{**FINISHED, "resources": {"gpus_per_trial": 0.25}}), "--run", tmp_path / "run"
    )
    on_cpu = {trial.key: trial for trial in read_trials(finished_run) if trial.key.stage is Stage.TUNE}
    compared = 0
    for trial in read_trials(tmp_path / "run"):
        if trial.key in on_cpu and 6 in trial.rungs:
            assert trial.rungs[6] == pytest.approx(on_cpu[trial.key].rungs[6], rel=1e-3)
            compared += 1
    assert compared == 6
