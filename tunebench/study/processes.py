"""Processes that tunebench starts beside its own: how many at a time, and where they find this copy of it."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]


def usable_cores() -> int:
    """Cores that this process may run on; all of the machine where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def module_search_path() -> str:
    """``PYTHONPATH`` of a process that is to import this copy of tunebench."""
    return os.pathsep.join(filter(None, [str(_PACKAGE_ROOT), os.environ.get("PYTHONPATH")]))
