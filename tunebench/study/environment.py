"""environment.json: what a run was made with."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any

from tunebench.study.errors import RunError
from tunebench.study.files import replacing
from tunebench.study.record import ENVIRONMENT

_PACKAGES = (
    "tunebench", "torch", "nequip", "nequip-allegro", "e3nn", "lightning", "ray", "optuna", "ase", "tblite",
    "numpy", "scipy", "tensorboard",
)  # fmt: skip


def environment(data_hashes: dict[str, str], starts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Versions, source revision, machine and data hashes of this process, and what workloads start from, if they do."""
    found = {
        "packages": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": gpu_names(),
        "revision": _revision(),
        "data": data_hashes,
    }
    return found | ({"initial": starts} if starts else {})


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that results depend on, None where one is not installed."""
    return {name: _version(name) for name in _PACKAGES}


def write_environment(run: Path, data_hashes: dict[str, str], starts: dict[str, Any] | None = None) -> list[str]:
    """Write environment.json; on a later start compare with it and add what changed under ``later``.

    Returns:
        What differs from the environment of the last start, as lines; empty on a first start.

    Raises:
        RunError: the file cannot be read.
    """
    path, now = run / ENVIRONMENT, environment(data_hashes, starts)
    if not path.exists():
        _write(path, now)
        return []
    first = _read(path)
    last = reduce(or_, first.get("later", []), first)
    changed = {key: value for key, value in now.items() if last.get(key) != value}
    if changed:
        _write(path, {**first, "later": [*first.get("later", []), changed]})
    return [f"{key}: {last.get(key)} before, {value} now" for key, value in changed.items()]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and isinstance(content.get("data"), dict):
            return content
        raise ValueError("no data hashes")
    except ValueError as error:
        raise RunError(f"{path}: found {error}, allowed: the file as `tunebench run` wrote it") from error


def _write(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def gpu_names() -> list[str]:
    """Names and driver versions of this machine's NVIDIA GPUs."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return _output(command).splitlines()


def _revision() -> str | None:
    here = Path(__file__).resolve().parent
    revision = _output(["git", "-C", str(here), "rev-parse", "HEAD"])
    dirty = _output(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"])
    return f"{revision}{' (modified)' if dirty else ''}" if revision else None


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
