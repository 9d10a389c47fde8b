from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.study.test_plan import ASHA, resolved
from tunebench.study.budget import affordable, arm_sentinels, cap_of, most_device_s
from tunebench.study.decision import Fate
from tunebench.study.extension import EXTENSION, extend, extended
from tunebench.study.lint import lint
from tunebench.study.plan import ArmPlan, plan_arms
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.sentinels import sentinel_count
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
    assert arm_sentinels(study, arm, {32: 32}) == arm_sentinels(free, arm)


def test_an_extension_adds_as_many_sentinels_to_every_arm_and_takes_none_away(tmp_path: Path) -> None:
    study = capped(tmp_path, trials_per_arm=32, asha={**ASHA, "sentinels": "auto"})
    arm = arm_of(study)
    drawn = [arm_sentinels(study, arm, {16: before, 32: after}) for before, after in ((16, 32), (11, 23), (9, 16))]
    assert [len(sentinels) for sentinels in drawn] == [8 + 4] * 3
    for sentinels, before in zip(drawn, (16, 11, 9), strict=True):
        assert {index for index in sentinels if index < before} == arm_sentinels(study, arm, {16: before})


WITH_AN_AUDIT = ["adamw", {"name": "audit", "optimizer": "adamw", "budget": 2}, {"name": "lamb", "untuned": True}]


def grown(folder: Path, *sizes: int, sentinels: int | str = "auto") -> ResolvedStudy:
    """A study of an arm, its audit and an untuned arm, without a cap, whose run has grown to so many trials per arm."""
    tune = {"trials_per_arm": sizes[0], "asha": {**ASHA, "sentinels": sentinels}}
    study = resolved(folder, optimizers=WITH_AN_AUDIT, tune=tune)
    for before, after in pairwise(sizes):
        extend(study, folder, after - before)
    return extended(study, folder)


@pytest.mark.parametrize(
    "sizes",
    [(100, 200), (60, 64, 300), (8, 9, 10, 11, 80), (4, 40), (2, 50)],
    ids=lambda sizes: "-".join(map(str, sizes)),
)
def test_at_any_time_an_extended_arm_has_its_share_of_sentinels(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    before: frozenset[int] = frozenset()
    for count in range(1, len(sizes) + 1):
        study = grown(tmp_path, *sizes[:count])
        found = arm_sentinels(study, arm_of(study))
        assert len(found) >= sentinel_count(study.study.tune.asha, sizes[0])
        assert 0.15 * sizes[count - 1] <= len(found) <= sizes[count - 1]
        size_before = sizes[count - 2] if count > 1 else 0
        assert {index for index in found if index < size_before} == before, "who had begun is not drawn later"
        before = found
        (tmp_path / EXTENSION).unlink(missing_ok=True)


def test_an_audit_has_the_sentinels_of_its_arm_and_as_many_further_ones_of_its_own(tmp_path: Path) -> None:
    study = grown(tmp_path, 20)
    arm, audit, untuned = plan_arms(study)
    assert arm_sentinels(study, audit) == arm_sentinels(study, arm)
    assert arm_sentinels(study, untuned) == arm_sentinels(study, arm) & {0}
    longer = grown(tmp_path, 20, 60)
    arm, longer_audit, _ = plan_arms(longer)
    further = arm_sentinels(longer, longer_audit) - arm_sentinels(study, audit)
    assert len(arm_sentinels(longer, longer_audit)) == len(arm_sentinels(longer, arm)) == 8 + 6
    assert further <= set(range(40, 120)), "among those that the extension gave it"
    assert max(further) >= 60, "not among those of the other arm alone"


def test_a_capped_audit_has_no_more_sentinels_than_its_arm(tmp_path: Path) -> None:
    tune = {"trials_per_arm": 100, "asha": {**ASHA, "sentinels": "auto"}, "device_seconds_per_arm": 1e6}
    study = resolved(tmp_path, optimizers=WITH_AN_AUDIT, tune=tune)
    arm, audit, _ = plan_arms(study)
    assert arm_sentinels(study, audit, {200: 200}) == arm_sentinels(study, arm, {100: 100})
    assert len(arm_sentinels(study, audit, {200: 108})) == len(arm_sentinels(study, arm, {100: 54}))
    assert arm_sentinels(study, audit, {200: 108}) <= set(range(54))


def test_the_plan_of_an_extended_run_counts_its_true_sentinels(tmp_path: Path) -> None:
    asha = {**ASHA, "sentinels": "auto"}
    study = grown(tmp_path, 16, 32)
    assert [row["sentinels"] for row in plan_summary(study)["arms"]] == [
        12,
        12,
        len(arm_sentinels(study, plan_arms(study)[2])),
    ]
    assert next(each for each in lint(study) if each.rule == "F13").reason.startswith("12 of 32 trials")
    (tmp_path / EXTENSION).unlink()
    start = capped(tmp_path, 400.0, trials_per_arm=16, asha=asha)
    extend(start, tmp_path, 16)
    afforded = {"ethanol/adamw": {16: 16, 32: 32}, "ethanol/schedule_free": {16: 11, 32: 23}}
    rows = plan_summary(extended(start, tmp_path), {"ethanol/schedule_free": 1e-9}, afforded=afforded)["arms"]
    assert [(row["trials"], row["sentinels"]) for row in rows] == [(32, 12), (23, 12)]


def test_an_untuned_arm_beside_arms_of_one_trial_stays_as_it_is_when_they_grow(tmp_path: Path) -> None:
    tune = {"trials_per_arm": 1, "asha": {**ASHA, "sentinels": "auto"}}
    study = resolved(tmp_path, optimizers=WITH_AN_AUDIT, tune=tune, confirm={"top_k": 1, "seeds": 5})
    extend(study, tmp_path, 9)
    assert [len(arm_sentinels(extended(study, tmp_path), arm)) for arm in plan_arms(extended(study, tmp_path))][2] == 1
