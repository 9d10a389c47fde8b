from __future__ import annotations

from pathlib import Path

import pytest

from tests.study.test_plan import resolved
from tunebench.study.errors import RunError
from tunebench.study.extension import EXTENSION, extend, extended
from tunebench.study.plan import plan_arms
from tunebench.study.resolve import load_run
from tunebench.study.seeds import named_seed
from tunebench.tuning.samplers import sobol_points


def test_an_extended_run_has_more_configurations_in_every_arm_and_the_same_hash(tmp_path: Path) -> None:
    study, run = resolved(tmp_path), tmp_path / "run"
    study.write(run)
    assert extended(study, run) == study
    extend(study, run, 3)
    extend(study, run, 4)
    again = load_run(run)
    assert [arm.trials for arm in plan_arms(again)] == [16, 16]
    assert again.earlier_trials_per_arm == (9, 12)
    assert again.hash == study.hash
    assert extended(study, run).study == again.study.model_copy(update={"optimizers": study.study.optimizers})


def test_further_configurations_continue_the_sequence(tmp_path: Path) -> None:
    spaces, seed = list(resolved(tmp_path).spaces.values()), named_seed(0, "sobol", "ethanol")
    assert sobol_points(spaces, 16, seed)[:9] == sobol_points(spaces, 9, seed)


def test_an_extension_that_does_not_say_what_was_before_followed_the_study(tmp_path: Path) -> None:
    study = resolved(tmp_path)
    (tmp_path / EXTENSION).write_text('{"trials_per_arm": 12, "widened": {}}')
    assert extended(study, tmp_path).earlier_trials_per_arm == (9,)
    assert extended(extended(study, tmp_path), tmp_path) == extended(study, tmp_path)
    extend(study, tmp_path, 3)
    assert extended(study, tmp_path).earlier_trials_per_arm == (9, 12)


@pytest.mark.parametrize("earlier", ["[]", "[9, 9]", "[9, 16]", "[12, 9]", '["9"]', "[[]]", '"9"', "[9.0]"])
def test_a_past_that_no_extension_can_have_is_refused_in_one_line(tmp_path: Path, earlier: str) -> None:
    study = resolved(tmp_path)
    (tmp_path / EXTENSION).write_text(f'{{"trials_per_arm": 16, "earlier": {earlier}, "widened": {{}}}}')
    with pytest.raises(RunError, match=r"earlier: found .* allowed: ascending integers below 16") as error:
        extended(study, tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"trials_per_arm": 8}',
        '{"trials_per_arm": "many"}',
        '{"trials_per_arm": 9, "widened": []}',
        '{"trials_per_arm": 9, "widened": {"lion": {"learning_rate": [1e-9, 1e3]}}}',
        '{"trials_per_arm": 9, "widened": {"adamw": {"learning_rate": [0.01, 0.02]}}}',
        '{"trials_per_arm": 9, "widened": {"adamw": {"learning_rate": [-1.0, 1e3]}}}',
        '{"trials_per_arm": 9, "widened": {"adamw": {"learning_rate": 3}}}',
    ],
)
def test_a_damaged_extension_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    study = resolved(tmp_path)
    (tmp_path / EXTENSION).write_text(text)
    with pytest.raises(RunError, match=r"allowed: .*integer of at least 9") as error:
        extended(study, tmp_path)
    assert len(str(error.value).splitlines()) == 1
