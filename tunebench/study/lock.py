"""The lock by which one driver at a time holds a run directory; it goes with its process, however that ends."""

from __future__ import annotations

import fcntl
from pathlib import Path

LOCK = ".lock"


def is_held(run: Path) -> bool:
    """Whether a driver holds a run directory."""
    try:
        with (run / LOCK).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
