"""Data from structure files: paths, the frames each split draws, and what identifies them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from tunebench.study.paths import NoSuchFileError, existing_file
from tunebench.study.record import OOD_PREFIX, Split
from tunebench.study.seeds import named_seed
from tunebench.study.spec import ExtxyzData
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.structure_files import CONFIG_TYPE, file_hash, read_labelled


@dataclass(frozen=True)
class _Draw:
    """Splits that take their frames from one file, in the order in which they take them."""

    key: str
    path: Path
    splits: tuple[str, ...]


def identity(data: ExtxyzData, base: Path) -> dict[str, Any]:
    """What decides the frames: the description, with the content of the files in place of their paths.

    The files are read for it, so they must be here even when the prepared set already is.

    Raises:
        WorkloadError: a file is missing.
    """
    described = data.model_dump(mode="json")
    if data.keys.config_type is None:  # data without it are what they were before there was any
        del described["keys"]["config_type"]
    described.update(
        train=file_hash(_located(data.train, "data.train", base)),
        val=None if data.val is None else file_hash(_located(data.val, "data.val", base)),
        test=None if data.test is None else file_hash(_located(data.test, "data.test", base)),
        ood={name: file_hash(_located(text, f"data.ood.{name}", base)) for name, text in data.ood.items()},
    )
    return {"data": described, "versions": {"ase": version("ase")}}


def extxyz_frames(data: ExtxyzData, base: Path, progress: Callable[[str], None]) -> dict[str, list[Atoms]]:
    """Read the files and draw the frames of each split.

    The frames of a file are put into one order by a seeded permutation named after the first split it serves. A
    validation or test split without a file of its own takes the head of the training file's order, so the number of
    training frames changes neither, and fewer training frames are a subset of more.

    Args:
        data: files, label names, frame counts and seed.
        base: folder that relative paths start from.
        progress: called with a line for each file.

    Returns:
        Labelled frames by split.

    Raises:
        WorkloadError: a file is missing, unreadable, unlabelled or has fewer frames than asked.
    """
    if data.ood and data.frames.ood == 0:
        raise WorkloadError("data.frames.ood", 0, "at least 1 when `ood` names files")
    frames: dict[str, list[Atoms]] = {}
    for draw in _draws(data, base):
        progress(f"reading {draw.path.name}")
        pool = read_labelled(draw.path, data.keys, draw.key)
        frames.update(_drawn(pool, draw, data))
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
                f"data.frames.{key}", count, f"at most {len(pool) - start}: {draw.path.name} has {len(pool)}{taken}"
            )
        drawn[str(split)] = [pool[index] for index in order[start : start + count]]
        start += count
    return drawn


def _check_config_types(frames: dict[str, list[Atoms]], data: ExtxyzData) -> None:
    """Some frames of a file may have no type, but a key that none has is misspelt."""
    named = data.keys.config_type
    if named is not None and not any(CONFIG_TYPE in frame.info for split in frames.values() for frame in split):
        raise WorkloadError("data.keys.config_type", named, "a key of the info of some frame")


def _located(text: str, key: str, base: Path) -> Path:
    try:
        return existing_file(text, base)
    except NoSuchFileError as error:
        raise WorkloadError(key, text, str(error)) from None
