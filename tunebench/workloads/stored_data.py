"""Prepared data in a run's storage, for nodes that do not see the driver's cache."""

from __future__ import annotations

from pathlib import Path

from tunebench.study.storage import Storage
from tunebench.workloads.data import MANIFEST, PreparedData, building_of, cache_folder, load_prepared, move_into_place

DATA = "data"


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
