"""Whether the nodes of a cluster run what the driver runs, asked on each of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console

from tunebench.study.errors import RunError
from tunebench.study.software import Software, differences, software

ANSWER_S = 120.0
"""Seconds within which a node answers; a process starts there, which takes some of them."""
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


def ask_software(node: Node) -> Any:
    """Ray's reference of the software of a node; the node may fail to tell."""
    return on_node(node, software)


def judge_node(node: Node, answer: Software | Exception, driver: Software, device: str) -> Verdict:
    """Whether trials may train on a node.

    Args:
        node: as Ray describes it.
        answer: its software, or why it told none.
        driver: the driver's.
        device: ``cuda`` or ``cpu``, on which trials train.
    """
    where = f"node {address_of(node)}"
    if isinstance(answer, Exception):
        cause = getattr(answer, "cause", None) or answer
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        return Verdict(refusal=f"{where}: found no answer ({lines[-1][:300]}), allowed: the driver's tunebench")
    gpus = device == "cuda" and node["Resources"].get("GPU", 0) > 0
    found = differences(answer, driver, trains_on_gpu=gpus)
    strict, others = ([each for each in found if each.strict is kind] for kind in (True, False))
    return Verdict(refusal=_told(where, strict), warning=_told(where, others))


def check_software(device: str, console: Console) -> None:
    """Compare all nodes with the driver before any trial.

    Args:
        device: ``cuda`` or ``cpu``, on which trials train.
        console: takes what is worth a warning.

    Raises:
        RunError: in one line, the first node that does not match, and the package.
    """
    driver = software()
    for node, asked in [(node, ask_software(node)) for node in alive_nodes()]:
        answer = _answered(asked)
        if isinstance(answer, Exception) and not is_alive(node):
            continue  # it was lost meanwhile
        verdict = judge_node(node, answer, driver, device)
        if verdict.refusal:
            raise RunError(verdict.refusal)
        if verdict.warning:
            console.print(f"warning: {verdict.warning}", style="yellow", highlight=False, soft_wrap=True, markup=False)


@cache
def _remote(function: Any) -> Any:
    """Ray sends a function to its nodes once for each of these."""
    return ray.remote(num_cpus=0, max_retries=0)(function)


def _answered(asked: Any) -> Software | Exception:
    try:
        answer = ray.get(asked, timeout=ANSWER_S)
    except RayError as error:
        return error
    assert isinstance(answer, Software)
    return answer


def _told(where: str, found: list[Any]) -> str:
    if not found:
        return ""
    more = f"; and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
    return f"{where}: {'; '.join(map(str, found[:_TOLD]))}{more}"
