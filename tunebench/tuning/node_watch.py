"""Which nodes of a cluster may get trials: those that are there, run what the driver runs, and are not about to go.

The pool asks it every few seconds, so that a node that joins is checked and used, and one that is to go is left, while
a study runs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tunebench.tuning.handle import Handle
from tunebench.tuning.node_checks import (
    ANSWER_S,
    Node,
    NodeAnswer,
    Standard,
    Verdict,
    address_of,
    alive_nodes,
    ask,
    is_alive,
    judge_node,
)

_KNOWN_FOR_S = 1.0  # the pool asks for the nodes with every trial that comes
_ASK_AGAIN_S = 30.0  # a node that gave no answer


class NodeWatch:
    """The nodes of a cluster as far as trials may use them.

    Args:
        standard: what a node must be; None takes every node as it is.
        tell: takes one line about whatever happens to a node, once.
    """

    def __init__(self, standard: Standard | None, tell: Callable[[str], None]) -> None:
        self._standard, self._tell = standard, tell
        self._verdicts: dict[str, Verdict] = {}
        self._asked_at: dict[str, float] = {}
        self._told: set[str] = set()
        self._draining: frozenset[str] = frozenset()
        self._holders: dict[str, Handle] = {}
        self._nodes: list[Node] = []
        self._looked_at = -_KNOWN_FOR_S

    def usable(self) -> list[Node]:
        """Nodes that may get trials now."""
        self._look()
        return [node for node in self._nodes if self._is_fit(node["NodeID"])]

    def newcomers(self) -> list[Node]:
        """Nodes that nobody has checked yet; what is returned counts as being checked."""
        if self._standard is None:
            return []
        self._look()
        now = time.monotonic()
        found = [n for n in self._nodes if n["NodeID"] not in self._verdicts and self._is_due(n["NodeID"], now)]
        self._asked_at |= {node["NodeID"]: now for node in found}
        return found

    @property
    def is_settled(self) -> bool:
        """Whether every node that is there has been checked."""
        self._look()
        return self._standard is None or all(node["NodeID"] in self._verdicts for node in self._nodes)

    async def check(self, node: Node) -> None:
        """Compare a newcomer with the driver; one that does not match is kept free of trials of any engine."""
        assert self._standard is not None
        name = node["NodeID"]
        answer: NodeAnswer | Exception
        try:
            answer = await asyncio.wait_for(ask(node, self._standard), ANSWER_S)
        except (RayError, TimeoutError) as error:
            if not is_alive(node):
                return
            answer = error
        verdict = await asyncio.to_thread(judge_node, node, answer, self._standard)
        for line in filter(None, (verdict.refusal, verdict.warning)):
            self._tell_once(f"{line}; it gets no trials" if line == verdict.refusal else line)
        if isinstance(answer, NodeAnswer):
            self._verdicts[name] = verdict
            if verdict.refusal:
                self._holders[name] = _hold(node)

    def leaving(self) -> frozenset[str]:
        """Ids of nodes that are to go: their owner, or whoever scales the cluster, drains them."""
        self._look()
        return self._draining

    def _is_fit(self, name: str) -> bool:
        verdict = Verdict() if self._standard is None else self._verdicts.get(name)
        return verdict is not None and not verdict.refusal and name not in self._draining

    def _is_due(self, name: str, now: float) -> bool:
        return now - self._asked_at.get(name, -_ASK_AGAIN_S) >= _ASK_AGAIN_S

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < _KNOWN_FOR_S:
            return
        self._looked_at, self._nodes = now, alive_nodes()
        alive = {node["NodeID"]: node for node in self._nodes}
        # Ray 2.60 has no public way to ask; its own Ray Train asks here. A node that has gone since `alive_nodes` was
        # asked is not among them any more: what was to go once, goes.
        self._draining = (self._draining | frozenset(ray._private.state.state.get_draining_nodes())) & alive.keys()
        for name in self._draining:
            self._tell_once(f"node {address_of(alive[name])}: it is being drained, its trials go on elsewhere")

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            self._tell(line)


class _Holder:
    """Has all of a node, so that Ray places nothing else there."""


def _hold(node: Node) -> Handle:
    resources: Mapping[str, float] = node["Resources"]
    options: dict[str, Any] = {
        "num_cpus": resources.get("CPU", 0),
        "num_gpus": resources.get("GPU", 0),
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False),
    }
    actor_class: Any = ray.remote(_Holder)
    return actor_class.options(**options).remote()
