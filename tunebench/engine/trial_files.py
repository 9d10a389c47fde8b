"""What a trial leaves on its node and in the storage, where the nodes of a cluster share no folder.

Engines know of folders only. The trial's folder on the node is made from the storage before the trial begins there, and
whatever is written is stored before anybody hears of it. So what is stored counts; what lies on a node may be lost.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from tunebench.engine.checkpoints import LAST, checkpoint_folder
from tunebench.engine.work import NOTE
from tunebench.study.record import CHECKPOINTS, CURVES, SHORTER_CURVES, TENSORBOARD
from tunebench.study.storage import Storage

_LOGS = "logs"


class TrialFiles:
    """The files of one trial on this node, and those stored.

    Args:
        storage: of the run; None where the run directory is one that all nodes share, which leaves nothing to do.
        run: the run directory on this node.
        trial: its name.
    """

    def __init__(self, storage: Storage | None, run: Path, trial: str) -> None:
        self._storage, self._run, self._trial = storage, run, trial
        self._stored: dict[Path, tuple[int, int]] = {}

    def fetch(self) -> None:
        """Make what lies here what is stored; a note of work beyond the checkpoint stays.

        Raises:
            StorageError: it cannot be read.
        """
        if self._storage is None:
            return
        folder = checkpoint_folder(self._run, self._trial)
        names = self._storage.files(f"{CHECKPOINTS}/{self._trial}")
        for file in folder.iterdir() if folder.is_dir() else ():
            if file.name != NOTE:
                file.unlink()
        curve = f"{CURVES}/{self._trial}.parquet"
        (self._run / curve).unlink(missing_ok=True)
        for name in [*names, curve] if names else ():
            if not (self._run / name).exists():
                self._storage.get(name, self._run / name)

    def store(self) -> None:
        """Store what has changed since the last time, the checkpoint last: it says how far all else has come.

        Raises:
            StorageError: it cannot be written.
        """
        if self._storage is None:
            return
        for file in self._files():
            found = file.stat()
            state = (found.st_size, found.st_mtime_ns)
            if found.st_size and self._stored.get(file) != state:  # most logs are empty
                self._storage.put(file.relative_to(self._run).as_posix(), file)
                self._stored[file] = state

    def forget(self) -> None:
        """Keep no checkpoint here: the trial has ended or goes on on another node."""
        if self._storage is not None:
            shutil.rmtree(checkpoint_folder(self._run, self._trial), ignore_errors=True)

    def _files(self) -> Iterator[Path]:
        run, name = self._run, self._trial
        folder = checkpoint_folder(run, name)
        candidates = [
            *sorted((run / SHORTER_CURVES).glob(f"{name}.h*.parquet")),
            run / CURVES / f"{name}.parquet",
            *sorted((run / TENSORBOARD / name).glob("events.*")),
            run / _LOGS / f"{name}.log",
            *sorted(folder.glob("*"), key=lambda file: file.name == LAST),
        ]
        return (file for file in candidates if file.is_file() and not file.name.endswith(".partial"))
