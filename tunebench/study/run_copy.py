"""The driver's share of a run in its storage, and a whole run fetched from there.

The journal stays on the driver's disk, where appending to it is safe and fast, and is copied whenever it has grown.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tunebench.study.errors import RunError, RunStopped
from tunebench.study.files import replacing
from tunebench.study.record import CHECKPOINTS, JOURNAL, PROPERTIES, SEARCH_SPACES, STUDY_HASH, TENSORBOARD, Stage
from tunebench.study.storage import Storage, StorageError

ADDRESS = "storage"
"""File of a run directory that names its storage."""
_OWN_FOLDERS = (SEARCH_SPACES, "logs")  # TensorBoard's pictures of the arms are drawn anew from the journal
_OF_TRIALS = tuple(f".{stage}." for stage in Stage)  # in the names of their logs
_NOT_OWN = frozenset({".lock", f"{JOURNAL}.lock", "control", ADDRESS})
PROBES = ".probes"
"""Folder of files that show whether nodes read what others write."""
_NOT_FETCHED = ("data/", f"{PROBES}/")
_ANSWER_S = 5.0
_LOOK_EVERY_S = 1.0
_REST_PER_COPY = 4.0  # copying takes a fifth of the time at most, however long the journal is


class RunCopy:
    """Copies what the driver writes to the storage while a block runs, a moment after each rung; at its end all of it.

    Args:
        run: the run directory.
        storage: None leaves nothing to do.
        say: takes one line where copying fails while the study goes on.
    """

    def __init__(self, run: Path, storage: Storage | None, say: Callable[[str], None] = lambda line: None) -> None:
        self._run, self.storage, self._say = run, storage, say
        self._known: dict[str, tuple[int, int]] = {}
        self._dropped: list[str] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._copy_on, name="copy of the run", daemon=True)

    def __enter__(self) -> RunCopy:
        """Start to copy."""
        if self.storage is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Copy what is left.

        Raises:
            RunStopped: that fails, and nothing else has.
        """
        if self.storage is None:
            return
        self._over.set()
        self._thread.join()
        try:
            self.copy()
        except StorageError as error:
            if kind is None:
                raise RunStopped(f"{error}; everything is kept in {self._run}, run again to copy it") from error

    def copy(self) -> None:
        """Store what has changed, the journal last; then delete what finished trials no longer need.

        Raises:
            StorageError: it cannot be written.
        """
        assert self.storage is not None
        dropped = self._dropped[:]
        for name in self._own_files():
            state = _state(self._run / name)
            if state is not None and self._known.get(name) != state:
                self.storage.put(name, self._run / name)
                self._known[name] = state
        for trial in dropped:  # only now does the copy of the journal know that they have ended
            self.storage.drop(f"{CHECKPOINTS}/{trial}")
            self._dropped.remove(trial)

    def drop_checkpoints(self, trial: str) -> None:
        """Delete the stored checkpoints of a trial that has ended, once the journal's copy says so."""
        if self.storage is not None:
            self._dropped.append(trial)

    def fetch(self) -> None:
        """Bring what trials have stored to the run directory.

        Raises:
            StorageError: it cannot be read.
        """
        if self.storage is not None:
            fetch_run(self.storage, self._run, unless=set(self._own_files()).__contains__)

    def _copy_on(self) -> None:
        """Copy whenever the journal has grown."""
        copied, complained, rest_s = None, False, _LOOK_EVERY_S
        while not self._over.wait(rest_s):
            state, began, rest_s = _state(self._run / JOURNAL), time.monotonic(), _LOOK_EVERY_S
            if state == copied:
                continue
            try:
                self.copy()
                copied = state
            except StorageError as error:
                if not complained:
                    self._say(f"warning: the journal is not copied: {error}")
                complained = True
            rest_s = max(rest_s, _REST_PER_COPY * (time.monotonic() - began))

    def _own_files(self) -> list[str]:
        """Names of the files that the driver writes, the journal last; trials store their own."""
        run = self._run
        found = [*run.iterdir(), *(run / TENSORBOARD).glob("events.*")]
        found += [file for folder in _OWN_FOLDERS for file in (run / folder).rglob("*")]
        found = [file for file in found if not any(mark in file.name for mark in _OF_TRIALS)]
        found += (run / PROPERTIES).glob("*")  # which are of trials, and made on the driver's node
        names = [file.relative_to(run).as_posix() for file in found if file.is_file() and file.name not in _NOT_OWN]
        own = [name for name in names if not name.endswith(".partial")]
        return sorted(own, key=lambda name: (name == JOURNAL, name))


def fetch_run(
    storage: Storage, folder: Path, *, checkpoints: bool = True, unless: Callable[[str], bool] = lambda name: False
) -> list[str]:
    """Bring a run from its storage to a folder; what is there already and has not changed is left as it is.

    Args:
        storage: of the run.
        folder: that becomes, or is, its run directory.
        checkpoints: whether they come too.
        unless: names that do not.

    Returns:
        Names of the files that came, the journal last.

    Raises:
        RunError: there is no run, or it cannot be read.
    """
    stored = storage.files()
    if STUDY_HASH not in stored:
        raise RunError(f"{storage.address}: found no {STUDY_HASH}, allowed: the storage of a run by `tunebench run`")
    came = []
    for name in sorted(stored, key=lambda name: (name == JOURNAL, name)):
        left_out = name.startswith(_NOT_FETCHED) or (name.startswith(f"{CHECKPOINTS}/") and not checkpoints)
        file, found = folder / name, stored[name]
        if left_out or unless(name) or _is_copy(file, found.size, found.changed):
            continue
        if storage.get(name, file):
            came.append(name)
            if found.changed is not None:
                os.utime(file, (found.changed, found.changed))
    return came


def has_run(storage: Storage) -> bool:
    """Whether a run has begun in a storage, after a trial of whether it can be written and read at all.

    Raises:
        StorageError: it cannot; soon, for who waits is the user.
    """
    impatient = Storage(storage.address, patience_s=_ANSWER_S)
    impatient.make()
    check_storage(impatient)
    return impatient.read(JOURNAL) is not None


def check_storage(storage: Storage) -> None:
    """Write a file, read it and delete it.

    Raises:
        StorageError: it cannot be done, or what is read is not what was written.
    """
    name, content = f"{PROBES}/{uuid.uuid4().hex}", secrets.token_bytes(64)
    storage.write(name, content)
    found = storage.read(name)
    storage.drop(name)
    if found != content:
        raise StorageError(f"{storage.address}: found {name} other than it was written, allowed: storage that keeps")


def take_up(run: Path, storage: Storage) -> None:
    """Make a run directory what its storage has of it, where the storage knows more: the run goes on here.

    Raises:
        RunError: both have gone on apart from each other, or the storage cannot be read.
    """
    there = storage.read(JOURNAL)
    if there is None:
        return
    here = (run / JOURNAL).read_bytes() if (run / JOURNAL).is_file() else b""
    whole = there[: there.rfind(b"\n") + 1]
    if here.startswith(whole):
        return
    if not whole.startswith(here[: here.rfind(b"\n") + 1]):
        raise RunError(
            f"{run}: found a journal that is not that of {storage.address}, allowed: one that its copy has grown "
            "from, or none"
        )
    fetch_run(storage, run, checkpoints=False)


def named_storage(run: Path, address: str | None) -> Storage | None:
    """The storage of a run: what is asked for, or what an earlier start wrote down; None where there is none.

    Raises:
        RunError: both, and they are not the same.
    """
    file = run / ADDRESS
    written = file.read_text(encoding="utf-8").strip() if file.is_file() else None
    if written and address and written != address:
        raise RunError(f"{run}: found storage {address}, allowed: {written}, with which the run began")
    found = address or written
    return Storage(found) if found else None


def write_storage(run: Path, storage: Storage) -> None:
    """Write down the storage of a run, so that it goes on with it."""
    with replacing(run / ADDRESS) as partial:
        partial.write_text(f"{storage.address}\n", encoding="utf-8")


def _state(file: Path) -> tuple[int, int] | None:
    with suppress(FileNotFoundError):
        found = file.stat()
        return found.st_size, found.st_mtime_ns
    return None


def _is_copy(file: Path, size: int, changed: float | None) -> bool:
    if changed is None or not file.is_file():
        return False
    found = file.stat()
    return found.st_size == size and abs(found.st_mtime - changed) < 1e-3
