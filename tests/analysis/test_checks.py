from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.checks import Status, run_checks
from analysis.load import Run, load
from analysis.ranking import rank
from tests.analysis.synthetic_run import Plan, write_run
from tunebench.study.record import CURVES, Reason, Stage, TrialRecord

ARMS = {"adamw": (0.03, 0.031, 0.032, 0.033, 0.034), "muon": (0.02, 0.021, 0.022, 0.023, 0.024)}
VICTIM = "ethanol-nequip.muon.confirm.c001.s2"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load(write_run(tmp_path_factory.mktemp("sound") / "run", Plan(arms=ARMS)))


def findings(run: Run, status: Status) -> list[str]:
    return [finding for check in run_checks(run) if check.status is status for finding in check.findings]


def with_victim(run: Run, change: Callable[[TrialRecord], dict[str, Any]]) -> Run:
    trials = tuple(
        dataclasses.replace(trial, **change(trial)) if trial.key.trial_id == VICTIM else trial for trial in run.trials
    )
    return dataclasses.replace(run, trials=trials)


def test_sound_run_has_a_winner_and_no_failed_check(sound: Run) -> None:
    assert findings(sound, Status.FAILED) == []
    assert rank(sound).workloads[0].decision.winner == "muon"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda trial: {"value": 2.0 * trial.value}, f"{VICTIM}: journal says"),
        (lambda trial: {"result": {**trial.result, "test": {}}}, f"{VICTIM} has no test force error"),
        (lambda trial: {"seeds": {**trial.seeds, "order": 5}}, "seed 2: arms differ in order"),
        (
            lambda trial: {"groups": [{"rule": "adamw", "share": 1.0}]},
            f"{VICTIM}: no weight is under muon, found adamw",
        ),
        (
            lambda trial: {"reason": Reason.MISMATCHED, "detail": {"message": "muon: found muon on 3 matrix blocks"}},
            f"{VICTIM}: muon: found muon on 3 matrix blocks",
        ),
        (lambda trial: {"data_hash": "5eed" * 16}, f"{VICTIM}: data 5eed5eed5eed, but 21 of 22 have "),
        (lambda trial: {"key": dataclasses.replace(trial.key, stage=Stage.TUNE)}, "has errors on ood:hot, test"),
        (lambda trial: {"key": dataclasses.replace(trial.key, optimizer="lion")}, "ethanol-nequip/lion is not an arm"),
        (lambda trial: {"key": dataclasses.replace(trial.key, seed_index=1)}, "stands 2 times in the journal"),
    ],
)
def test_contradiction_is_found_and_forbids_a_winner(
    sound: Run, change: Callable[[TrialRecord], dict[str, Any]], expected: str
) -> None:
    broken = with_victim(sound, change)
    assert any(expected in finding for finding in findings(broken, Status.FAILED))
    decision = rank(broken).workloads[0].decision
    assert decision.winner is None
    assert "a check failed" in decision.sentence


def test_trial_without_a_data_hash_contradicts_nobody(sound: Run) -> None:
    assert findings(with_victim(sound, lambda trial: {"data_hash": None}), Status.FAILED) == []


def test_workloads_may_have_data_of_their_own(tmp_path: Path) -> None:
    run = load(write_run(tmp_path / "run", Plan(arms=ARMS, workloads=("ethanol-nequip", "ethanol-allegro"))))
    assert len({trial.data_hash for trial in run.trials}) == 2
    assert findings(run, Status.FAILED) == []


def test_curve_that_ends_elsewhere_is_found(sound: Run) -> None:
    curves = sound.curves.copy()
    curves.loc[(curves["trial"] == VICTIM) & (curves["metric"] == "forces_mae"), "value"] *= 1.5
    assert any(VICTIM in finding for finding in findings(dataclasses.replace(sound, curves=curves), Status.FAILED))


def test_curve_file_of_no_trial_is_found(sound: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(sound.path, tmp_path / "run")
    shutil.copy(folder / CURVES / f"{VICTIM}.parquet", folder / CURVES / "stray.parquet")
    assert findings(load(folder), Status.FAILED) == [f"{CURVES}/stray.parquet belongs to no trial"]


def test_unequal_budgets_are_a_warning(sound: Run) -> None:
    assert any("device-seconds in the tune stage is 1.75" in finding for finding in findings(sound, Status.WARNING))
    half = tuple(t for t in sound.trials if t.key.optimizer != "muon" or t.key.config_index < 3)
    assert any(
        "trials in the tune stage is 2.00" in f
        for f in findings(dataclasses.replace(sound, trials=half), Status.WARNING)
    )


def test_a_cap_on_device_seconds_that_left_an_arm_fewer_configurations_is_told(sound: Run) -> None:
    tune = sound.study.tune.model_copy(update={"device_seconds_per_arm": 90.0})
    resolved = dataclasses.replace(sound.resolved, study=sound.study.model_copy(update={"tune": tune}))
    wanted = sound.study.tune.trials_per_arm
    kept = tuple(t for t in sound.trials if t.key.optimizer != "muon" or t.key.config_index < 3)
    afforded = {"ethanol-nequip/muon": {wanted: 3}}
    found = findings(dataclasses.replace(sound, resolved=resolved, trials=kept, afforded=afforded), Status.WARNING)
    assert f"90 device-seconds paid for 3 of {wanted} configurations of muon" in found
    assert not any("share of trials" in finding for finding in found)


def test_learning_rate_at_the_edge_is_a_warning(sound: Run) -> None:
    low = sound.resolved.spaces["muon"].parameters["learning_rate"].value_at(0.02)
    trials = tuple(
        dataclasses.replace(trial, params={**trial.params, "learning_rate": low})
        if trial.key.optimizer == "muon"
        else trial
        for trial in sound.trials
    )
    assert any(
        "muon: best learning rate" in f for f in findings(dataclasses.replace(sound, trials=trials), Status.WARNING)
    )
