"""Prepared data: every source ends as extended XYZ files and a manifest in one content-addressed folder.

The folder's name is a hash of everything that decides its content, so a study, a resumed study and every worker of a
cluster agree on the frames without talking to each other.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.data import atomic_numbers

from tunebench.study.record import OOD_PREFIX, Split
from tunebench.study.spec import ExtxyzData, NequipData, XtbData, XtbMixtureData
from tunebench.workloads import extxyz, xtb
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.leaks import check_leaks, fingerprints, fingerprints_hash
from tunebench.workloads.structure_files import CONFIG_TYPE, file_hash, write_frames

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
CACHE_VARIABLE = "TUNEBENCH_CACHE"

_BUILDING = ".building-"
# Files are written within seconds, after the frames are made. A day allows for clocks of file servers that differ.
_ABANDONED_AFTER_S = 24 * 3600.0
_PROBE = b" " * 1024
_KEPT_HASHES = 1024

AnyData = XtbData | XtbMixtureData | ExtxyzData | NequipData
Frames = Mapping[str, list[Atoms]]
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SplitFile:
    """One split on disk: an extended XYZ file in eV, eV/Å and eV/Å³ with its size and checksum.

    Attributes:
        config_types: what each frame is, empty text where it is not said; empty where no frame says it.
    """

    path: Path
    frames: int
    atoms_min: int
    atoms_max: int
    sha256: str
    fingerprints: str
    config_types: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A prepared data set.

    Attributes:
        folder: where the files lie.
        hash: hexadecimal sha256 of the description, library versions and source files that decided the content.
        splits: ``train``, ``val``, ``test`` and ``ood:NAME``.
        type_names: chemical symbols of all splits by atomic number; also the model's type names.
        has_stress: whether any frame carries a stress; frames without one then count as unlabelled.
        periodic: whether any frame is periodic.
        level_of_theory: what made the labels, where that is known.
    """

    folder: Path
    hash: str
    splits: dict[str, SplitFile]
    type_names: tuple[str, ...]
    has_stress: bool
    periodic: bool
    level_of_theory: str | None


def cache_folder() -> Path:
    """``$TUNEBENCH_CACHE``, else ``tunebench`` under the user's cache directory (XDG base directory specification)."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tunebench"


def graphs_folder() -> Path:
    """Where traced and compiled graphs are kept, for all processes of a node."""
    return cache_folder() / "graphs"


def prepare(
    data: AnyData, *, cache: Path | None = None, base: Path | None = None, progress: Progress | None = None
) -> PreparedData:
    """Make the data set, or find it already made.

    The folder is built beside its final place and renamed into it: what exists is complete, and two processes that
    prepare the same data at once both succeed. Whether the cache can be written is tried before any frame is made, and
    what killed processes left there more than a day ago is removed.

    Args:
        data: the ``data`` section of a workload.
        cache: folder that holds the prepared sets; left out, `cache_folder`.
        base: folder that relative paths of the study file start from; left out, the working directory.
        progress: called with short lines of text while work goes on.

    Raises:
        WorkloadError: the data cannot be had as described, splits share a structure, or the cache cannot be written.
    """
    base = Path.cwd() if base is None else base
    identity = {"schema_version": SCHEMA_VERSION, **_identity(data, base)}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=True).encode("ascii")).hexdigest()
    folder = (cache or cache_folder()).expanduser().resolve() / digest[:24]
    if (folder / MANIFEST).is_file():
        return load_prepared(folder)
    _try_writing(folder)
    _sweep(folder.parent)
    frames, level_of_theory = _frames(data, base, progress or _silent)
    _check_counts(frames)
    prints = {split: fingerprints(structures) for split, structures in frames.items()}
    if not getattr(data, "allow_duplicates", False):
        check_leaks(prints)
    about = {
        "schema_version": SCHEMA_VERSION,
        "hash": digest,
        "identity": identity,
        "spec": data.model_dump(mode="json"),
        "level_of_theory": level_of_theory,
        "fingerprints": {split: fingerprints_hash(prints[split]) for split in prints},
    }
    _build(folder, frames, about)
    return load_prepared(folder)


def load_prepared(folder: Path) -> PreparedData:
    """Read a prepared folder and verify the checksum of each of its files, once per process and state of the file.

    Raises:
        WorkloadError: the folder is not a prepared data set, is of another version, or a file has changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkloadError("data", f"{folder} ({error})", "a folder made by `tunebench data make`") from error
    if manifest.get("schema_version") != SCHEMA_VERSION:
        found = f"{folder}: schema_version {manifest.get('schema_version')}"
        raise WorkloadError("data", found, f"schema_version {SCHEMA_VERSION}")
    splits = {name: _load_split(folder, entry) for name, entry in manifest["splits"].items()}
    return PreparedData(
        folder=folder,
        hash=manifest["hash"],
        splits=splits,
        type_names=tuple(manifest["type_names"]),
        has_stress=manifest["has_stress"],
        periodic=manifest["periodic"],
        level_of_theory=manifest["level_of_theory"],
    )


def split_file_name(split: str) -> str:
    """``train.xyz`` for ``train``, ``ood_hot.xyz`` for ``ood:hot``."""
    return split.replace(OOD_PREFIX, "ood_") + ".xyz"


def _silent(line: str) -> None:
    del line


def _identity(data: AnyData, base: Path) -> dict[str, Any]:
    if isinstance(data, XtbData | XtbMixtureData):
        return xtb.identity(data)
    if isinstance(data, ExtxyzData):
        return extxyz.identity(data, base)
    from tunebench.workloads import nequip_source  # imports torch, which the other sources do without

    return nequip_source.identity(data, base)


def _frames(data: AnyData, base: Path, progress: Progress) -> tuple[Frames, str | None]:
    if isinstance(data, XtbData):
        return xtb.xtb_frames(data, progress), xtb.level_of_theory(data)
    if isinstance(data, XtbMixtureData):
        return xtb.mixture_frames(data, progress), xtb.level_of_theory(data)
    if isinstance(data, ExtxyzData):
        return extxyz.extxyz_frames(data, base, progress), None
    from tunebench.workloads import nequip_source

    return nequip_source.nequip_frames(data, base, progress), None


def _check_counts(frames: Frames) -> None:
    for split in (Split.TRAIN, Split.VAL, Split.TEST):
        if not frames.get(split):
            raise WorkloadError(f"data.frames.{split}", 0, "at least one frame")


def _try_writing(folder: Path) -> None:
    with building_of(folder) as building:
        (building / "probe").write_bytes(_PROBE)


def _sweep(cache: Path) -> None:
    oldest = time.time() - _ABANDONED_AFTER_S
    for entry in cache.glob(f"{_BUILDING}*"):
        with suppress(OSError):  # another process may sweep too, and what another user left is not ours to remove
            if entry.stat().st_mtime < oldest:
                shutil.rmtree(entry)


@contextmanager
def building_of(folder: Path) -> Iterator[Path]:
    """A folder beside the final one, which is gone afterwards unless it was renamed.

    Raises:
        WorkloadError: the cache cannot be written.
    """
    building = folder.with_name(f"{_BUILDING}{folder.name}-{secrets.token_hex(6)}")
    try:
        building.mkdir(parents=True)
        yield building
    except OSError as error:
        found = f"{folder.parent}: {error.strerror or error}"
        allowed = f"a cache folder with room that can be written; ${CACHE_VARIABLE} names another"
        raise WorkloadError("data", found, allowed) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _build(folder: Path, frames: Frames, about: dict[str, Any]) -> None:
    with building_of(folder) as building:
        splits = {split: _write_split(building, split, frames[split], about) for split in frames}
        manifest = {
            **{key: value for key, value in about.items() if key != "fingerprints"},
            "splits": splits,
            "type_names": _type_names(frames),
            "has_stress": any("stress" in frame.calc.results for split in frames.values() for frame in split),
            "periodic": any(bool(frame.pbc.any()) for split in frames.values() for frame in split),
        }
        (building / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=True) + "\n", encoding="utf-8")
        move_into_place(building, folder)


def move_into_place(building: Path, folder: Path) -> None:
    """Rename a built folder to its final place, where another process may have put an equal one."""
    try:
        building.rename(folder)
    except OSError:
        # Another process was faster. Its folder holds the same data, as both names are the hash of what decides it.
        if not (folder / MANIFEST).is_file():
            raise


def _write_split(building: Path, split: str, frames: list[Atoms], about: dict[str, Any]) -> dict[str, Any]:
    path = building / split_file_name(split)
    write_frames(path, frames)
    sizes = [len(frame) for frame in frames]
    types = [frame.info.get(CONFIG_TYPE, "") for frame in frames]
    return {
        "file": path.name,
        "frames": len(frames),
        "atoms_min": min(sizes),
        "atoms_max": max(sizes),
        "sha256": file_hash(path),
        "fingerprints": about["fingerprints"][split],
        **({"config_types": types} if any(types) else {}),
    }


def _type_names(frames: Frames) -> list[str]:
    symbols = {symbol for split in frames.values() for frame in split for symbol in frame.symbols}
    return sorted(symbols, key=atomic_numbers.__getitem__)


def _load_split(folder: Path, entry: dict[str, Any]) -> SplitFile:
    path = folder / entry["file"]
    found = known_hash(path) if path.is_file() else None
    if found != entry["sha256"]:
        allowed = f"the file its manifest describes (sha256 {entry['sha256'][:12]}); delete the folder to make it anew"
        raise WorkloadError("data", f"{path} (sha256 {found and found[:12]})", allowed)
    fields = {key: entry[key] for key in ("frames", "atoms_min", "atoms_max", "sha256", "fingerprints")}
    return SplitFile(path=path, config_types=tuple(entry.get("config_types", ())), **fields)


def known_hash(path: Path) -> str:
    """SHA-256 (hex) of a file, computed once per process and state of the file."""
    # A process opens each data set many times; a change shows in these numbers (the last two of them in ns).
    state = path.stat()
    return _hash_in_state(path, (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))


@lru_cache(maxsize=_KEPT_HASHES)
def _hash_in_state(path: Path, state: tuple[int, ...]) -> str:
    del state
    return file_hash(path)
