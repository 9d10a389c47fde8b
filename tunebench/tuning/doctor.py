"""`tunebench doctor`: what would keep a study from running here or on a cluster, and how to mend it.

Every node writes, reads what the driver wrote, and tells its versions, devices, free space and clock.
"""

from __future__ import annotations

import secrets
import shutil
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunebench.study.environment import gpu_names
from tunebench.study.software import Difference, Software, differences, software

_ENOUGH_BYTES = 2 * 2**30
_LARGEST_SKEW_S = 5.0
_NEEDED = ("torch", "nequip", "ray")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        where: this machine, or a node's address.
        mend: what to do; empty where all is well.
    """

    check: str
    where: str
    found: str
    mend: str = ""

    def to_plain(self) -> dict[str, Any]:
        """Strings, and whether all is well."""
        return {**asdict(self), "ok": not self.mend}


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """What a node tells of itself.

    Attributes:
        software: what it runs. gpus: names.
        reads: whether it sees what the driver wrote. storage_error: why it could not write; empty where it could.
        free_bytes: on the storage. clock_s: its time, seconds since the epoch.
    """

    software: Software
    gpus: list[str]
    reads: bool
    storage_error: str
    free_bytes: int
    clock_s: float


def node_report(folder: Path, probe: str, content: bytes) -> NodeReport:
    """Look at the machine this runs on: its software, and the storage at `folder`, where the driver left `probe`."""
    own, error, reads, free = folder / f".probe-{uuid.uuid4().hex}", "", False, 0
    try:
        reads = (folder / probe).is_file() and (folder / probe).read_bytes() == content
        own.write_bytes(b"tunebench")
        own.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as problem:
        error = problem.strerror or str(problem)
    return NodeReport(
        software=software(),
        gpus=gpu_names(),
        reads=reads,
        storage_error=error,
        free_bytes=free,
        clock_s=time.time(),
    )


def examine(folder: Path, address: str | None) -> list[Finding]:
    """Look at this machine, and with `address` at every node of that Ray cluster.

    Args:
        folder: where runs will lie; it is made if it is not there.
        address: as of `tunebench run`; None looks at this machine alone.
    """
    probe, content = f".probe-{uuid.uuid4().hex}", secrets.token_bytes(64)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / probe).write_bytes(content)
    except OSError as problem:
        why = f"{folder}: {problem.strerror}"
        return [Finding(check="storage", where="this machine", found=why, mend="a folder that can be written")]
    try:
        own = node_report(folder, probe, content)
        found = list(judge("this machine", own, own, 0.0))
        if address:
            for where, report, skew_s in _nodes(folder.resolve(), probe, content, address):
                found += judge(where, report, own, skew_s)
        return found
    finally:
        (folder / probe).unlink(missing_ok=True)


def judge(where: str, node: NodeReport, driver: NodeReport, skew_s: float) -> Iterable[Finding]:
    """What is well and what is not with a node.

    Args:
        where: its name.
        node: what it tells.
        driver: what the driver's machine tells, whose versions a node must have.
        skew_s: its clock less the driver's.
    """
    yield _versions(where, node.software, differences(node.software, driver.software, trains_on_gpu=bool(node.gpus)))
    yield Finding(check="devices", where=where, found=", ".join(node.gpus) or "no GPU; trials train on the CPU")
    if node.storage_error or not node.reads:
        found = node.storage_error or "does not see what the driver wrote"
        yield Finding(check="storage", where=where, found=found, mend="a folder that all nodes share and may write")
    else:
        yield Finding(check="storage", where=where, found="written, and read from the driver")
        little = node.free_bytes < _ENOUGH_BYTES
        room = f"{node.free_bytes / 2**30:.1f} GiB free"
        mend = f"at least {_ENOUGH_BYTES / 2**30:.0f} GiB" if little else ""
        yield Finding(check="free space", where=where, found=room, mend=mend)
    apart = abs(skew_s) > _LARGEST_SKEW_S
    yield Finding(
        check="clock", where=where, found=f"{skew_s:+.1f} s", mend="synchronise clocks (NTP)" if apart else ""
    )


def _versions(where: str, node: Software, found: list[Difference]) -> Finding:
    missing = [name for name in _NEEDED if not node.packages.get(name)]
    other = any(difference.strict for difference in found)
    mend = f"install {', '.join(missing)}" if missing else "the versions of the driver's machine" if other else ""
    told = "; ".join(map(str, found)) or ", ".join(f"{name} {node.packages[name]}" for name in _NEEDED)
    return Finding(check="versions", where=where, found=told, mend=mend)


def _nodes(folder: Path, probe: str, content: bytes, address: str) -> Iterable[tuple[str, NodeReport, float]]:
    """Name, report and clock skew of every node of a cluster, asked on the node itself."""
    from tunebench.tuning.ray_environment import leaving_ray, set_ray_environment

    set_ray_environment(address)
    import ray

    from tunebench.tuning.node_checks import ANSWER_S, address_of, alive_nodes, on_node

    with leaving_ray():
        ray.init(address=address, log_to_driver=False, configure_logging=False)
        for node in alive_nodes():
            # its process starts, which is not the clock's fault
            ray.get(on_node(node, node_report, folder, probe, content), timeout=ANSWER_S)
            before = time.time()
            report = ray.get(on_node(node, node_report, folder, probe, content), timeout=ANSWER_S)
            yield address_of(node), report, report.clock_s - (before + time.time()) / 2.0
