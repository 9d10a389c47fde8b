"""A study file is refused in one line or becomes a complete, hashed study."""

from __future__ import annotations

import json
import lzma
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.study.broken_studies import BROKEN, EXTXYZ, THREE_FRAMES, BrokenStudy, extxyz, put, quickstart
from tunebench.study.installed import shipped_folder
from tunebench.study.load import load_run, load_study, resolve
from tunebench.study.search_space import ChoiceParameter
from tunebench.study.spec import ExtxyzData, Schedule, ScheduleKind, StudyError
from tunebench.study.strict_yaml import read_yaml, write_yaml

QUICKSTART = shipped_folder("studies") / "quickstart.yaml"
FILE_LEVEL = [broken for broken in BROKEN if not broken.needs_data]
DATA_LEVEL = [broken for broken in BROKEN if broken.needs_data]


def written(folder: Path, study: dict[str, Any], name: str = "study.yaml") -> Path:
    file = folder / name
    file.write_text(write_yaml(study), encoding="utf-8")
    return file


@pytest.mark.parametrize("broken", FILE_LEVEL, ids=lambda broken: broken.id)
def test_a_broken_study_is_refused_in_one_line_that_names_file_and_key(broken: BrokenStudy, tmp_path: Path) -> None:
    file = broken.write(tmp_path)
    with pytest.raises(StudyError) as caught:
        load_study(file)
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    assert caught.value.key == broken.key
    assert line.startswith(f"{tmp_path / broken.reported_in}: ")
    assert re.search(r"found .+, allowed: .+", line)
    assert caught.value.more == 0


@pytest.mark.parametrize("broken", DATA_LEVEL, ids=lambda broken: broken.id)
def test_what_only_the_data_shows_is_not_guessed_from_the_file(broken: BrokenStudy, tmp_path: Path) -> None:
    assert load_study(broken.write(tmp_path)).name == "quickstart"


@pytest.mark.parametrize(
    "odd", [None, True, 10**400, float("nan"), "a\x00b", "x" * 5000, [[1]], {"a": [float("inf")]}], ids=type
)
def test_whatever_stands_in_place_of_a_value_is_accepted_or_refused_in_one_line(odd: object, tmp_path: Path) -> None:
    (tmp_path / "three.xyz").write_text(THREE_FRAMES)
    study = quickstart()
    extxyz(val="three.xyz", ood={"hot": "three.xyz"}, frames={"train": 5, "val": 1, "test": 1, "ood": 1})(study)
    study["optimizers"][0] = {"name": "adamw", "fixed": {"beta1": 0.9, "learning_rate": 0.1, "weight_decay": 0.0}}
    study["optimizers"][3] = {"name": "soap", "fixed": {"max_precondition_dim": 64, "precondition_frequency": 2}}
    for path in _paths(study):
        changed = json.loads(json.dumps(study))
        put(*path, value=odd)(changed)
        assert len(_complaint(written(tmp_path, changed)).splitlines()) <= 1


def _complaint(file: Path) -> str:
    try:
        load_study(file)
    except StudyError as error:
        return str(error)
    return ""


def _paths(part: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    children = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    for name, child in children:
        yield (*path, name)
        yield from _paths(child, (*path, name))


def test_reading_a_study_loads_neither_torch_nor_ray() -> None:
    code = "import sys; from tunebench.study.load import resolve; from pathlib import Path"
    code += "; resolve(Path(sys.argv[1])); sys.exit(bool({'torch', 'ray', 'ase'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code, str(QUICKSTART)], check=False).returncode == 0


def test_there_are_many_broken_studies_with_different_names() -> None:
    assert len(FILE_LEVEL) >= 40
    assert len({broken.id for broken in BROKEN}) == len(BROKEN)


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (put("seed", value="5"), "seed: found '5', allowed: an integer"),
        (
            put("workloads", 0, "max_steps", value=0),
            "workloads[0].max_steps: found 0, allowed: greater than or equal to 1",
        ),
        (put("optimizers", 0, value="adamww"), "did you mean adamw?"),
        (put("workloads", 0, "data", "sytem", value="x"), "did you mean system?"),
        (
            put("workloads", 0, "data", "source", value="xtbb"),
            "found 'xtbb', allowed: extxyz, nequip, xtb, xtb-mixture; did you mean xtb?",
        ),
        (put("workloads", 0, "data", "system", value="ethanoll"), "did you mean ethanol?"),
        (
            put("optimizers", 3, value={"name": "soap", "fixed": {"fctp_view": "types"}}),
            'found \'types\', allowed: one of "flat", "per_type", "merged"',
        ),
        (put("workloads", 0, "model", "family", value="mace"), "found 'mace', allowed: 'nequip' or 'allegro'"),
        (put("optimizers", 0, value={"name": "adamw", "fixed": {"beta1": 1}}), "found 1, allowed: one of 0.9, 0.95"),
    ],
)
def test_the_line_says_what_was_found_and_what_is_allowed(edit: Any, line: str, tmp_path: Path) -> None:
    study = quickstart()
    edit(study)
    with pytest.raises(StudyError) as caught:
        load_study(written(tmp_path, study))
    assert line in str(caught.value)


def test_several_problems_are_counted_behind_the_first(tmp_path: Path) -> None:
    study = quickstart()
    study["seed"], study["tune"]["trials_per_arm"], study["confirm"]["seeds"] = -1, 0, 0
    with pytest.raises(StudyError, match=r"seed: found -1, .* \(and 2 more problems in this file\)$"):
        load_study(written(tmp_path, study))


def test_an_error_survives_the_way_out_of_a_worker(tmp_path: Path) -> None:
    with pytest.raises(StudyError) as caught:
        load_study(tmp_path / "none.yaml")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_quickstart_is_complete_after_loading() -> None:
    study = load_study(QUICKSTART)
    assert {"adamw", "schedule_free", "muon", "soap"} <= {arm.name for arm in study.optimizers}
    assert study.workloads[0].data == study.workloads[1].data
    assert study.schedule == Schedule()
    assert study.resources.max_failures == 2


def test_numbers_are_read_as_they_are_meant(tmp_path: Path) -> None:
    file = tmp_path / "numbers.yaml"
    file.write_text(
        "a: 1e-3\nb: 1E5\nc: 010\nd: 1_000\ne: no\nf: true\ng: 1.\nh: .5\ni: 2020-01-01\nj: 1:30\nk: ~\nl: '5'\n"
    )
    assert read_yaml(file) == {
        "a": 1e-3,
        "b": 1e5,
        "c": 10,
        "d": 1000,
        "e": "no",
        "f": True,
        "g": 1.0,
        "h": 0.5,
        "i": "2020-01-01",
        "j": "1:30",
        "k": None,
        "l": "5",
    }
    assert type(read_yaml(file)["c"]) is int


@pytest.mark.parametrize(
    "value",
    ["1e-3", "no", "true", "null", "", "~", "010", "a: b", "5", 1e-12, 1e22, 3, None, [1, "1"], "\x85", "a\u2028b\n"],
)
def test_what_is_written_reads_back_the_same(value: object, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(write_yaml({"key": value}))
    back = read_yaml(tmp_path / "a.yaml")["key"]
    assert back == value
    assert type(back) is type(value)


def test_merge_keys_and_anchors_stand_for_what_they_name(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\n")
    assert read_yaml(file) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 3}}


def test_an_integer_is_a_number_but_a_number_is_no_integer(tmp_path: Path) -> None:
    study = quickstart()
    study["workloads"][0]["data"]["temperature_kelvin"] = 300
    assert load_study(written(tmp_path, study)) == load_study(written(tmp_path, quickstart(), "same.yaml"))


def test_the_hash_ignores_formatting_order_of_keys_and_place(tmp_path: Path) -> None:
    shuffled = dict(reversed(quickstart().items()))
    shuffled["optimizers"] = [{"name": name} for name in shuffled["optimizers"]]
    assert resolve(written(tmp_path, shuffled)).hash == resolve(QUICKSTART).hash


@pytest.mark.parametrize(
    "edit",
    [
        put("seed", value=1),
        put("workloads", 1, "max_steps", value=10**6),
        put("optimizers", 0, value={"name": "adamw", "fixed": {"weight_decay": 0.0}}),
        put("optimizers", 0, value={"name": "adamw", "schedule": {"kind": "linear"}}),
        put("optimizers", value=["schedule_free", "adamw", "muon", "soap"]),
        put("confirm", "refine", value={}),
    ],
)
def test_the_hash_changes_with_anything_that_changes_the_study(edit: Any, tmp_path: Path) -> None:
    study = quickstart()
    edit(study)
    assert resolve(written(tmp_path, study)).hash != resolve(QUICKSTART).hash


def test_a_refinement_that_is_switched_off_is_none(tmp_path: Path) -> None:
    study = quickstart()
    study["confirm"]["refine"] = None
    assert resolve(written(tmp_path, study)).hash == resolve(QUICKSTART).hash


@pytest.mark.parametrize("edit", [put("engine", value="lightning"), put("resources", value={"slots": 4})])
def test_the_hash_ignores_who_trains_so_a_run_may_go_on_with_another_engine(edit: Any, tmp_path: Path) -> None:
    study = quickstart()
    edit(study)
    assert resolve(written(tmp_path, study)).hash == resolve(QUICKSTART).hash


def test_the_hash_changes_with_a_search_space(tmp_path: Path) -> None:
    study = quickstart()
    study["optimizers"][0] = {"name": "adamw", "search_space": "own.yaml"}
    own = read_yaml(shipped_folder("search_spaces") / "adamw.yaml")
    (tmp_path / "own.yaml").write_text(write_yaml(own))
    same = resolve(written(tmp_path, study))
    own["parameters"]["learning_rate"]["high"] = 0.3
    (tmp_path / "own.yaml").write_text(write_yaml(own))
    assert same.hash == resolve(QUICKSTART).hash
    assert resolve(written(tmp_path, study)).hash != same.hash


def test_a_fixed_hyperparameter_leaves_the_search(tmp_path: Path) -> None:
    study = quickstart()
    study["optimizers"][0] = {"name": "adamw", "fixed": {"weight_decay": 0, "beta1": 0.95}}
    space = resolve(written(tmp_path, study)).spaces["adamw"]
    assert list(space.parameters) == ["learning_rate", "beta2"]
    assert space.fixed_values() == {"eps": 1e-12, "weight_decay": 0.0, "beta1": 0.95}


def test_eps_may_be_fixed_when_every_arm_has_the_same(tmp_path: Path) -> None:
    study = quickstart()
    study["optimizers"] = [{"name": name, "fixed": {"eps": 1e-10}} for name in study["optimizers"]]
    spaces = resolve(written(tmp_path, study)).spaces
    assert {space.fixed_values()["eps"] for space in spaces.values()} == {1e-10}


def test_the_arm_then_the_optimizer_then_the_study_decides_the_schedule(tmp_path: Path) -> None:
    study = quickstart()
    study["schedule"] = {"kind": "linear", "warmup_fraction": 0.1}
    study["optimizers"][0] = {"name": "adamw", "schedule": {"kind": "cosine", "final_factor": 0.1}}
    schedules = resolve(written(tmp_path, study)).schedules
    assert schedules["adamw"] == Schedule(kind=ScheduleKind.COSINE, final_factor=0.1)
    assert schedules["schedule_free"] == Schedule(kind=ScheduleKind.CONSTANT, warmup_fraction=0.1)
    assert schedules["soap"] == Schedule(kind=ScheduleKind.LINEAR, warmup_fraction=0.1)


def test_a_frozen_study_reloads_to_the_same_study_and_hash(tmp_path: Path) -> None:
    study = quickstart()
    study["optimizers"][0] = {"name": "adamw", "fixed": {"weight_decay": 0.0}}
    resolved = resolve(written(tmp_path, study))
    run = tmp_path / "runs" / "quickstart"
    resolved.write(run)
    frozen = load_run(run)
    assert frozen.hash == resolved.hash == (run / "study.sha256").read_text().strip()
    assert frozen.spaces == resolved.spaces
    assert frozen.schedules == resolved.schedules
    assert frozen.study.workloads == resolved.study.workloads
    assert resolve(run / "study.yaml").hash == resolved.hash
    assert sorted(path.name for path in run.rglob("*") if path.is_file()) == [
        *("adamw.yaml", "muon.yaml", "schedule_free.yaml", "soap.yaml"),
        *("study.sha256", "study.yaml"),
    ]


@pytest.mark.parametrize("name", ["study.yaml", "search_spaces/adamw.yaml"])
def test_a_run_whose_study_was_edited_is_refused(name: str, tmp_path: Path) -> None:
    resolve(QUICKSTART).write(tmp_path)
    file = tmp_path / name
    file.write_text(file.read_text().replace("seed: ", "seed: 1").replace("high: 0.2", "high: 0.3"))
    with pytest.raises(
        StudyError, match=r"with hash [0-9a-f]{12}, allowed: hash [0-9a-f]{12} of study.sha256"
    ) as caught:
        load_run(tmp_path)
    assert len(str(caught.value).splitlines()) == 1


def test_reformatting_a_frozen_study_changes_nothing(tmp_path: Path) -> None:
    resolved = resolve(QUICKSTART)
    resolved.write(tmp_path)
    file = tmp_path / "study.yaml"
    file.write_text("# a comment\n" + write_yaml(dict(reversed(read_yaml(file).items()))))
    assert load_run(tmp_path).hash == resolved.hash


@pytest.mark.parametrize("lost", ["study.yaml", "study.sha256", "search_spaces/soap.yaml"])
def test_a_run_with_a_lost_file_is_refused_in_one_line(lost: str, tmp_path: Path) -> None:
    resolve(QUICKSTART).write(tmp_path)
    (tmp_path / lost).unlink()
    with pytest.raises(StudyError) as caught:
        load_run(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert Path(lost).name in str(caught.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"found no such directory, allowed: a run directory"):
        load_run(tmp_path / "nowhere")


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StudyError, match="a folder that can be written"):
        resolve(QUICKSTART).write(tmp_path / "run")


def test_data_files_are_found_beside_the_study_and_through_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "three.xyz").write_text(THREE_FRAMES)
    with lzma.open(tmp_path / "hot.xyz.xz", "wt") as file:
        file.write(THREE_FRAMES)
    monkeypatch.setenv("SOME_DATA", str(tmp_path))
    study = quickstart()
    frames = {"train": 5, "val": 1, "test": 1, "ood": 1}
    extxyz(ood={"hot": "${SOME_DATA}/hot.xyz.xz"}, frames=frames)(study)
    resolved = resolve(written(tmp_path, study))
    data = resolved.study.workloads[0].data
    assert isinstance(data, ExtxyzData)
    assert (data.train, data.test) == (str(tmp_path.resolve() / "three.xyz"), None)
    assert data.ood == {"hot": str(tmp_path.resolve() / "hot.xyz.xz")}

    monkeypatch.delenv("SOME_DATA")
    resolved.write(tmp_path / "runs")
    assert load_run(tmp_path / "runs").study.workloads[0].data == data
    assert resolve(tmp_path / "runs" / "study.yaml").hash == resolved.hash


def test_a_slice_of_a_file_is_frozen_with_the_study_and_counts_in_its_hash(tmp_path: Path) -> None:
    (tmp_path / "three.xyz").write_text(THREE_FRAMES)
    three = tmp_path.resolve() / "three.xyz"
    study = quickstart()
    parts = {"train": "three.xyz@1:", "ood": {"hot": "three.xyz@-3"}}
    frames = {"train": 5, "val": 1, "test": 1, "ood": 1}
    extxyz(**parts, test=str(three), frames=frames)(study)
    resolved = resolve(written(tmp_path, study))
    data = resolved.study.workloads[0].data
    assert isinstance(data, ExtxyzData)
    assert (data.train, data.test, data.ood) == (f"{three}@1:", str(three), {"hot": f"{three}@-3"})

    resolved.write(tmp_path / "run")
    assert f"train: {three}@1:" in (tmp_path / "run" / "study.yaml").read_text().replace("'", "")
    assert load_run(tmp_path / "run").study.workloads[0].data == data
    assert resolve(tmp_path / "run" / "study.yaml").hash == resolved.hash
    extxyz(**parts | {"train": "three.xyz@2:"}, test=str(three), frames=frames)(study)
    assert resolve(written(tmp_path, study)).hash != resolved.hash


def test_a_run_can_be_read_where_its_data_are_not(tmp_path: Path) -> None:
    (tmp_path / "three.xyz").write_text(THREE_FRAMES)
    study = quickstart()
    study["workloads"][0]["data"] = dict(EXTXYZ)
    resolved = resolve(written(tmp_path, study))
    resolved.write(tmp_path / "run")
    (tmp_path / "three.xyz").unlink()
    assert load_run(tmp_path / "run").hash == resolved.hash


@pytest.mark.parametrize("name", ["threebpa", "mlearn-si"])
def test_a_shipped_study_names_the_variable_that_its_data_need(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNEBENCH_DATA", raising=False)
    with pytest.raises(StudyError, match=r"workloads\[0\].data.train: .* a set environment variable TUNEBENCH_DATA"):
        load_study(shipped_folder("studies") / f"{name}.yaml")


@pytest.mark.data
@pytest.mark.parametrize(("name", "arms"), [("threebpa", 14), ("mlearn-si", 10)])
def test_a_shipped_study_resolves_with_its_data(
    name: str, arms: int, reference_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEBENCH_DATA", str(reference_data))
    study = load_study(shipped_folder("studies") / f"{name}.yaml")
    assert len(study.workloads) * len(study.optimizers) == arms


def test_a_choice_is_stored_as_the_search_space_writes_it(tmp_path: Path) -> None:
    study = quickstart()
    study["optimizers"][0] = {"name": "lamb", "fixed": {"clamp": 10}}
    space = resolve(written(tmp_path, study)).spaces["lamb"]
    assert type(space.fixed_values()["clamp"]) is float
    assert all(name != "clamp" for name, part in space.parameters.items() if isinstance(part, ChoiceParameter))
