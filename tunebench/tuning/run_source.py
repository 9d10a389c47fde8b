"""What `tunebench run` is given: a study file, a run directory, or the storage of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tunebench.study.errors import RunError
from tunebench.study.resolve import ResolvedStudy, load_run, resolve
from tunebench.study.run_copy import fetch_run
from tunebench.study.storage import Storage, is_address
from tunebench.tuning.run_folder import default_run_folder

_RUNS = Path("runs")


@dataclass(frozen=True, kw_only=True)
class RunSource:
    """A study and where its run lies.

    Attributes:
        resolved: the study.
        folder: the run directory on this machine.
        storage: address of the run's storage; None where there is none, or the run directory names it.
    """

    resolved: ResolvedStudy
    folder: Path
    storage: str | None


def source_of(given: str, folder: Path | None, storage: str | None) -> RunSource:
    """Find the study and the run that are meant.

    Args:
        given: path of a study file or of a run directory, or address of the storage of a run, which is then fetched.
        folder: run directory; None for the usual one.
        storage: address under which the run has its storage; a path is made absolute.

    Raises:
        StudyError: there is no study, or it is not valid.
        RunError: the address holds no run, or cannot be read.
    """
    if is_address(given):
        if storage is not None:
            raise RunError(f"--storage: found {storage}, allowed: no storage beside that of {given}")
        folder = folder or _RUNS / given.rstrip("/").rpartition("/")[2]
        if not folder.exists():
            fetch_run(Storage(given), folder, checkpoints=False)
        return RunSource(resolved=load_run(folder), folder=folder, storage=given.rstrip("/"))
    source = Path(given)
    resolved = load_run(source) if source.is_dir() else resolve(source)
    folder = folder or (source if source.is_dir() else default_run_folder(resolved, _RUNS))
    return RunSource(resolved=resolved, folder=folder, storage=storage and _of_run(storage, resolved))


def _of_run(storage: str, resolved: ResolvedStudy) -> str:
    parent = storage.rstrip("/") if is_address(storage) else str(Path(storage).expanduser().resolve())
    name = default_run_folder(resolved, Path()).name
    return parent if parent.endswith(f"/{name}") else f"{parent}/{name}"
