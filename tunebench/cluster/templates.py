"""`tunebench cluster init`: a copy of a cluster's description with a user's answers in it.

The descriptions in `cluster/` are valid as they are and hold example values; an answer takes the place of an example
wherever it stands, and all comments stay.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from tunebench.study.errors import RunError

_PACKAGE = Path(__file__).resolve().parent
_LAUNCH = "launch.py"


class Kind(StrEnum):
    """Where a cluster comes from."""

    ONPREM = "onprem"
    AWS = "aws"
    GCP = "gcp"
    KUBERAY = "kuberay"
    SLURM = "slurm"


@dataclass(frozen=True, kw_only=True)
class Question:
    """Something a description must be told.

    Attributes:
        name: of the answer.
        asks: the question.
        example: what stands in the template.
        allowed: in words, and `form` as a regular expression of the whole answer.
        places: what surrounds the example in the template, with {} for it.
        required: whether the example is no answer.
    """

    name: str
    asks: str
    example: str
    allowed: str
    form: str
    places: tuple[str, ...] = ("{}",)
    required: bool = False

    def checked(self, value: str) -> str:
        """The answer as it goes into the file.

        Raises:
            RunError: it is not allowed.
        """
        value = ", ".join(part.strip() for part in value.strip().split(","))
        if not re.fullmatch(self.form, value):
            raise RunError(f"answer {self.name}: found {value!r}, allowed: {self.allowed}")
        return value


_PATH, _HOST = r"[~./\w][\w./~-]*", r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?"
_WORD, _COUNT = r"[A-Za-z0-9][\w.-]*", r"[1-9][0-9]{0,4}"

_NAME = Question(
    name="name",
    asks="name of the cluster",
    example="tunebench",
    allowed="letters, digits and -",
    form=r"[a-z]([a-z0-9-]{0,40}[a-z0-9])?",
    places=("cluster_name: {}",),
)
_STORAGE = Question(
    name="storage",
    asks="folder that all machines share, for runs and prepared data",
    example="/shared/tunebench",
    allowed="an absolute path without spaces",
    form=r"/[\w./-]+",
)
_MOUNTED = Question(
    name="storage",
    asks="folder below /shared for runs and prepared data",
    example="/shared/tunebench",
    allowed="a path below /shared, without spaces",
    form=r"/shared/[\w./-]+",
)
_SOURCE = Question(
    name="source",
    asks="folder of the checkout on this machine",
    example=".",
    allowed="a path without spaces",
    form=_PATH,
    places=("~/tunebench-source: {} ",),
)
_STUDIES = Question(
    name="studies",
    asks="folder of the study files on this machine",
    example="studies",
    allowed="a path without spaces",
    form=_PATH,
    places=("~/studies: {} ",),
)
_MACHINES = Question(
    name="max_workers",
    asks="GPU machines at once, at most",
    example="8",
    allowed="a count from 1",
    form=_COUNT,
    places=("max_workers: {} ", "--gpus {}"),
)

QUESTIONS: Mapping[Kind, tuple[Question, ...]] = {
    Kind.ONPREM: (
        Question(
            name="head",
            asks="address or name of the head",
            example="192.0.2.10",
            allowed="an address or a host name",
            form=_HOST,
            required=True,
        ),
        Question(
            name="workers",
            asks="addresses or names of the other machines, with commas",
            example="192.0.2.11, 192.0.2.12",
            allowed="addresses or host names with commas",
            form=rf"({_HOST}(, {_HOST})*)?",
            required=True,
        ),
        Question(
            name="user",
            asks="user to log in as",
            example="ubuntu",
            allowed="a user name",
            form=r"[a-z_][\w.-]*",
            places=("ssh_user: {}",),
            required=True,
        ),
        Question(
            name="key",
            asks="private ssh key that opens all machines",
            example="~/.ssh/id_ed25519",
            allowed="a path without spaces",
            form=_PATH,
        ),
        Question(
            name="environment",
            asks="Python environment on every machine, made where it is not there",
            example="~/tunebench-env",
            allowed="a path without spaces",
            form=_PATH,
        ),
        _STORAGE,
        _SOURCE,
        _STUDIES,
        _NAME,
    ),
    Kind.AWS: (
        Question(
            name="region", asks="region", example="us-east-1", allowed="a region of AWS", form=r"[a-z]{2}(-[a-z]+)+-\d"
        ),
        Question(
            name="image",
            asks="Ubuntu image of that region with NVIDIA's driver and Python 3.11",
            example="ami-0271ce88f6c03e149",
            allowed="ami- and hexadecimal digits",
            form=r"ami-[0-9a-f]{8,17}",
            required=True,
        ),
        Question(
            name="file_system",
            asks="file system (EFS) that all machines share",
            example="fs-0123456789abcdef0",
            allowed="fs- and hexadecimal digits",
            form=r"fs-[0-9a-f]{8,17}",
            required=True,
        ),
        Question(name="machine", asks="GPU machine", example="g6.xlarge", allowed="an instance type", form=_WORD),
        Question(name="head_machine", asks="head", example="m6i.xlarge", allowed="an instance type", form=_WORD),
        _MACHINES,
        _MOUNTED,
        _SOURCE,
        _STUDIES,
        _NAME,
    ),
    Kind.GCP: (
        Question(
            name="project", asks="project", example="my-project", allowed="a project id", form=_WORD, required=True
        ),
        Question(
            name="zone",
            asks="zone with the GPUs",
            example="us-central1-a",
            allowed="a zone, such as us-central1-a",
            form=r"[a-z]+-[a-z]+\d+-[a-z]",
        ),
        Question(
            name="file_system",
            asks="file system (Filestore) that all machines share, ADDRESS:/SHARE",
            example="198.51.100.2:/share",
            allowed="ADDRESS:/SHARE",
            form=rf"{_HOST}:/[\w./-]+",
            required=True,
        ),
        Question(name="machine", asks="GPU machine", example="g2-standard-8", allowed="a machine type", form=_WORD),
        Question(name="head_machine", asks="head", example="n2-standard-4", allowed="a machine type", form=_WORD),
        Question(
            name="resources",
            asks="cores and GPUs of the GPU machine",
            example="8, 1",
            allowed="two counts with a comma",
            form=rf"{_COUNT}, {_COUNT}",
            places=("resources: {{CPU: {0}, GPU: {1}}}",),
        ),
        _MACHINES,
        _MOUNTED,
        _SOURCE,
        _STUDIES,
        _NAME,
    ),
    Kind.KUBERAY: (
        Question(
            name="image",
            asks="image, made with cluster/docker/Dockerfile",
            example="registry.example.org/tunebench:latest",
            allowed="an image's name",
            form=r"[a-z0-9][\w./:@-]*",
            required=True,
        ),
        Question(
            name="claim",
            asks="PersistentVolumeClaim (ReadWriteMany) for runs and prepared data",
            example="tunebench",
            allowed="the name of a claim",
            form=r"[a-z0-9]([a-z0-9-]*[a-z0-9])?",
            places=("claimName: {}",),
            required=True,
        ),
        Question(
            name="max_workers",
            asks="pods with a GPU at once, at most",
            example="8",
            allowed="a count from 1",
            form=_COUNT,
            places=("maxReplicas: {} ", "--gpus {}"),
        ),
    ),
    Kind.SLURM: (
        Question(
            name="partition",
            asks="partition",
            example="gpu",
            allowed="a partition's name",
            form=_WORD,
            places=("--partition={}",),
            required=True,
        ),
        Question(
            name="nodes",
            asks="nodes",
            example="2",
            allowed="a count from 1",
            form=_COUNT,
            places=("--nodes={}\n",),
        ),
        Question(
            name="gpus",
            asks="GPUs of a node",
            example="4",
            allowed="a count, 0 for cores alone",
            form=rf"0|{_COUNT}",
            places=("--gpus-per-node={}",),
        ),
        Question(
            name="cpus",
            asks="cores of a node",
            example="32",
            allowed="a count from 1",
            form=_COUNT,
            places=("--cpus-per-task={}",),
        ),
        Question(
            name="time",
            asks="time limit",
            example="24:00:00",
            allowed="[DAYS-]HOURS:MINUTES:SECONDS",
            form=r"(\d+-)?\d{1,3}:\d\d:\d\d",
        ),
        _STORAGE,
    ),
}

_FILES = {Kind.KUBERAY: "kuberay-rayjob.yaml", Kind.SLURM: "slurm.sbatch"}


def template_file(name: str) -> Path:
    """A file of `cluster/`: inside an installed package, or at the root of a checkout.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    places = (_PACKAGE / "files" / name, _PACKAGE.parents[1] / "cluster" / name)
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError(f"tunebench is incomplete: no file {name!r} at {places[0]} or {places[1]}; reinstall it")


def template_of(kind: Kind) -> Path:
    """The description of a kind of cluster with its examples."""
    return template_file(_FILES.get(kind, f"{kind}.yaml"))


def parsed_answers(given: Iterable[str]) -> dict[str, str]:
    """Answers by name, from NAME=VALUE each.

    Raises:
        RunError: one has another form, or a name comes twice.
    """
    answers: dict[str, str] = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name or name in answers:
            raise RunError(f"--answer: found {pair!r}, allowed: NAME=VALUE, every name once")
        answers[name] = value
    return answers


def checked_answers(kind: Kind, answers: Mapping[str, str]) -> dict[str, str]:
    """All answers of a kind, examples for those that were not given.

    Raises:
        RunError: an answer nobody asked for, one that is missing, or one that is not allowed.
    """
    questions = {question.name: question for question in QUESTIONS[kind]}
    for name in answers:
        if name not in questions:
            raise RunError(f"answer {name}: found no such question for {kind}, allowed: {', '.join(questions)}")
    missing = [f"{name} ({q.asks})" for name, q in questions.items() if q.required and name not in answers]
    if missing:
        raise RunError(f"answers: found none to {'; '.join(missing)}, allowed: --answer NAME=VALUE for each")
    return {name: q.checked(answers[name]) if name in answers else q.example for name, q in questions.items()}


def fill(kind: Kind, answers: Mapping[str, str]) -> str:
    """The text of a description with `checked_answers` in the place of its examples."""
    replaced = {}
    for question in QUESTIONS[kind]:
        for place in question.places:
            replaced[_put(place, question.example)] = _put(place, answers[question.name])
    if kind is Kind.GCP:
        replaced["region: us-central1 "] = f"region: {answers['zone'].rpartition('-')[0]} "
    # at once, and the longest first: an answer may itself look like an example
    longest_first = sorted(replaced, key=len, reverse=True)
    examples = re.compile("|".join(map(re.escape, longest_first)))
    return examples.sub(lambda found: replaced[found[0]], template_of(kind).read_text(encoding="utf-8"))


def write_description(kind: Kind, answers: Mapping[str, str], out: Path | None) -> list[Path]:
    """Write a description, and beside it what `ray submit` is to run where that kind is started so.

    Args:
        kind: of the cluster.
        answers: as given; missing ones are the examples where those will do.
        out: file to write; left out, the template's name in the present folder.

    Returns:
        The files written.

    Raises:
        RunError: an answer is not allowed, or a file is there already.
    """
    file = out or Path(template_of(kind).name)
    contents = {file: fill(kind, checked_answers(kind, answers))}
    launch = template_file(_LAUNCH).read_text(encoding="utf-8")
    beside = file.with_name(_LAUNCH)
    if kind in (Kind.ONPREM, Kind.AWS, Kind.GCP) and not _holds(beside, launch):
        contents[beside] = launch
    for path in contents:
        if path.exists():
            raise RunError(f"{path}: found a file, allowed: a name that is free (--out)")
    for path, text in contents.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise RunError(f"{path}: found {error.strerror}, allowed: a file that can be written") from error
    return list(contents)


def next_commands(kind: Kind, file: Path) -> list[str]:
    """What to type with a description that was written."""
    study = "studies/quickstart.yaml"
    if kind is Kind.SLURM:
        return [f"sbatch {file} {study}"]
    if kind is Kind.KUBERAY:
        return [
            f"kubectl create secret generic tunebench-study --from-file=study.yaml={study}",
            f"kubectl apply -f {file}",
        ]
    first = ["export RAY_UP_enable_autoscaler_v2=0"] if kind is Kind.ONPREM else []
    return [
        "ray get-auth-token --generate > /dev/null",
        *first,
        f"ray up -y {file}",
        f"ray submit {file} {file.with_name(_LAUNCH)} --study {study}",
    ]


def _put(place: str, value: str) -> str:
    return place.format(*value.split(", ")) if "{0}" in place else place.format(value)


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8", errors="replace") == text
