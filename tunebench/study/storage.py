"""Files of a run at an address that every node reaches: a bucket, or whatever else fsspec opens.

What is there is whole: an object store shows an object when all of it has come, and elsewhere a file is written beside
its place and moved there. Imports neither Ray nor torch.
"""

from __future__ import annotations

import errno
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from tunebench.study.errors import RunError
from tunebench.study.files import replacing

Result = TypeVar("Result")

_WHOLE_OBJECTS = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"})
_UNFINISHED = ".unfinished-"
_PATIENCE_S = 60.0  # a network that is cut for less is waited for
_LONGEST_PAUSE_S = 8.0
_CHANGED = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")
# what no second attempt would change: the address, the rights, the keys
_LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, ValueError, ImportError)
_LASTING_NAMES = frozenset({"NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "RefreshError"})


STORAGE_FAILED = "the storage failed"
"""Begins what is said of it, also where the error comes back as text alone."""


ALLOWED = "allowed: storage that can be read and written from here"
"""Ends it."""


class StorageError(RunError):
    """The storage cannot be read or written: one line with the address and why."""


def is_address(text: str) -> bool:
    """Whether a text is an address such as ``s3://bucket/folder``; else it is a path."""
    return "://" in text


@dataclass(frozen=True)
class Stored:
    """A file in the storage.

    Attributes:
        size: bytes. changed: when, seconds since the epoch; None where the storage does not say.
    """

    size: int
    changed: float | None


@dataclass(frozen=True)
class Storage:
    """Files below one address, by names relative to it such as ``curves/TRIAL.parquet``.

    Attributes:
        address: as fsspec reads it; a path stands for itself. patience_s: how long failures are tried again that may
            pass, such as a network that is cut.

    Raises:
        StorageError: by every method, where the storage does not do it.
    """

    address: str
    patience_s: float = field(default=_PATIENCE_S, compare=False)

    def __truediv__(self, name: str) -> Storage:
        """The storage below a name."""
        return Storage(f"{self.address.rstrip('/')}/{name}", self.patience_s)

    def make(self) -> None:
        """Make the folder of the address where there can be one; a bucket must be there."""
        self._tried("make it", lambda: None if self._has_objects else self._system.makedirs(self._root, exist_ok=True))

    def put(self, name: str, file: Path) -> None:
        """Store a file, in place of an earlier one, all at once."""
        self._tried(f"write {name}", lambda: self._put(name, file))

    def get(self, name: str, file: Path) -> bool:
        """Replace a file by a stored one, all at once; returns whether there is one."""

        def fetch() -> bool:
            try:
                with replacing(file) as partial:
                    self._system.get_file(self._path(name), str(partial))
            except FileNotFoundError:
                self._check_root()
                return False
            return True

        return self._tried(f"read {name}", fetch)

    def write(self, name: str, content: bytes) -> None:
        """Store some bytes, as `put` does a file."""
        self._tried(f"write {name}", lambda: self._placed(name, lambda path: self._system.pipe_file(path, content)))

    def read(self, name: str) -> bytes | None:
        """A stored file's content; None where there is none."""

        def fetch() -> bytes | None:
            try:
                return bytes(self._system.cat_file(self._path(name)))
            except FileNotFoundError:
                self._check_root()
                return None

        return self._tried(f"read {name}", fetch)

    def files(self, below: str = "") -> dict[str, Stored]:
        """What is stored below a folder, by name; unfinished files of what was killed are left out."""

        def find() -> dict[str, Stored]:
            self._system.invalidate_cache()
            found = self._system.find(self._path(below) if below else self._root, detail=True)
            names = {path[len(self._root) :].lstrip("/"): info for path, info in found.items()}
            return {n: Stored(int(i["size"] or 0), _changed(i)) for n, i in names.items() if _UNFINISHED not in n}

        return self._tried(f"list {below or 'it'}", find)

    def drop(self, below: str) -> None:
        """Delete all files of a folder, or one file."""

        def remove() -> None:
            self._system.invalidate_cache()
            if paths := self._system.find(self._path(below)):
                self._system.rm(paths)

        self._tried(f"delete {below}", remove)

    def __getstate__(self) -> dict[str, Any]:
        """The address alone; every process connects by itself."""
        return {"address": self.address, "patience_s": self.patience_s}

    @cached_property
    def _connection(self) -> tuple[Any, str]:
        # one that fsspec keeps would go on with the server and keys of an earlier environment
        options = {"use_listings_cache": False, "skip_instance_cache": True} if is_address(self.address) else {}
        system, root = fsspec.core.url_to_fs(self.address, **options)
        return system, root.rstrip("/")

    @property
    def _system(self) -> Any:
        return self._connection[0]

    @property
    def _root(self) -> str:
        return self._connection[1]

    @property
    def _has_objects(self) -> bool:
        """Whether it shows a file only when all of it has come, and has no folders."""
        protocol = self._system.protocol
        return bool(_WHOLE_OBJECTS & {*([protocol] if isinstance(protocol, str) else protocol)})

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _check_root(self) -> None:
        """Tell a file that is not there from a bucket that is not there."""
        if self._has_objects:
            self._system.invalidate_cache()
            self._system.ls(self._root.split("/", 1)[0])
        elif not self._system.isdir(self._root):
            raise FileNotFoundError(self._root)

    def _put(self, name: str, file: Path) -> None:
        self._placed(name, lambda path: self._system.put_file(str(file), path))

    def _placed(self, name: str, write: Callable[[str], None]) -> None:
        path = self._path(name)
        if self._has_objects:
            write(path)
            return
        if not self._system.isdir(self._root):  # its disk is not mounted any more; what is written here would be lost
            raise FileNotFoundError(self._root)
        self._system.makedirs(path.rpartition("/")[0], exist_ok=True)
        partial = f"{path}{_UNFINISHED}{uuid.uuid4().hex}"
        try:
            write(partial)
            self._system.mv(partial, path)
        except BaseException:
            if self._system.exists(partial):
                self._system.rm_file(partial)
            raise

    def _tried(self, what: str, work: Callable[[], Result]) -> Result:
        until, pause_s = time.monotonic() + self.patience_s, 1.0
        while True:
            try:
                return work()
            except Exception as error:  # each file system has errors of its own
                if getattr(error, "errno", None) == errno.ENOSPC:  # of this node's disk
                    raise
                if _lasts(error) or time.monotonic() + pause_s > until:
                    why = " ".join(str(error).split())[:300] or type(error).__name__
                    found = f"{type(error).__name__} ({why})"
                    raise StorageError(
                        f"{STORAGE_FAILED}: {self.address}: cannot {what}: found {found}, {ALLOWED}"
                    ) from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def _changed(info: Mapping[str, Any]) -> float | None:
    found = next((info[key] for key in _CHANGED if info.get(key) is not None), None)
    if isinstance(found, datetime):
        return found.timestamp()
    if isinstance(found, str):
        return datetime.fromisoformat(found).timestamp()
    return None if found is None else float(found)


def _lasts(error: Exception) -> bool:
    return isinstance(error, _LASTING) or type(error).__name__ in _LASTING_NAMES
