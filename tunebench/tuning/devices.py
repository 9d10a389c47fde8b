"""Devices of a cluster's nodes, and their kinds by the names that Ray gives them, such as ``H200``.

Rule F9 keeps the kinds apart. Tune sends a trial's share of them with every trial, so this imports neither torch nor
NequIP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_ACCELERATOR = "accelerator_type:"  # begins the resource by which Ray says what accelerators a node has
_A_LITTLE = 0.001  # of that resource, of which a node has 1: who asks for it gets a node of the kind


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU, or some cores of a node where trials train on CPUs.

    Attributes:
        node: Ray's id. index: among the node's devices.
        kind: its model where Ray knows it, such as ``H200``.
        cpus: what is reserved. threads: of a cohort's process.
    """

    node: str
    index: int
    cpus: int
    gpus: int
    threads: int
    kind: str = ""


def devices_of(node: str, resources: Mapping[str, float], kind: str, cpus: int) -> list[Device]:
    """A node's devices: its GPUs where trials train on GPUs, else its cores.

    Several cohorts with few cores each do more on a CPU than one with all of them: its operations are small, and the
    threads that share one wait for each other, the longer the busier the node is.

    Args:
        node: Ray's id of the node.
        resources: what Ray says the node has.
        kind: ``cuda`` or ``cpu``.
        cpus: cores of a cohort that trains on a CPU.
    """
    cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    model = kind_of_node(resources, kind)
    if kind == "cpu":
        count, share = cores // cpus, {"cpus": cpus, "gpus": 0, "threads": cpus}
    else:
        count, each = gpus, cores // gpus if gpus else 0
        share = {"cpus": min(each, 1), "gpus": 1, "threads": max(each, 1)}
    return [Device(node=node, index=index, kind=model, **share) for index in range(count)]


def kind_of_node(node: Mapping[str, float], device: str) -> str:
    """The kind of a node's devices; empty where Ray does not know.

    Args:
        node: what Ray says the node has.
        device: ``cuda`` or ``cpu``. What Ray says of a node with GPUs is about those, not about its cores.
    """
    if device == "cpu" and node.get("GPU", 0.0) > 0:
        return ""
    return "+".join(sorted(name.removeprefix(_ACCELERATOR) for name in node if name.startswith(_ACCELERATOR)))


def kind_here(device: str) -> str | None:
    """The kind that Ray would give this machine's devices if it ran here; None where only a cluster could say.

    Args:
        device: ``cuda`` or ``cpu``.
    """
    if device == "cpu":
        return None
    # no public name; Ray (2.60) calls it when a node starts
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    return (manager and manager.get_current_node_accelerator_type()) or None


def share_of_kind(kind: str) -> dict[str, float]:
    """What to ask Ray for, besides a device, to get one of a kind; of any kind where the name is empty."""
    return {f"{_ACCELERATOR}{name}": _A_LITTLE for name in kind.split("+") if name}


def most_frequent_first(kinds: Iterable[str]) -> list[str]:
    """Each kind of some devices once, that of which there are most first; among equals by name.

    The confirm stage trains on the first one, and a cap on device-seconds is counted in its seconds.
    """
    found = Counter(kinds)
    return sorted(found, key=lambda kind: (-found[kind], kind))


def waits_for_kind(workload: str, kind: str) -> str:
    """What is said where trials of a workload cannot train because their kind of device is not there."""
    began = f"{workload}: its trials wait for a device of kind {kind}, on which their stage began"
    return f"{began} (rule F9; a study that waives it takes any)"
