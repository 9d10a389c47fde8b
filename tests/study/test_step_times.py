from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager

from tunebench.study.errors import RunError
from tunebench.study.search_space import SearchSpace, available_optimizers
from tunebench.study.step_times import (
    CALIBRATION,
    Calibration,
    DeviceTimes,
    SoloStep,
    StepTime,
    TimedStep,
    add_tables,
    cost_settings,
    read_calibration,
    settings_of,
    write_calibration,
)

STUDY = "ab" * 32


def solo_step(optimizer: str, plain: list[float], refresh: list[float] | None = None, **settings: Any) -> SoloStep:
    return SoloStep(
        workload="ethanol",
        optimizer=optimizer,
        settings=settings,
        engine="cohort",
        threads=1,
        plain=TimedStep.of(plain, 10),
        refresh=TimedStep.of(refresh, 10) if refresh else None,
    )


def table(*steps: SoloStep, **changes: Any) -> DeviceTimes:
    content = {"device": "NVIDIA H200", "kind": "cuda", "date": "2026-11-22T08:00:00+00:00", "rounds": 3}
    return DeviceTimes(**{**content, "environment": {}, "steps": steps, **changes})


def calibration(*tables: DeviceTimes) -> Calibration:
    return Calibration(schema_version=2, study_hash=STUDY, tables=tables)


def test_mean_is_plain_plus_a_share_of_what_a_refresh_costs_more() -> None:
    step = solo_step("soap", [0.010] * 3, [0.030] * 3)
    for period, expected in ((1, 0.030), (2, 0.020), (10, 0.012), (100, 0.0102)):
        assert step.mean(period).median_s == pytest.approx(expected, rel=1e-12)


def test_mean_goes_round_by_round_so_that_a_common_drift_does_not_count_as_a_refresh() -> None:
    drift = [1.0, 1.5, 2.0]
    mean = solo_step("soap", [0.01 * d for d in drift], [0.03 * d for d in drift]).mean(4)
    assert (mean.low_s, mean.median_s, mean.high_s) == pytest.approx((0.015 * 1.25, 0.015 * 1.5, 0.015 * 1.75))


def test_a_rule_without_refreshes_takes_its_plain_step_whatever_the_period() -> None:
    step = solo_step("adamw", [0.01, 0.02, 0.04])
    assert step.mean(None) == step.mean(7) == StepTime(median_s=0.02, low_s=0.015, high_s=0.03)


@pytest.mark.parametrize("period", [None, 0, 0.5, float("nan")])
def test_a_rule_with_refreshes_needs_a_period_of_at_least_one(period: float | None) -> None:
    with pytest.raises(ValueError, match=r"precondition_frequency: found .*, allowed: 1 or more"):
        solo_step("soap", [0.01], [0.02]).mean(period)


def test_one_round_has_no_spread() -> None:
    assert StepTime.over([0.5]) == StepTime(median_s=0.5, low_s=0.5, high_s=0.5)


def test_a_trial_finds_the_step_of_its_own_settings_with_its_own_period() -> None:
    times = table(
        solo_step("soap", [0.01], [0.02], fctp_view="flat"), solo_step("soap", [0.03], [0.05], fctp_view="merged")
    )
    space = SearchSpace.load("soap")
    params = {"learning_rate": 0.1, "fctp_view": "merged", "precondition_frequency": 4}
    assert times.step_time(space, "ethanol", params) == StepTime.over([0.035])
    assert times.step_time(space, "ethanol", {**params, "fctp_view": "per_type"}) is None
    assert times.step_time(space, "water", params) is None


def test_a_period_that_the_study_fixes_counts() -> None:
    space = SearchSpace.load("soap").fix({"precondition_frequency": 2, "fctp_view": "flat"})
    assert table(solo_step("soap", [0.01], [0.02])).step_time(space, "ethanol", {"learning_rate": 0.1}) == (
        StepTime.over([0.015])
    )


@pytest.mark.parametrize("name", available_optimizers())
def test_settings_that_change_the_cost_are_those_of_structure_alone(name: str) -> None:
    space = SearchSpace.load(name)
    structure = {n for n, parameter in space.parameters.items() if parameter.role == "structure"}
    assert cost_settings(space, space.defaults()).keys() == structure


def test_without_trials_the_defaults_and_each_other_choice_in_turn_are_measured() -> None:
    found = settings_of([], SearchSpace.load("soap_muon"))
    assert found[0] == {"rho": 0.0, "fctp_view": "per_type"}
    assert sorted(map(str, found[1:])) == sorted(
        str({"rho": rho, "fctp_view": view}) for rho, view in ((0.5, "per_type"), (0.0, "flat"), (0.0, "merged"))
    )
    assert settings_of([], SearchSpace.load("adamw")) == [{}]


def test_with_trials_only_what_they_have_is_measured_and_each_once() -> None:
    trials = [{"rho": 0.5, "fctp_view": view, "precondition_frequency": f} for view, f in (("flat", 1), ("flat", 9))]
    assert settings_of(trials, SearchSpace.load("soap_muon")) == [{"rho": 0.5, "fctp_view": "flat"}]


def test_what_is_written_is_read_and_replaces_what_was_there(tmp_path: Path) -> None:
    old = calibration(table(solo_step("adamw", [0.01])))
    new = calibration(table(solo_step("soap_muon", [0.01, 0.02], [0.1, 0.2], rho=0.5, fctp_view="flat")))
    for each in (old, new):
        assert write_calibration(tmp_path, each) == tmp_path / CALIBRATION
        assert read_calibration(tmp_path, each.study_hash) == each
    assert [file.name for file in tmp_path.iterdir()] == [CALIBRATION]


def test_a_run_without_the_file_has_no_table(tmp_path: Path) -> None:
    assert read_calibration(tmp_path, "ab" * 32) is None


def changed(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**content, "tables": [{**content["tables"][0], **changes}]}


def step_of(content: dict[str, Any]) -> dict[str, Any]:
    step: dict[str, Any] = content["tables"][0]["steps"][0]
    return step


def version_1(content: dict[str, Any]) -> dict[str, Any]:
    """A file as it was before there were kinds of devices."""
    (table,) = content["tables"]
    return {"schema_version": 1, "study_hash": content["study_hash"], **{n: table[n] for n in VERSION_1}}


VERSION_1 = ("date", "device", "kind", "rounds", "environment", "steps")

Damage = Callable[[dict[str, Any]], Any]


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda content: '{"schema_version": 1, "stu', "Invalid JSON"),
        (lambda content: [], "allowed: "),
        (lambda content: {**content, "schema_version": 3}, "schema_version: found '3'"),
        (lambda content: {**content, "tables": []}, "tables: found '[]'"),
        (lambda content: changed(content, date="yesterday"), "tables.0.date: found 'yesterday'"),
        (lambda content: changed(content, steps=[{**step_of(content), "engine": "abacus"}]), "tables.0.steps.0.engine"),
        (
            lambda content: changed(content, steps=[{**step_of(content), "plain": {"median_s": -1.0}}]),
            "tables.0.steps.0.plain",
        ),
        (lambda content: {**version_1(content), "rounds": 0}, "tables.0.rounds: found '0'"),
        (lambda content: {**content, "study_hash": "cd" * 32}, "found times of study cdcdcdcdcdcd"),
    ],
)
def test_a_damaged_table_is_named_in_one_line(tmp_path: Path, damage: Damage, named: str) -> None:
    good = calibration(table(solo_step("adamw", [0.01])))
    content = damage(json.loads(good.model_dump_json()))
    (tmp_path / CALIBRATION).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(RunError) as caught:
        read_calibration(tmp_path, good.study_hash)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(CALIBRATION)
    assert named in line


def test_rounds_with_and_without_refreshes_go_in_pairs() -> None:
    with pytest.raises(ValueError, match="unlike numbers of rounds"):
        solo_step("soap", [0.01, 0.01], [0.02])


def test_a_file_of_version_1_is_one_table_of_a_device_that_its_name_tells(tmp_path: Path) -> None:
    new = calibration(table(solo_step("adamw", [0.01])))
    (tmp_path / CALIBRATION).write_text(json.dumps(version_1(json.loads(new.model_dump_json()))))
    read = read_calibration(tmp_path, STUDY)
    assert read == new
    assert read is not None
    assert read.of("H200") == new.tables[0]
    assert read.of("B200") is None


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("Tesla V100-SXM2-16GB", "V100"),
        ("NVIDIA GeForce RTX 5090", "GeForce-RTX-5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX-PRO-6000"),
    ],
)
def test_a_device_is_known_by_the_kind_that_ray_makes_of_its_name(device: str, kind: str) -> None:
    assert NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(device) == kind
    assert table(device=device).is_of(kind)


def test_a_kind_is_not_another_one_whose_name_begins_alike() -> None:
    assert not table(device="NVIDIA H200").is_of("H20")
    assert not table(device="NVIDIA H20").is_of("H200")
    assert not table(device="NVIDIA H200", accelerator="H200-in-halves").is_of("H200")


def test_a_trial_is_timed_on_its_own_kind_of_device() -> None:
    found = calibration(
        table(solo_step("adamw", [0.01])), table(solo_step("adamw", [0.02]), device="NVIDIA B200", accelerator="B200")
    )
    space = SearchSpace.load("adamw")
    seconds = {kind: found.step_time(space, "ethanol", {}, kind) for kind in ("H200", "B200", "L4", "", None)}
    assert seconds == {
        "H200": StepTime.over([0.01]),
        "B200": StepTime.over([0.02]),
        "L4": None,
        "": None,
        None: None,
    }


def test_where_nobody_knows_a_trials_kind_the_only_table_is_its_own() -> None:
    only = table(solo_step("adamw", [0.01]))
    assert [calibration(only).of(kind) for kind in ("", None, "H200", "L4")] == [only, only, only, None]


def test_budgets_count_on_the_first_kind_that_has_all_steps() -> None:
    part = table(solo_step("adamw", [0.01]))
    whole = table(solo_step("adamw", [0.02]), solo_step("lamb", [0.03]), device="NVIDIA B200")
    trials = [(SearchSpace.load(name), "ethanol", SearchSpace.load(name).defaults()) for name in ("adamw", "lamb")]
    assert calibration(part, whole).covering(trials) == whole
    assert calibration(part, whole).covering(trials[:1]) == part
    assert calibration(part).covering(trials) is None


CPU = {"kind": "cpu", "device": "EPYC 7543"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {}),
        ({}, {"accelerator": "H200"}),
        ({"accelerator": "H200"}, {}),
        ({"accelerator": "H200"}, {"accelerator": "H200", "device": "NVIDIA H200 NVL"}),
        (CPU, {**CPU, "device": "EPYC 9654"}),
        ({**CPU, "accelerator": ""}, {**CPU, "device": "EPYC 9654"}),
    ],
)
def test_a_table_takes_the_place_of_that_of_its_kind(old: dict[str, Any], new: dict[str, Any], tmp_path: Path) -> None:
    others = [table(device="NVIDIA B200"), table(device="NVIDIA L4", accelerator="L4")]
    add_tables(tmp_path, STUDY, [others[0], table(**old), others[1]])
    found = add_tables(tmp_path, STUDY, [table(**new)])
    assert found.tables == (others[0], table(**new), others[1])
    assert read_calibration(tmp_path, STUDY) == found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({}, {"device": "NVIDIA B200"}),
        ({"accelerator": "H200"}, {"accelerator": "H200-in-halves"}),
        ({}, CPU),
        ({**CPU, "accelerator": "EPYC-7543"}, {**CPU, "accelerator": "EPYC-9654"}),
    ],
)
def test_tables_of_two_kinds_are_both_kept(old: dict[str, Any], new: dict[str, Any], tmp_path: Path) -> None:
    add_tables(tmp_path, STUDY, [table(**old)])
    assert add_tables(tmp_path, STUDY, [table(**new)]).tables == (table(**old), table(**new))
