"""Whether the nodes of a cluster run what the driver runs and share the run's storage, tried on each of them."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from tunebench.study.errors import RunError
from tunebench.study.run_copy import PROBES
from tunebench.study.software import Software, differences, software
from tunebench.study.spec import Resources
from tunebench.study.storage import Storage, StorageError
from tunebench.tuning.devices import Device, devices_of

ANSWER_S = 120.0
"""Seconds within which a node answers; a process starts there, which takes some of them."""
_PATIENCE_S = 10.0
_TOLD = 3  # differences of a node

Node = Mapping[str, Any]
"""A node as Ray describes it."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What was found of a node.

    Attributes:
        refusal: why no trial may train there, one line; empty where all may.
        warning: what else differs, one line; empty where nothing does.
    """

    refusal: str = ""
    warning: str = ""


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that are there."""
    return [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def devices_there(resources: Resources) -> list[Device]:
    """The devices of the cluster on which a study trains, whether or not they are taken."""
    device, threads = resources.device, resources.threads
    return [each for node in alive_nodes() for each in devices_of(node["NodeID"], node["Resources"], device, threads)]


def is_alive(node: Node) -> bool:
    """Whether a node is still there."""
    return any(each["NodeID"] == node["NodeID"] for each in alive_nodes())


def address_of(node: Node) -> str:
    """How a node is called in messages."""
    return str(node["NodeManagerAddress"])


def on_node(node: Node, function: Any, *arguments: Any) -> Any:
    """Have a function called on a node, beside whatever works there; returns Ray's reference of its result."""
    here = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
    return _remote(function).options(scheduling_strategy=here).remote(*arguments)


@dataclass(frozen=True, kw_only=True)
class Standard:
    """What a node must be for trials to train there.

    Attributes:
        device: ``cuda`` or ``cpu``, on which they train.
        software: the driver's.
        storage: of the run; its directory where it has no other.
        name: of a file that the driver has left there. content: of that file.
    """

    device: str
    software: Software
    storage: Storage
    name: str
    content: bytes

    @classmethod
    def of_driver(cls, device: str, run: Path, storage: Storage | None) -> Standard:
        """What this process is, with a file of its own in the storage.

        Raises:
            StorageError: the file cannot be written.
        """
        storage, name, content = storage or Storage(str(run.resolve())), f"{PROBES}/driver", secrets.token_bytes(64)
        storage.write(name, content)
        return cls(device=device, software=software(), storage=storage, name=name, content=content)


@dataclass(frozen=True, kw_only=True)
class NodeAnswer:
    """What a node tells of itself.

    Attributes:
        software: what it runs.
        problem: why it does not share the storage, in words; empty where it does.
        name: of the file that it has left there. content: of that file.
    """

    software: Software
    problem: str
    name: str
    content: bytes


def look_at_node(standard: Standard) -> NodeAnswer:
    """Called on the node: what it runs, and whether it reads the driver's file; leaves one for the driver to read."""
    name, content, problem = f"{PROBES}/{uuid.uuid4().hex}", secrets.token_bytes(64), ""
    storage = Storage(standard.storage.address, patience_s=_PATIENCE_S)
    try:
        if storage.read(standard.name) != standard.content:
            problem = f"{storage.address}: does not read what the driver wrote"
        else:
            storage.write(name, content)
    except StorageError as error:
        problem = str(error)
    return NodeAnswer(software=software(), problem=problem, name=name, content=content)


def ask(node: Node, standard: Standard) -> Any:
    """Ray's reference of a node's answer; the node may fail to give one."""
    return on_node(node, look_at_node, standard)


def judge_node(node: Node, answer: NodeAnswer | Exception, standard: Standard) -> Verdict:
    """Whether trials may train on a node; reads what it has left in the storage, and deletes it.

    Args:
        node: as Ray describes it.
        answer: what it told, or why it told nothing.
        standard: what it must be.
    """
    where = f"node {address_of(node)}"
    if isinstance(answer, Exception):
        cause = getattr(answer, "cause", None) or answer
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        return Verdict(refusal=f"{where}: found no answer ({lines[-1][:300]}), allowed: the driver's tunebench")
    gpus = standard.device == "cuda" and node["Resources"].get("GPU", 0) > 0
    found = differences(answer.software, standard.software, trains_on_gpu=gpus)
    strict, others = ([each for each in found if each.strict is kind] for kind in (True, False))
    problem = answer.problem or _unread(answer, standard.storage)
    if problem and not strict:
        return Verdict(refusal=f"{where}: {problem}", warning=_told(where, others))
    return Verdict(refusal=_told(where, strict), warning=_told(where, others))


def check_nodes(standard: Standard, console: Console) -> None:
    """Hold all nodes against the driver before any trial.

    Args:
        standard: what they must be.
        console: takes what is worth a warning.

    Raises:
        RunError: in one line, the first node that does not match, with the package or the storage.
    """
    for node, asked in [(node, ask(node, standard)) for node in alive_nodes()]:
        answer = _answered(asked)
        if isinstance(answer, Exception) and not is_alive(node):
            continue  # it was lost meanwhile
        verdict = judge_node(node, answer, standard)
        if verdict.refusal:
            raise RunError(verdict.refusal)
        if verdict.warning:
            line = f"warning: {verdict.warning}"
            console.print(line, style="yellow", highlight=False, soft_wrap=True, markup=False)


def _unread(answer: NodeAnswer, storage: Storage) -> str:
    """Why the driver cannot read what a node wrote; empty where it can."""
    if storage.read(answer.name) != answer.content:
        return f"{storage.address}: the driver does not read what was written there"
    storage.drop(answer.name)
    return ""


@cache
def _remote(function: Any) -> Any:
    """Ray sends a function to its nodes once for each of these."""
    return ray.remote(num_cpus=0, max_retries=0)(function)


def _answered(asked: Any) -> NodeAnswer | Exception:
    try:
        answer = ray.get(asked, timeout=ANSWER_S)
    except RayError as error:
        return error
    assert isinstance(answer, NodeAnswer)
    return answer


def _told(where: str, found: list[Any]) -> str:
    if not found:
        return ""
    more = f"; and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
    return f"{where}: {'; '.join(map(str, found[:_TOLD]))}{more}"
