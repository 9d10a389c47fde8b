"""Whatever a study or a search space says is in the study that is read from it, or is refused in one line."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.study.broken_studies import THREE_FRAMES
from tunebench.study.installed import shipped_folder
from tunebench.study.resolve import ResolvedStudy, load_run, resolve
from tunebench.study.spec import StudyError
from tunebench.study.strict_yaml import read_yaml, write_yaml

XTB: dict[str, Any] = {
    "name": "fuzzed",
    "description": "d",
    "seed": 3,
    "workloads": [
        {
            "name": "w",
            "data": {
                "source": "xtb",
                "system": "ethanol",
                "ood_temperature_kelvin": 600.0,
                "frames": {"train": 10, "val": 4, "test": 4, "ood": 3},
            },
            "model": {"family": "allegro", "preset": "tiny", "arguments": {"num_layers": 2, "x": [1, {"y": None}]}},
            "loss": {"forces": 2},
            "labels": {"force_fraction": 0.5},
            "batch_size": 2,
            "max_steps": 40,
            "evaluate_every_steps": 10,
            "clip_global_norm": 1.5,
        }
    ],
    "optimizers": [
        {"name": "adamw", "fixed": {"beta1": 0.95, "weight_decay": 0}, "schedule": {"kind": "linear"}},
        {"name": "untuned", "optimizer": "adamw", "untuned": True},
    ],
    "objective": {"metric": "rmse", "readout": "raw"},
    "tune": {"trials_per_arm": 4, "asha": {"grace_steps": 10, "reduction_factor": 2, "sentinels": 1}},
    "confirm": {"top_k": 1, "seeds": 2},
    "resources": {"cpus_per_trial": 2, "slots": 4},
    "engine": "cohort",
    "keep_checkpoints": "none",
    "waive": {"F11": "because"},
}
FILES: dict[str, Any] = {
    "name": "files",
    "workloads": [
        {
            "name": "w",
            "data": {
                "source": "extxyz",
                "train": "three.xyz",
                "ood": {"far": "three.xyz"},
                "frames": {"train": 1, "val": 1, "test": 1, "ood": 1},
                "keys": {"energy": "e"},
            },
            "model": {"family": "nequip", "r_max_angstrom": 4},
            "batch_size": 1,
            "max_steps": 8,
        },
        {
            "name": "v",
            "data": {"source": "nequip", "datamodule": {"_target_": "a.B", "seed": 1, "t": [True, None]}, "ood": ["o"]},
            "model": {"family": "nequip"},
            "max_steps": 9,
        },
    ],
    "optimizers": ["adamw"],
    "tune": {"asha": None},
}
SMALL = {"data": {"source": "nequip", "datamodule": {"_target_": "a.B"}}, "model": {"family": "nequip"}, "max_steps": 9}
OWN_SPACE = {
    "name": "own",
    "workloads": [{"name": "w", **SMALL}],
    "optimizers": [{"name": "adamw", "search_space": "space.yaml"}],
}
SPACES = [read_yaml(shipped_folder("search_spaces") / f"{name}.yaml") | {"name": "adamw"} for name in ("adamw", "soap")]

WORDS = [
    "",
    "yes",
    "no",
    "on",
    "off",
    "~",
    "1e3",
    "010",
    "0o17",
    "0x1f",
    "1:30",
    "1_0",
    ".5",
    "+1",
    "2020-01-01",
    "=",
    "<<",
]
STRANGE = [
    "é",
    "\u2028",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "a\nb",
    "💥",
    "x" * 300,
    "../w",
    "${HOME}",
    "${NO_SUCH}",
    "~nobody/x",
]
NUMBERS = [0, -1, 1, 2**31, 2**63, 10**400, 0.0, -0.0, 1e-320, 1e308, math.inf, -math.inf, math.nan, 0.1 + 0.2]
LEAF = st.one_of(st.none(), st.booleans(), st.sampled_from([*WORDS, *STRANGE, *NUMBERS]), st.integers(), st.floats())
ODD = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
KEYS = st.one_of(
    st.sampled_from(["seed", "name", "asha", "forces", "frames", "F1", "data.x", *WORDS, *STRANGE]), st.text(max_size=6)
)

EDITS = ["nudge"] * 6 + ["replace", "drop", "add", "misspell", "exchange", "graft", "double", "wrap", "empty"]


def places(part: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(part, list) else ()
    return [place for name, child in children for place in ((*path, name), *places(child, (*path, name)))]


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        document = document[name]
    return document


def nudged(value: Any) -> Any:
    """Another value of the same sort, which is as often allowed as not."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return 0.9 * value
        case dict():
            return dict(reversed(value.items()))
    return value


@st.composite
def mutated(draw: st.DrawFn, documents: list[dict[str, Any]]) -> dict[str, Any]:
    """A valid document after one to three edits that know its keys."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        found = places(document)
        if not found:
            break
        path, other = draw(st.sampled_from(found)), draw(st.sampled_from(found))
        parent = at(document, path[:-1])
        match draw(st.sampled_from(EDITS)):
            case "nudge":
                parent[path[-1]] = nudged(parent[path[-1]])
            case "drop":
                del parent[path[-1]]
            case "add" if isinstance(parent, dict):
                parent[draw(KEYS)] = draw(ODD)
            case "misspell" if isinstance(parent, dict):
                parent[f"{path[-1]}s"] = parent.pop(path[-1])
            case "exchange":
                mine, theirs = copy.deepcopy(parent[path[-1]]), copy.deepcopy(at(document, other))
                at(document, other[:-1])[other[-1]] = mine
                if path in places(document):
                    at(document, path[:-1])[path[-1]] = theirs
            case "graft":
                parent[path[-1]] = copy.deepcopy(at(document, other))
            case "double" if isinstance(parent, list):
                parent.append(copy.deepcopy(parent[path[-1]]))
            case "wrap":
                parent[path[-1]] = [parent[path[-1]]]
            case "empty":
                parent[path[-1]] = {} if isinstance(parent[path[-1]], dict) else []
            case _:
                parent[path[-1]] = draw(ODD)
    return document


@st.composite
def mistyped(draw: st.DrawFn, documents: list[dict[str, Any]]) -> str:
    """The text of a valid document after one to three slips of a hand or of a program."""
    text = write_yaml(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(1, 3))):
        lines = text.splitlines(keepends=True) or [""]
        one, other = draw(st.integers(0, len(lines) - 1)), draw(st.integers(0, len(lines) - 1))
        place = draw(st.integers(0, len(text)))
        key, colon, _ = lines[one].partition(": ")
        match draw(
            st.sampled_from(["cut", "double", "exchange", "word", "indent", "insert", "anchor", "merge", "tag"])
        ):
            case "cut":
                text = text[:place]
            case "double":
                text = "".join([*lines[:other], lines[one], *lines[other:]])
            case "exchange":
                lines[one], lines[other] = lines[other], lines[one]
                text = "".join(lines)
            case "word" if colon:
                lines[one] = f"{key}: {draw(st.sampled_from([*WORDS, *map(str, NUMBERS)]))}\n"
                text = "".join(lines)
            case "indent":
                lines[one] = draw(st.sampled_from(["  ", "\t", "- "])) + lines[one]
                text = "".join(lines)
            case "anchor" if colon:
                sign = draw(st.sampled_from(["&a ", "*a ", "&a *a ", "!!str ", "!x "]))
                lines[one] = f"{key}: {sign}{lines[one][len(key) + 2 :]}"
                text = "".join(lines)
            case "merge":
                lines.insert(
                    one,
                    draw(st.sampled_from(["<<: {seed: 4}\n", "  <<: {seed: 4}\n", "? [a]\n: 1\n", "---\n", "...\n"])),
                )
                text = "".join(lines)
            case "tag":
                text = draw(st.sampled_from(["%YAML 1.1\n---\n", "\ufeff", "# c\n", "--- !!map\n"])) + text
            case _:
                text = text[:place] + draw(st.sampled_from([*":,{}[]#&*!|>'\"%@`-?\\", *STRANGE[:5]])) + text[place:]
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzed")
    (folder / "three.xyz").write_text(THREE_FRAMES)
    (folder / "space.yaml").write_text(write_yaml(SPACES[0]))
    return folder


def accepted(file: Path) -> ResolvedStudy | None:
    """The study of a file, None where it is refused as it should be."""
    try:
        return resolve(file)
    except StudyError as error:
        line = str(error)
    note(line)
    assert len(line.splitlines()) == 1
    assert line.isprintable()
    assert line.startswith(str(file.parent))
    assert ": found " in line
    assert ", allowed: " in line
    assert len(line) < 1500
    return None


def missing(given: Any, read: Any, place: str = "") -> list[str]:
    """Places of a document that are not in what was read from it."""
    if isinstance(given, dict) and isinstance(read, dict):
        lost = [f"{place}.{name}" for name in given if name not in read]
        return lost + [p for n in given if n in read for p in missing(given[n], read[n], f"{place}.{n}")]
    if isinstance(given, list) and isinstance(read, list | tuple) and len(given) == len(read):
        return [
            p
            for i, (one, other) in enumerate(zip(given, read, strict=True))
            for p in missing(one, other, f"{place}[{i}]")
        ]
    if isinstance(given, str) and isinstance(read, dict):
        return [] if read.get("name") == given else [place]  # a bare name of an optimizer
    alike = given == read and isinstance(given, bool) == isinstance(read, bool)
    is_file = isinstance(given, str) and isinstance(read, str) and Path(read).name == Path(given).name
    return [] if alike or is_file else [place]


def assert_whole(document: dict[str, Any], resolved: ResolvedStudy, folder: Path) -> None:
    """Everything that was given is in the study, and in the frozen study that is read back."""
    assert missing(document, resolved.study.model_dump(mode="json")) == []
    run = folder / "run"
    resolved.write(run)
    again = load_run(run)
    assert again.hash == resolved.hash
    assert missing(document, again.study.model_dump(mode="json") | {"optimizers": document["optimizers"]}) == []


@settings(max_examples=450)
@given(document=mutated([XTB, FILES]))
def test_an_edited_study_is_read_whole_or_refused(folder: Path, document: dict[str, Any]) -> None:
    file = folder / "study.yaml"
    try:
        file.write_text(write_yaml(document), encoding="utf-8")
    except (UnicodeEncodeError, yaml.YAMLError):  # no editor can write that
        file.write_text(json.dumps(document), encoding="utf-8")
    resolved = accepted(file)
    if resolved is not None:
        assert_whole(document, resolved, folder)


@settings(max_examples=400)
@given(text=mistyped([XTB, FILES]))
def test_a_mistyped_study_is_read_whole_or_refused(folder: Path, text: str) -> None:
    file = folder / "study.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    resolved = accepted(file)
    if resolved is not None:
        assert repeated_keys(yaml.compose(text.removeprefix("\ufeff"), Loader=yaml.BaseLoader)) == []
        assert_whole(read_yaml(file), resolved, folder)


def repeated_keys(node: Any) -> list[str]:
    """Keys that a mapping holds twice, by a parser that keeps them all."""
    if isinstance(node, yaml.SequenceNode):
        return [key for part in node.value for key in repeated_keys(part)]
    if not isinstance(node, yaml.MappingNode):
        return []
    keys = [key.value for key, _ in node.value]
    return [key for key in keys if keys.count(key) > 1] + [k for _, part in node.value for k in repeated_keys(part)]


@settings(max_examples=250)
@given(space=mutated(SPACES))
def test_an_edited_search_space_is_read_whole_or_refused(folder: Path, space: dict[str, Any]) -> None:
    file = folder / "own.yaml"
    (folder / "space.yaml").write_text(json.dumps(space), encoding="utf-8")
    file.write_text(write_yaml(OWN_SPACE), encoding="utf-8")
    resolved = accepted(file)
    if resolved is not None:
        assert missing(space, resolved.spaces["adamw"].model_dump(mode="json")) == []


@settings(max_examples=200)
@given(text=mistyped(SPACES))
def test_a_mistyped_search_space_is_read_whole_or_refused(folder: Path, text: str) -> None:
    file = folder / "own.yaml"
    (folder / "space.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    file.write_text(write_yaml(OWN_SPACE), encoding="utf-8")
    resolved = accepted(file)
    if resolved is not None:
        assert missing(read_yaml(folder / "space.yaml"), resolved.spaces["adamw"].model_dump(mode="json")) == []
