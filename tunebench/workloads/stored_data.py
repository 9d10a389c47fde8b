"""Prepared data and base models in a run's storage, for nodes that do not see the driver's disk."""

from __future__ import annotations

from pathlib import Path

from tunebench.study.initial import Initial
from tunebench.study.storage import Storage
from tunebench.workloads.data import (
    MANIFEST,
    PreparedData,
    building_of,
    cache_folder,
    known_hash,
    load_prepared,
    move_into_place,
)

DATA = "data"
BASES = f"{DATA}/bases"


def store_prepared(storage: Storage, data: PreparedData) -> None:
    """Store a data set that is not there yet, its manifest last: where there is one, all files are there.

    Raises:
        StorageError: it cannot be written.
    """
    folder = f"{DATA}/{data.folder.name}"
    if f"{folder}/{MANIFEST}" in storage.files(folder):
        return
    for file in sorted(data.folder.iterdir(), key=lambda file: file.name == MANIFEST):
        storage.put(f"{folder}/{file.name}", file)


def fetch_prepared(storage: Storage, data: PreparedData) -> PreparedData:
    """The same data set in this node's cache, from the storage where it is not there yet.

    Raises:
        StorageError: it cannot be read.
        WorkloadError: the cache cannot be written, or a file is not what the manifest says.
    """
    here = cache_folder().expanduser().resolve() / data.folder.name
    if not (here / MANIFEST).is_file():
        with building_of(here) as building:
            for name in storage.files(f"{DATA}/{here.name}"):
                storage.get(name, building / Path(name).name)
            move_into_place(building, here)
    return load_prepared(here)


def store_initial(storage: Storage, initial: Initial) -> None:
    """Store the file that an `init` section names, where it is not there yet.

    Args:
        storage: of the run.
        initial: as resolved, with the file's path and SHA-256.

    Raises:
        StorageError: it cannot be written.
    """
    name = f"{BASES}/{_stored_name(initial)}"
    if name not in storage.files(BASES):
        storage.put(name, Path(initial.path))


def fetch_initial(storage: Storage, initial: Initial) -> Initial:
    """The same section with the path of its file on this node: as it stands where it is that file, else in its cache.

    Raises:
        StorageError: it cannot be read.
    """
    here = cache_folder().expanduser().resolve() / "bases" / _stored_name(initial)
    for path in (Path(initial.path), here):
        if path.is_file() and known_hash(path) == initial.sha256:
            return initial.model_copy(update={"path": str(path)})
    here.parent.mkdir(parents=True, exist_ok=True)
    storage.get(f"{BASES}/{here.name}", here)
    return initial.model_copy(update={"path": str(here)})


def _stored_name(initial: Initial) -> str:
    """By content, with the ending that says what kind of file it is."""
    name = Path(initial.path).name
    return f"{initial.sha256}{name[name.index('.') :]}"
