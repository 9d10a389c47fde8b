"""The run directory as a driver takes hold of it: one study, one driver, one set of data, room on the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tunebench.study.control import Wish, ask, asked
from tunebench.study.difference import differences
from tunebench.study.errors import Interrupted, RunError, RunStopped
from tunebench.study.files import KEPT_FREE_BYTES
from tunebench.study.journal import read_trials
from tunebench.study.lock import LOCK
from tunebench.study.record import JOURNAL, STUDY, STUDY_HASH
from tunebench.study.resolve import ResolvedStudy, resolve
from tunebench.study.run_copy import take_up, write_storage
from tunebench.study.spec import StudyError
from tunebench.study.storage import ALLOWED, STORAGE_FAILED, Storage
from tunebench.workloads.data import PreparedData

_ENOUGH_BYTES = 200 * 2**20
_TOLD = 3  # differences of two studies


def default_run_folder(resolved: ResolvedStudy, parent: Path) -> Path:
    """``PARENT/NAME-HASH``: the same study finds its run again, a changed study gets its own."""
    return parent / f"{resolved.study.name}-{resolved.hash[:8]}"


@contextmanager
def held_run(resolved: ResolvedStudy, run: Path, storage: Storage | None = None) -> Iterator[None]:
    """Hold a run directory for this study; a full disk, or storage that fails, is then a stop that keeps everything.

    One driver holds it at a time; the lock goes with its process, however that ends. Where a storage has the run and
    the directory does not, or not as far, it is made from the storage.

    Raises:
        RunError: it cannot be written, is held by another driver, belongs to another study or has no room.
        RunStopped: the disk filled up, or the storage failed.
    """
    _make(run)
    with (run / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{run}: another `tunebench run` is working on it, allowed: one at a time") from None
        if storage is not None:
            take_up(run, storage)
        _check_study(resolved, run)
        if storage is not None:
            write_storage(run, storage)
        _check_wish(run)
        try:
            yield
        except (RunError, RunStopped, Interrupted):
            raise
        except Exception as error:
            if why := outside_the_study(run, str(error)):
                raise RunStopped(why) from error
            raise


def disk_is_full(run: Path, message: str) -> bool:
    """Whether an error comes from a full disk: by its message, or because there is no room for a checkpoint."""
    return os.strerror(errno.ENOSPC) in message or shutil.disk_usage(run).free < KEPT_FREE_BYTES


def outside_the_study(run: Path, message: str) -> str:
    """Why a failure is no fault of the trial that met it: a full disk, or storage that failed; else empty."""
    if STORAGE_FAILED in message:  # perhaps inside a traceback
        line, allowed, _ = message[message.index(STORAGE_FAILED) :].splitlines()[0].partition(ALLOWED)
        return f"{line}{allowed}; everything is kept, run again when it is mended"
    return f"{run}: the disk is full; free some space and run again" if disk_is_full(run, message) else ""


def check_data(run: Path, data: Mapping[str, PreparedData]) -> None:
    """Errors of one run must have been measured on the same data.

    Raises:
        RunError: a trial of the journal was planned on other data.
    """
    if not (run / JOURNAL).exists():
        return
    for record in read_trials(run):
        found, began = data[record.key.workload].hash, record.data_hash
        if began not in (None, found):
            raise RunError(
                f"{run}: workload {record.key.workload} has data {found[:12]}, allowed: {began[:12]}, with which "
                "the run began; start another run for other data"
            )


def _make(run: Path) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / LOCK).touch()
    except OSError as error:
        raise RunError(f"{run}: found {error.strerror}, allowed: a folder that can be written") from error


def _check_wish(run: Path) -> None:
    """A drain ends with the driver it was asked of; a run that was cancelled stays so."""
    wish = asked(run)
    if wish is Wish.CANCEL:
        raise RunError(f"{run}: found that it was cancelled, allowed: to go on after `tunebench resume {run}`")
    if wish is Wish.DRAIN:
        ask(run, Wish.RESUME)


def _told_apart(resolved: ResolvedStudy, run: Path) -> str:
    """In words, where the study of a run says otherwise than another one."""
    try:
        found = differences(resolve(run / STUDY), resolved)
    except (RunError, StudyError) as error:
        return f"its study cannot be read: {error}"
    more = f", and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
    return f"they differ in {'; '.join(found[:_TOLD])}{more}"


def _check_study(resolved: ResolvedStudy, run: Path) -> None:
    if (run / STUDY_HASH).exists():
        found = (run / STUDY_HASH).read_text(encoding="utf-8", errors="replace").strip()
        if found != resolved.hash:
            raise RunError(
                f"{run}: holds study {found[:8]}, allowed: study {resolved.hash[:8]} or an empty folder; "
                f"{_told_apart(resolved, run)}"
            )
    elif (run / JOURNAL).exists():
        raise RunError(f"{run}: holds a journal but no {STUDY_HASH}, allowed: a run directory or an empty folder")
    else:
        resolved.write(run)
    free = shutil.disk_usage(run).free
    if free < _ENOUGH_BYTES:
        found, allowed = (f"{size / 2**20:.0f} MiB" for size in (free, _ENOUGH_BYTES))
        raise RunError(f"{run}: found {found} free on its disk, allowed: {allowed} or more")
