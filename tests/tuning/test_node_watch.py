from __future__ import annotations

from typing import Any

import pytest
import ray

from tunebench.tuning import node_watch
from tunebench.tuning.node_watch import NodeWatch

STAYS, GOES = ({"NodeID": name, "NodeManagerAddress": address} for name, address in (("a", "host1"), ("b", "host2")))


class Cluster:
    """What Ray says of its nodes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive: list[dict[str, Any]] = [STAYS, GOES]
        self.draining: set[str] = set()
        monkeypatch.setattr(node_watch, "alive_nodes", lambda: self.alive)
        monkeypatch.setattr(node_watch, "_KNOWN_FOR_S", 0.0)
        monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", lambda: self.draining)


def test_a_node_that_has_gone_while_it_was_asked_for_gets_no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, told = Cluster(monkeypatch), []
    watch = NodeWatch(None, told.append)
    assert watch.usable() == [STAYS, GOES]
    cluster.draining = {"b"}
    assert watch.usable() == [STAYS]
    cluster.draining = set()  # it was still there when its neighbours were asked for
    assert watch.usable() == [STAYS]
    assert watch.leaving() == {"b"}
    cluster.alive = [STAYS]
    assert watch.usable() == [STAYS]
    assert watch.leaving() == set()
    assert told == ["node host2: it is being drained, its trials go on elsewhere"]
