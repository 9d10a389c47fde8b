from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.study.test_plan import ASHA, resolved
from tunebench.study.budget import affordable, arm_sentinels, cap_of, most_device_s
from tunebench.study.decision import Fate
from tunebench.study.extension import extend, extended
from tunebench.study.plan import ArmPlan, plan_arms
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import StudyError
from tunebench.study.summary import plan_summary
from tunebench.tuning.ladder import Ladder


def capped(folder: Path, cap: float | None = 100.0, fidelity: str = "truncate", **tune: Any) -> ResolvedStudy:
    """Two arms of nine trials over nine steps with rungs 1 and 3, which confirm two."""
    asha = {**ASHA, "fidelity": fidelity}
    return resolved(folder, tune={"trials_per_arm": 9, "asha": asha, "device_seconds_per_arm": cap, **tune})


def arm_of(study: ResolvedStudy) -> ArmPlan:
    return plan_arms(study)[0]


@pytest.mark.parametrize(
    ("fidelity", "by_hand"),
    [
        ("truncate", 1 * sum(range(1, 10)) + 2 * (9 + 8 + 7) + 6 * (9 + 8)),
        ("rescale", 1 * sum(range(1, 10)) + 3 * (9 + 8 + 7) + 9 * (9 + 8)),
    ],
)
def test_an_arm_costs_most_where_the_dearest_go_on(tmp_path: Path, fidelity: str, by_hand: float) -> None:
    study = capped(tmp_path, fidelity=fidelity)
    found = most_device_s(arm_of(study), study.study.tune.asha, list(range(1, 10)), (), 2)
    assert found == by_hand


def test_a_sentinel_goes_on_beside_those_that_are_promoted(tmp_path: Path) -> None:
    study = capped(tmp_path)
    found = most_device_s(arm_of(study), study.study.tune.asha, list(range(1, 10)), {0}, 2)
    assert found == sum(range(1, 10)) + 2 * (1 + 9 + 8 + 7) + 6 * (1 + 9 + 8)


@pytest.mark.parametrize("fidelity", ["truncate", "rescale"])
def test_no_outcome_of_the_rungs_costs_more_than_was_paid_for(tmp_path: Path, fidelity: str) -> None:
    study, draw = capped(tmp_path, fidelity=fidelity), np.random.default_rng(0)
    arm, asha = arm_of(study), study.study.tune.asha
    assert asha is not None
    for _ in range(200):
        step_s = draw.uniform(0.1, 5.0, 9).tolist()
        count = affordable(arm, asha, step_s, lambda n: {1, 4}, 2, 60.0)
        names = [f"t{index}" for index in range(count)]
        ladder = Ladder(asha, arm.rungs, names, [f"t{i}" for i in (1, 4) if i < count], fewest=2)
        spent, left, before = 0.0, names, 0
        for rung in (*arm.rungs, 9):
            leg = rung if fidelity == "rescale" else rung - before
            spent += sum(leg * step_s[int(name[1:])] for name in left)
            before = rung
            if rung in arm.rungs:
                for name in left:
                    ladder.arrive(name, rung, float(draw.random()))
                left = [name for name in left if ladder.fate(name, rung) is Fate.GO_ON]
        assert spent <= 60.0 + 1e-9


@pytest.mark.parametrize(("trials", "before_extension", "fewest"), [(9, 5, 2), (18, 9, 1), (32, 18, 3)])
def test_an_extended_arm_pays_for_those_its_rungs_had_let_go_on_and_for_the_best_of_all(
    tmp_path: Path, trials: int, before_extension: int, fewest: int
) -> None:
    study, draw = capped(tmp_path), np.random.default_rng(1)
    arm, asha = arm_of(study), study.study.tune.asha
    assert asha is not None
    for _ in range(100):
        names, step_s = [f"t{index}" for index in range(trials)], draw.uniform(0.1, 5.0, trials).tolist()
        old, going = names[:before_extension], dict.fromkeys(names, 0)
        before, after = Ladder(asha, arm.rungs, old, fewest=fewest), Ladder(asha, arm.rungs, names, fewest=fewest)
        for ladder, known in ((before, old), (after, names)):
            for rung in arm.rungs:
                at_rung = [name for name in known if going[name] == rung or (rung == 1 and not going[name])]
                made = [each for name in at_rung for each in ladder.arrive(name, rung, float(draw.random()))]
                made += ladder.settle()
                for name in known:
                    decided = [each for each in made if each.trial == name and each.rung == rung]
                    if decided and decided[0].fate is Fate.GO_ON:
                        going[name] = {1: 3, 3: 9}[rung]
                if ladder is before:
                    for each in made:
                        after.rebuild(each.trial, {rung: each.value}, [each.to_plain()], ended=False)
        legs = {0: 1, 3: 3, 9: 9}
        spent = sum(legs[end] * step_s[int(name[1:])] for name, end in going.items())
        assert spent <= most_device_s(arm, asha, step_s, (), fewest, decided=[before_extension]) + 1e-9


def test_configurations_that_an_arm_has_stay_whatever_the_cap(tmp_path: Path) -> None:
    study = capped(tmp_path)
    assert affordable(arm_of(study), study.study.tune.asha, [10.0] * 9, lambda n: (), 2, 50.0, decided=[5]) == 5


def test_a_cap_pays_for_fewer_configurations_of_an_arm_with_dearer_steps(tmp_path: Path) -> None:
    rows = plan_summary(capped(tmp_path), {"ethanol/adamw": 1.0, "ethanol/schedule_free": 4.0})["arms"]
    assert [(row["trials"], row["trials_without_cap"], row["cap_device_s"]) for row in rows] == [
        (9, 9, 100.0),
        (8, 9, 100.0),
    ]
    for row in rows:
        assert row["expected_tune_device_s"] <= 100.0
    assert [row["trials"] for row in plan_summary(capped(tmp_path))["arms"]] == [9, 9], "nothing is measured"


def test_an_extension_and_an_audit_have_as_much_more_as_they_have_configurations(tmp_path: Path) -> None:
    study = capped(tmp_path)
    extend(study, tmp_path, 9)
    longer = extended(study, tmp_path)
    assert longer.study.tune.device_seconds_per_arm == 200.0
    assert extended(longer, tmp_path) == longer
    arms = [{"name": "adamw"}, {"name": "audit", "optimizer": "adamw", "budget": 2}]
    audit = resolved(tmp_path, optimizers=arms, tune={"trials_per_arm": 9, "device_seconds_per_arm": 50.0})
    assert [cap_of(arm, audit.study.tune) for arm in plan_arms(audit)] == [50.0, 100.0]


@pytest.mark.parametrize(
    "tune",
    [
        {"asha": {"order": "asynchronous"}},
        {"asha": {"form": "stopping", "order": "asynchronous"}},
        {"sampler": "tpe"},
    ],
)
def test_a_cap_that_nothing_could_keep_is_refused(tmp_path: Path, tune: dict[str, Any]) -> None:
    with pytest.raises(StudyError, match=r"tune\.device_seconds_per_arm: found 100\.0, allowed: left out"):
        capped(tmp_path, **tune)


def test_a_cap_takes_no_sentinel_from_the_arm_with_dearer_steps(tmp_path: Path) -> None:
    seconds = {"ethanol/adamw": 1.0, "ethanol/schedule_free": 4.0}
    study = capped(tmp_path, 400.0, trials_per_arm=32, asha={**ASHA, "sentinels": "auto"})
    cheap, dear = plan_summary(study, seconds)["arms"]
    assert (cheap["trials"], cheap["sentinels"]) == (32, 8)
    assert dear["trials"] < 20
    assert dear["sentinels"] == 8
    assert dear["expected_tune_device_s"] <= 400.0


def test_sentinels_are_the_same_where_no_cap_bites(tmp_path: Path) -> None:
    study = capped(tmp_path, trials_per_arm=32, asha={**ASHA, "sentinels": "auto"})
    free = capped(tmp_path, None, trials_per_arm=32, asha={**ASHA, "sentinels": "auto"})
    arm = arm_of(study)
    assert arm_sentinels(study.study, arm, {32: 32}) == arm_sentinels(free.study, arm, {})


def test_an_extension_adds_as_many_sentinels_to_every_arm_and_takes_none_away(tmp_path: Path) -> None:
    study = capped(tmp_path, trials_per_arm=32, asha={**ASHA, "sentinels": "auto"}).study
    arm = arm_of(capped(tmp_path, trials_per_arm=32, asha={**ASHA, "sentinels": "auto"}))
    drawn = [arm_sentinels(study, arm, {16: before, 32: after}) for before, after in ((16, 32), (11, 23), (9, 16))]
    assert [len(sentinels) for sentinels in drawn] == [8 + 4] * 3
    for sentinels, before in zip(drawn, (16, 11, 9), strict=True):
        assert {index for index in sentinels if index < before} == arm_sentinels(study, arm, {16: before})
