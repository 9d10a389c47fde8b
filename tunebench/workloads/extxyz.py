"""Data from structure files: paths, the frames each split draws, and what identifies them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from tunebench.study.paths import FramesOfFile, NoSuchFileError, frames_of_file
from tunebench.study.record import OOD_PREFIX, Split
from tunebench.study.seeds import named_seed
from tunebench.study.spec import ExtxyzData
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.structure_files import CONFIG_TYPE, file_hash, read_labelled


@dataclass(frozen=True)
class _Draw:
    """Splits that take their frames from one file or slice, in the order in which they take them."""

    key: str
    file: FramesOfFile
    splits: tuple[str, ...]


def identity(data: ExtxyzData, base: Path) -> dict[str, Any]:
    """What decides the frames: the description, with the content of the files in place of their paths.

    A slice follows its file's hash as it follows a path. The files are read for it, so they must be here even when the
    prepared set already is.

    Raises:
        WorkloadError: a file is missing, or its slice is none.
    """
    described = data.model_dump(mode="json")
    if data.keys.config_type is None:  # data without it are what they were before there was any
        del described["keys"]["config_type"]
    described.update(
        train=_content(data.train, "data.train", base),
        val=None if data.val is None else _content(data.val, "data.val", base),
        test=None if data.test is None else _content(data.test, "data.test", base),
        ood={name: _content(text, f"data.ood.{name}", base) for name, text in data.ood.items()},
    )
    return {"data": described, "versions": {"ase": version("ase")}}


def extxyz_frames(data: ExtxyzData, base: Path, progress: Callable[[str], None]) -> dict[str, list[Atoms]]:
    """Read the files and draw the frames of each split.

    The frames of a file, or of its slice, are put into one order by a seeded permutation named after the first split it
    serves. A validation or test split without a file of its own takes the head of the training file's order, so the
    number of training frames changes neither, and fewer training frames are a subset of more.

    Args:
        data: files, label names, frame counts and seed.
        base: folder that relative paths start from.
        progress: called with a line for each file.

    Returns:
        Labelled frames by split.

    Raises:
        WorkloadError: a file is missing, unreadable, unlabelled or has fewer frames than asked, or two slices of one
            file have frames in common.
    """
    if data.ood and data.frames.ood == 0:
        raise WorkloadError("data.frames.ood", 0, "at least 1 when `ood` names files")
    frames: dict[str, list[Atoms]] = {}
    taken: dict[_Draw, frozenset[int]] = {}
    for draw in _draws(data, base):
        progress(f"reading {draw.file.name}")
        pool = read_labelled(draw.file, data.keys, draw.key)
        _check_overlap(draw, pool, taken)
        taken[draw] = frozenset(pool)
        frames.update(_drawn(list(pool.values()), draw, data))
    _check_config_types(frames, data)
    order = [Split.TRAIN, Split.VAL, Split.TEST, *(OOD_PREFIX + name for name in data.ood)]
    return {str(split): frames[split] for split in order}


def _draws(data: ExtxyzData, base: Path) -> list[_Draw]:
    own = {Split.VAL: data.val, Split.TEST: data.test}
    shared = [split for split in (Split.TEST, Split.VAL) if own[split] is None]
    files: list[tuple[str, str, tuple[str, ...]]] = [("train", data.train, (*shared, Split.TRAIN))]
    files += [(str(split), text, (split,)) for split, text in own.items() if text is not None]
    files += [(f"ood.{name}", text, (OOD_PREFIX + name,)) for name, text in data.ood.items()]
    return [_Draw(f"data.{key}", _located(text, f"data.{key}", base), splits) for key, text, splits in files]


def _check_overlap(draw: _Draw, indices: Iterable[int], taken: Mapping[_Draw, frozenset[int]]) -> None:
    # `allow_duplicates` is for frames that happen to be equal, not for slices that were meant to be apart.
    for other, others in taken.items():
        common = sorted(others.intersection(indices))
        if common and other.file.path == draw.file.path and (other.file.part or draw.file.part):
            found = f"{draw.file.name} with {len(common)} of the frames of {other.key}, {other.file.name}"
            allowed = "slices of one file without a common frame, with `allow_duplicates` too"
            raise WorkloadError(draw.key, f"{found}, such as frame {common[0]}", allowed)


def _drawn(pool: list[Atoms], draw: _Draw, data: ExtxyzData) -> dict[str, list[Atoms]]:
    counts = data.frames.model_dump()
    order = np.random.default_rng(named_seed(data.seed, "extxyz", draw.splits[-1])).permutation(len(pool))
    drawn: dict[str, list[Atoms]] = {}
    start = 0
    for split in draw.splits:
        count = counts["ood" if split.startswith(OOD_PREFIX) else split]
        if start + count > len(pool):
            key = "ood" if split.startswith(OOD_PREFIX) else split
            taken = f", of which {start} already serve other splits" if start else ""
            raise WorkloadError(
                f"data.frames.{key}", count, f"at most {len(pool) - start}: {draw.file.name} has {len(pool)}{taken}"
            )
        drawn[str(split)] = [pool[index] for index in order[start : start + count]]
        start += count
    return drawn


def _check_config_types(frames: dict[str, list[Atoms]], data: ExtxyzData) -> None:
    """Some frames of a file may have no type, but a key that none has is misspelt."""
    named = data.keys.config_type
    if named is not None and not any(CONFIG_TYPE in frame.info for split in frames.values() for frame in split):
        raise WorkloadError("data.keys.config_type", named, "a key of the info of some frame")


def _content(text: str, key: str, base: Path) -> str:
    file = _located(text, key, base)
    content = file_hash(file.path)
    return f"{content}@{file.part}" if file.part else content


def _located(text: str, key: str, base: Path) -> FramesOfFile:
    try:
        return frames_of_file(text, base)
    except NoSuchFileError as error:
        raise WorkloadError(key, text, str(error)) from None
