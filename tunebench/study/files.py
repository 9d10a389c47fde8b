"""Files that a kill, a power cut or a reader never sees half written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEPT_FREE_BYTES = 20 * 2**20
"""Room that other files leave to the journal, so that a run on a full disk can still say what happened."""


@contextmanager
def replacing(path: Path, *, kept_free: int = KEPT_FREE_BYTES) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` at once when the block ends well.

    The content reaches the disk before the name does. A failed block leaves `path` as it was.

    Args:
        path: of the file.
        kept_free: bytes that stay free on its disk, besides room for what is there already a second time.

    Raises:
        OSError: ENOSPC, before anything is written, where there is less room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    check_room(path, kept_free)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_room(path: Path, kept_free: int = KEPT_FREE_BYTES) -> None:
    """Refuse to write a file where its disk has no room for it.

    Raises:
        OSError: ENOSPC.
    """
    there = path.stat().st_size if path.exists() else 0
    if shutil.disk_usage(path.parent).free < kept_free + there:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
