from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tunebench.study.plan import (
    ArmPlan,
    evaluation_steps,
    plan_arms,
    rung_steps,
    survivors,
    trial_seeds,
    tune_steps,
)
from tunebench.study.record import Readout, Stage
from tunebench.study.resolve import ResolvedStudy, load_run, resolve
from tunebench.study.spec import Asha, Fidelity, ScheduleKind, Tune, Workload
from tunebench.study.summary import plan_summary

DATA = {"source": "xtb", "system": "ethanol", "frames": {"train": 10, "val": 4, "test": 4}}
MODEL = {"family": "nequip"}
ASHA = {"grace_steps": 1, "reduction_factor": 3, "sentinels": 0, "fidelity": "truncate"}


def workload(**changes: Any) -> dict[str, Any]:
    return {"name": "ethanol", "data": DATA, "model": MODEL, "max_steps": 9} | changes


def resolved(folder: Path, **changes: Any) -> ResolvedStudy:
    """A study of two optimizers on ethanol, nine trials each over nine steps."""
    content = {
        "name": "small",
        "workloads": [workload()],
        "optimizers": ["adamw", "schedule_free"],
        "tune": {"trials_per_arm": 9, "asha": ASHA},
        "confirm": {"top_k": 2, "seeds": 5},
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content | changes))
    return resolve(file)


@pytest.mark.parametrize(
    ("grace", "factor", "horizon", "rungs"),
    [
        (1, 3, 243, (1, 3, 9, 27, 81)),
        (1, 3, 244, (1, 3, 9, 27, 81, 243)),
        (100, 3, 400, (100, 300)),
        (400, 3, 400, ()),
        (500, 3, 400, ()),
        (None, 3, 400, (100, 300)),
        (None, 2, 3, (1, 2)),
        (None, 3, 1, ()),
        (10**6, 10, 10**9, (10**6, 10**7, 10**8)),
    ],
)
def test_rungs_are_exact_steps_below_the_horizon(
    grace: int | None, factor: int, horizon: int, rungs: tuple[int, ...]
) -> None:
    steps = rung_steps(Asha(grace_steps=grace, reduction_factor=factor), horizon)
    assert steps == rungs
    assert all(type(step) is int for step in steps)


def test_without_asha_there_are_no_rungs(tmp_path: Path) -> None:
    assert rung_steps(None, 400) == ()
    study = resolved(tmp_path, tune={"trials_per_arm": 9, "asha": None})
    (row, _) = plan_summary(study)["arms"]
    assert (row["rungs"], row["expected_survivors"], row["expected_tune_steps"]) == ([], [], 9 * 9)


@pytest.mark.parametrize(
    ("max_steps", "every", "rungs", "steps"),
    [
        (12, 5, (4,), (4, 5, 10, 12)),
        (12, 4, (4,), (4, 8, 12)),
        (12, 100, (), (12,)),
        (40, None, (1,), (1, *range(2, 41, 2))),
        (7, None, (), tuple(range(1, 8))),
    ],
)
def test_errors_are_measured_on_a_grid_at_the_rungs_and_at_the_horizon(
    max_steps: int, every: int | None, rungs: tuple[int, ...], steps: tuple[int, ...]
) -> None:
    content = workload(max_steps=max_steps, evaluate_every_steps=every)
    assert evaluation_steps(Workload.model_validate(content), rungs) == steps


@pytest.mark.parametrize(
    ("trials", "factor", "rungs", "expected"),
    [
        (2, 3, (1,), [1]),
        (6, 3, (1, 3), [2, 1]),
        (9, 3, (), []),
    ],
)
def test_one_in_three_goes_on_at_every_rung_and_at_least_one(
    trials: int, factor: int, rungs: tuple[int, ...], expected: list[int]
) -> None:
    asha = Asha(reduction_factor=factor, sentinels=0)
    assert survivors(Tune(trials_per_arm=trials, asha=asha), rungs) == expected


def test_sentinels_go_on_besides_those_that_are_promoted() -> None:
    # of 20 trials 6 are promoted and then 2; of the 8 sentinels 8 x 14/20 = 5.6 and 8 x 18/20 = 7.2 would not be
    assert survivors(Tune(trials_per_arm=20), (1, 3)) == [12, 9]
    assert survivors(Tune(trials_per_arm=6), (1, 3)) == [6, 6]
    assert survivors(Tune(trials_per_arm=6, asha=None), (1, 3)) == [6, 6]


@pytest.mark.parametrize(
    ("trials", "factor", "rungs", "expected"),
    [
        (2, 3, (1,), [2]),  # 1 + 1/2
        (6, 3, (1, 3), [3, 2]),  # 1 + 1/2 + 1/3 + 1/4 + 1/5 + 2/6, then 1 + 1/2 + 1/3
        (9, 3, (1,), [3]),  # the same + 2/7 + 2/8 + 3/9
        (4, 2, (1,), [2]),  # 1 + 1/2 + 1/3 + 2/4
        (1, 3, (1, 3), [1, 1]),
        (9, 3, (), []),
    ],
)
def test_the_stopping_form_keeps_those_expected_when_trials_arrive_in_random_order(
    trials: int, factor: int, rungs: tuple[int, ...], expected: list[int]
) -> None:
    asha = Asha(reduction_factor=factor, form="stopping", order="asynchronous", sentinels=0)
    assert survivors(Tune(trials_per_arm=trials, asha=asha), rungs) == expected


def test_complete_schedules_at_every_rung_are_paid_from_the_beginning(tmp_path: Path) -> None:
    by_hand = 9 * 1 + 3 * 3 + 2 * 9
    study = resolved(tmp_path, tune={"trials_per_arm": 9, "asha": {**ASHA, "fidelity": "rescale"}})
    assert tune_steps(study.study.tune, (1, 3), 9, fewest=2, fidelity=Fidelity.RESCALE) == by_hand
    (row, _) = plan_summary(study)["arms"]
    assert (row["fidelity"], row["expected_tune_steps"]) == ("rescale", by_hand)


@pytest.mark.parametrize(
    ("fidelity", "adamw", "schedule_free"),
    [
        ("auto", ("rescale", (1, 3, 9)), ("truncate", (9,))),  # only the schedule of AdamW decays
        ("rescale", ("rescale", (1, 3, 9)), ("rescale", (1, 3, 9))),
        ("truncate", ("truncate", (9,)), ("truncate", (9,))),
    ],
)
def test_a_rung_ends_a_schedule_of_its_own_where_the_schedule_decays(
    tmp_path: Path, fidelity: str, adamw: Any, schedule_free: Any
) -> None:
    arms = plan_arms(resolved(tmp_path, tune={"trials_per_arm": 9, "asha": {**ASHA, "fidelity": fidelity}}))
    assert [(arm.fidelity.value, arm.horizons) for arm in arms] == [adamw, schedule_free]


def test_expected_steps_are_those_counted_by_hand(tmp_path: Path) -> None:
    # nine trials for one step, three for the next two, and for the last six the two that are confirmed
    by_hand = 9 * 1 + 3 * 2 + 2 * 6
    study = resolved(tmp_path)
    assert tune_steps(study.study.tune, (1, 3), 9, fewest=2) == by_hand == 27
    (row, _) = plan_summary(study)["arms"]
    assert row["expected_tune_steps"] == by_hand
    assert row["expected_survivors"] == [3, 2]
    assert row["expected_confirm_steps"] == 2 * 5 * 9
    assert (row["trials"], row["confirm_trials"], row["horizon_steps"]) == (9, 10, 9)


def test_device_seconds_need_a_measured_step_of_every_arm(tmp_path: Path) -> None:
    study = resolved(tmp_path)
    some = plan_summary(study, {"ethanol/adamw": 0.5})
    assert some["arms"][0]["expected_device_s"] == 0.5 * (27 + 90)
    assert some["arms"][1]["expected_device_s"] is None
    assert some["expected_device_s"] is None
    both = plan_summary(study, {"ethanol/adamw": 0.5, "ethanol/schedule_free": 1.0})
    assert both["expected_device_s"] == 1.5 * (27 + 90)
    assert both["trials"] == 2 * (9 + 10)


def test_a_refinement_costs_passes_over_the_whole_training_split(tmp_path: Path) -> None:
    refined = resolved(tmp_path, confirm={"top_k": 2, "seeds": 5, "refine": {"steps": 10}})
    (row, _) = plan_summary(refined, {"ethanol/adamw": 0.5}, training_frames={"ethanol": 30})["arms"]
    batch = refined.study.workloads[0].batch_size
    assert row["expected_refine_steps"] == 10 * 12 * 30 / batch  # ten trials, twelve passes each
    assert row["expected_refine_device_s"] == 0.5 * row["expected_refine_steps"]
    assert row["expected_device_s"] == 0.5 * (27 + 90 + row["expected_refine_steps"])
    assert plan_summary(refined, {"ethanol/adamw": 0.5})["arms"][0]["expected_device_s"] is None
    assert plan_summary(resolved(tmp_path))["arms"][0]["expected_refine_steps"] == 0


@pytest.mark.parametrize(("sampler", "ranked"), [("sobol", True), ("tpe", False)])
def test_only_a_sobol_study_is_announced_as_ranked(tmp_path: Path, sampler: str, ranked: bool) -> None:
    study = resolved(tmp_path, tune={"trials_per_arm": 9, "sampler": sampler})
    assert plan_summary(study)["ranked"] is ranked


def test_arms_are_workloads_times_optimizers_each_with_its_own_rungs(tmp_path: Path) -> None:
    workloads = [workload(), workload(name="long", max_steps=90)]
    study = resolved(tmp_path, workloads=workloads, tune={"trials_per_arm": 9, "asha": {"reduction_factor": 3}})
    arms = plan_arms(study)
    assert [arm.name for arm in arms] == [
        "ethanol/adamw",
        "ethanol/schedule_free",
        "long/adamw",
        "long/schedule_free",
    ]
    assert [arm.rungs for arm in arms] == [(2, 6), (2, 6), (22, 66), (22, 66)]
    for arm in arms:
        assert set(arm.rungs) < set(arm.evaluation_steps)
        assert arm.evaluation_steps[-1] == arm.workload.max_steps


def test_an_arm_carries_what_belongs_to_its_optimizer(tmp_path: Path) -> None:
    adamw, schedule_free = plan_arms(resolved(tmp_path))
    assert (adamw.averaged, adamw.schedule.kind) == (Readout.EMA, ScheduleKind.COSINE)
    assert (schedule_free.averaged, schedule_free.schedule.kind) == (Readout.SCHEDULE_FREE, ScheduleKind.CONSTANT)
    assert (adamw.space.name, schedule_free.space.name) == ("adamw", "schedule_free")


SECOND_ARMS: list[Any] = [
    "adamw",
    {"name": "adamw-untuned", "optimizer": "adamw", "untuned": True},
    {"name": "adamw-audit", "optimizer": "adamw", "budget": 2},
    {"name": "soap-untuned", "optimizer": "soap", "untuned": True, "fixed": {"precondition_frequency": 7}},
]


def test_a_second_arm_of_an_optimizer_searches_more_or_not_at_all(tmp_path: Path) -> None:
    study = resolved(tmp_path, optimizers=SECOND_ARMS)
    adamw, untuned, audit, soap = plan_arms(study)
    assert [arm.trials for arm in (adamw, untuned, audit, soap)] == [9, 1, 18, 1]
    assert {arm.rule for arm in (adamw, untuned, audit)} == {"adamw"}
    assert audit.space.parameters == adamw.space.parameters
    assert untuned.space.parameters == {}
    assert untuned.space.fixed_values() == adamw.space.defaults()
    assert soap.space.fixed_values()["precondition_frequency"] == 7
    assert [row["confirm_trials"] for row in plan_summary(study)["arms"]] == [10, 5, 10, 5]


def test_second_arms_are_the_same_after_they_were_frozen(tmp_path: Path) -> None:
    study = resolved(tmp_path, optimizers=SECOND_ARMS)
    study.write(tmp_path / "run")
    again = load_run(tmp_path / "run")
    assert again.hash == study.hash
    assert again.spaces == study.spaces


def test_keys_name_arm_stage_configuration_and_seed(tmp_path: Path) -> None:
    arm: ArmPlan = plan_arms(resolved(tmp_path))[1]
    key = arm.key(Stage.CONFIRM, 3, 1)
    assert key.arm == arm.name
    assert key.trial_id == "ethanol.schedule_free.confirm.c003.s1"


def test_every_seed_of_a_trial_is_its_own() -> None:
    drawn = [
        seed
        for root in (0, 1)
        for name in ("ethanol", "water")
        for stage in Stage
        for index in (0, 1, 2)
        for seed in trial_seeds(root, name, stage, index).values()
    ]
    assert len(set(drawn)) == len(drawn) == 2 * 2 * 2 * 3 * 3


def test_arms_share_their_seeds_because_the_optimizer_has_no_part_in_them() -> None:
    assert trial_seeds(7, "ethanol", Stage.TUNE, 0) == trial_seeds(7, "ethanol", Stage.TUNE, 0)
    assert list(trial_seeds(7, "ethanol", Stage.TUNE, 0)) == ["init", "order", "labels"]
