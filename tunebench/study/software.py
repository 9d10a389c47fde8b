"""What software a node runs, and where it differs from the driver's in a way that makes results incomparable.

It is asked on every node of a cluster, so it imports neither Ray nor torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tunebench.study.environment import package_versions

_DECISIVE = ("tunebench", "torch", "nequip", "nequip-allegro", "e3nn", "lightning", "ray")
_CUDA = re.compile(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Software:
    """What a node runs.

    Attributes:
        python: its version.
        packages: version by name, None where one is not installed.
        source: of tunebench's own modules, a hash; two checkouts may have the same version.
        cuda: the version that torch was built for; None for a build that knows no CUDA.
    """

    python: str
    packages: dict[str, str | None]
    source: str
    cuda: str | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One way in which a node's software is not the driver's.

    Attributes:
        package: what differs.
        found: on the node. allowed: what the driver has.
        strict: whether it changes what is trained or what is understood; else it is only worth a warning.
    """

    package: str
    found: str
    allowed: str
    strict: bool

    def __str__(self) -> str:
        """In words."""
        return f"found {self.package} {self.found}, allowed: {self.allowed}"


def software() -> Software:
    """What this process runs."""
    return Software(
        python=platform.python_version(), packages=package_versions(), source=_source_hash(), cuda=_cuda_of_torch()
    )


def differences(node: Software, driver: Software, *, trains_on_gpu: bool) -> list[Difference]:
    """Where a node differs from the driver, what is strict first.

    Strict are Python's minor version, the packages that decide a trajectory or speak to one another, tunebench's own
    source, and a torch without CUDA where a GPU is to train. The rest is told and no more: Python's patch level, other
    packages, and the CUDA version, which moves the last digits. A driver without a GPU may have a torch without CUDA.

    Args:
        node: its software.
        driver: whose versions a node must have.
        trains_on_gpu: whether trials will train on the node's GPUs.
    """
    found = [
        *_python(node, driver),
        *_packages(node, driver),
        *_source(node, driver),
        *_cuda(node, driver, trains_on_gpu=trains_on_gpu),
    ]
    return sorted(found, key=lambda difference: not difference.strict)


def _python(node: Software, driver: Software) -> Iterable[Difference]:
    if node.python != driver.python:
        minor, own = (version.split(".")[:2] for version in (node.python, driver.python))
        yield Difference(package="python", found=node.python, allowed=driver.python, strict=minor != own)


def _packages(node: Software, driver: Software) -> Iterable[Difference]:
    for name in driver.packages:
        there, here = _public(node.packages.get(name)), _public(driver.packages[name])
        if there != here:
            found, allowed = there or "not installed", here or "not installed, as on the driver"
            yield Difference(package=name, found=found, allowed=allowed, strict=name in _DECISIVE)


def _source(node: Software, driver: Software) -> Iterable[Difference]:
    versions = (node.packages.get("tunebench"), driver.packages.get("tunebench"))
    if versions[0] == versions[1] and node.source != driver.source:
        found, allowed = (f"{versions[0]} of source {side.source[:12]}" for side in (node, driver))
        yield Difference(package="tunebench", found=found, allowed=allowed, strict=True)


def _cuda(node: Software, driver: Software, *, trains_on_gpu: bool) -> Iterable[Difference]:
    if trains_on_gpu and node.cuda is None:
        yield Difference(
            package="torch", found="built without CUDA", allowed="a build with CUDA for its GPU", strict=True
        )
    elif None not in (node.cuda, driver.cuda) and node.cuda != driver.cuda:
        yield Difference(
            package="torch", found=f"built for CUDA {node.cuda}", allowed=f"CUDA {driver.cuda}", strict=False
        )


def _public(version: str | None) -> str | None:
    """A version without its local part, which names a build (PEP 440): `2.13.0+cpu` is 2.13.0."""
    return None if version is None else version.partition("+")[0]


@cache
def _source_hash() -> str:
    """Of tunebench's modules: their names and contents."""
    package = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(package).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _cuda_of_torch() -> str | None:
    """As torch's own version file has it; importing torch would take seconds on every node."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).with_name("version.py")
    match = _CUDA.search(file.read_text(encoding="utf-8")) if file.is_file() else None
    return match[1] if match else None
