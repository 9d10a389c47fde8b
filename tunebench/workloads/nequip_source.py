"""Data from any NequIP DataModule: its training, validation and test sets become the splits of a prepared folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from nequip.data import AtomicDataDict
from nequip.utils import torch_default_dtype
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tunebench.study.record import OOD_PREFIX, Split
from tunebench.study.spec import NequipData
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.structure_files import file_hash, labelled_atoms

_KEY = "data.datamodule"


def identity(data: NequipData, base: Path) -> dict[str, Any]:
    """What decides the frames: the resolved DataModule section, nequip's version, and the files the section names."""
    config = _resolved(data, base)
    files = {text: file_hash(Path(text)) for text in _texts(config) if Path(text).is_file()}
    described = {**data.model_dump(mode="json"), "datamodule": _with_hashes(config, files)}
    return {"data": described, "versions": {"nequip": version("nequip")}}


def nequip_frames(data: NequipData, base: Path, progress: Callable[[str], None]) -> dict[str, list[Atoms]]:
    """Set the DataModule up and take its frames.

    Its first test set is ``test``; further ones take the names of ``ood`` in order.

    Args:
        data: DataModule section and names of the further test sets. A path relative to ``base`` may be given wherever
            the section names an existing file.
        base: folder that relative paths start from.
        progress: called with a line for each split.

    Returns:
        Labelled frames by split.

    Raises:
        WorkloadError: the DataModule cannot be made or set up, lacks a split, has a number of test sets that does not
            match ``ood``, or holds frames without energy or forces.
    """
    with torch_default_dtype(torch.float64):
        fit, tests = _datasets(_resolved(data, base))
        if len(tests) != 1 + len(data.ood):
            further = max(0, len(tests) - 1)
            raise WorkloadError("data.ood", list(data.ood), f"{further} names: one for each further test set")
        names = [Split.TRAIN, Split.VAL, Split.TEST, *(OOD_PREFIX + name for name in data.ood)]
        frames = {}
        for name, dataset in zip(names, [*fit, *tests], strict=True):
            progress(f"reading {name}")
            frames[str(name)] = [_atoms(dataset[index], f"{name} frame {index}") for index in range(len(dataset))]
    return frames


def _resolved(data: NequipData, base: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.to_container(OmegaConf.create(data.datamodule), resolve=True)
    except OmegaConfBaseException as error:
        raise WorkloadError(_KEY, str(error), "a section whose interpolations resolve") from error
    anchored = _anchored(config, base)
    if not isinstance(anchored, dict) or "_target_" not in anchored:
        raise WorkloadError(f"{_KEY}._target_", None, "the import path of a NequIP DataModule")
    return anchored


def _anchored(value: Any, base: Path) -> Any:
    if isinstance(value, dict):
        return {key: _anchored(item, base) for key, item in value.items()}
    if isinstance(value, list):
        return [_anchored(item, base) for item in value]
    return str((base / value).resolve()) if isinstance(value, str) and _is_file(base / value) else value


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # any text may stand in the section, also one that is too long for a path
        return False


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, str) and _is_file(Path(value)):
        yield value


def _with_hashes(value: Any, files: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _with_hashes(item, files) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_hashes(item, files) for item in value]
    return files.get(value, value) if isinstance(value, str) else value


def _datasets(config: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    try:
        module = instantiate(config, _recursive_=False)
        module.prepare_data()
        module.setup("fit")
        train, val = module.train_dataset, module.val_dataset
        module.setup("test")
        tests = list(module.test_dataset)
    except InstantiationException as error:
        found = f"{config['_target_']} ({error.__cause__ or error})"
        raise WorkloadError(f"{_KEY}._target_", found, "a DataModule that can be made") from error
    except Exception as error:  # a DataModule is foreign code: whatever it raises means that it gives no data
        found = f"{config['_target_']} ({type(error).__name__}: {error})"
        raise WorkloadError(_KEY, found, "a DataModule that sets up train, val and test") from error
    for name, datasets in (("training", train), ("validation", val)):
        if len(datasets) != 1:
            allowed = "one training, one validation, one or more test sets"
            raise WorkloadError(_KEY, f"{len(datasets)} {name} sets", allowed)
    return [train[0], val[0]], tests


def _atoms(frame: dict[str, torch.Tensor], where: str) -> Atoms:
    numbers = frame.get(AtomicDataDict.ATOMIC_NUMBERS_KEY)
    if numbers is None:
        raise WorkloadError(_KEY, f"{where} without atomic numbers", f"frames with {AtomicDataDict.ATOMIC_NUMBERS_KEY}")
    cell, pbc = frame.get(AtomicDataDict.CELL_KEY), frame.get(AtomicDataDict.PBC_KEY)
    atoms = Atoms(
        numbers=numbers.numpy().reshape(-1),
        positions=_array(frame[AtomicDataDict.POSITIONS_KEY]),
        cell=None if cell is None else _array(cell).reshape(3, 3),
        pbc=None if pbc is None else pbc.numpy().reshape(3),
    )
    energy, forces = (_label(frame, key, where) for key in (AtomicDataDict.TOTAL_ENERGY_KEY, AtomicDataDict.FORCE_KEY))
    stress = frame.get(AtomicDataDict.STRESS_KEY)
    # NequIP's transforms mark a missing stress by NaN.
    given = None if stress is None or bool(torch.isnan(stress).any()) else _array(stress).reshape(3, 3)
    return labelled_atoms(atoms, energy=energy.item(), forces=forces.reshape(-1, 3), stress=given)


def _label(frame: dict[str, torch.Tensor], key: str, where: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    if key not in frame:
        raise WorkloadError(_KEY, f"{where} without {key}", f"frames with {key}, for example by `key_mapping`")
    values = _array(frame[key])
    if not np.isfinite(values).all():
        raise WorkloadError(_KEY, f"{where}: {key} is NaN or infinite", "finite labels")
    return values


def _array(values: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return values.detach().to(torch.float64).numpy()
