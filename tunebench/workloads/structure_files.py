# mypy: allow-untyped-calls
"""Structure files: exact extended XYZ out, any ASE-readable file in.

ASE writes extended XYZ with eight decimals, which loses up to 5e-9 eV/Å of a force and, with it, the bitwise
reproducibility of a prepared data set. Frames are therefore written here with as many digits as it takes: every float64
comes back as it was, through `ase.io.read` and through NequIP's `ASEDataset` alike.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from numpy.typing import NDArray

from tunebench.study.paths import FramesOfFile
from tunebench.study.spec import ExtxyzKeys
from tunebench.workloads.errors import WorkloadError

Array = NDArray[np.float64]

_PACKED = {".xz": lzma.LZMAFile, ".gz": gzip.GzipFile}


CONFIG_TYPE = "config_type"
"""Key of `Atoms.info` under which a labelled frame keeps what it is, where the study names such a key of the file."""


def labelled_atoms(atoms: Atoms, *, energy: float, forces: Array, stress: Array | None = None) -> Atoms:
    """A copy of the structure with these labels and nothing else attached to it.

    Args:
        atoms: structure; its constraints, velocities, calculator and extra columns are dropped.
        energy: total energy, eV.
        forces: eV/Å, shape (atoms, 3).
        stress: eV/Å³, positive under tension, shape (6,) in Voigt order or (3, 3).
    """
    periodic = bool(atoms.pbc.any())
    cell = atoms.cell.array if periodic else None
    frame = Atoms(numbers=atoms.numbers, positions=atoms.positions, cell=cell, pbc=atoms.pbc if periodic else None)
    results: dict[str, Any] = {"energy": float(energy), "forces": np.asarray(forces, dtype=np.float64)}
    if stress is not None and periodic:
        results["stress"] = _voigt(np.asarray(stress, dtype=np.float64))
    frame.calc = SinglePointCalculator(frame, **results)
    return frame


def write_frames(path: Path, frames: Iterable[Atoms]) -> None:
    """Write labelled frames as extended XYZ whose numbers come back exactly: eV, eV/Å, eV/Å³ (ASE sign)."""
    with path.open("w", encoding="ascii", newline="\n") as file:
        for frame in frames:
            file.write(_frame_text(frame))


def read_prepared(path: Path) -> list[Atoms]:
    """Read a file of `write_frames`; each frame carries its labels in a single-point calculator."""
    return list(ase.io.read(path, index=":", format="extxyz"))


def read_labelled(file: FramesOfFile, keys: ExtxyzKeys, key: str) -> dict[int, Atoms]:
    """Read frames of any ASE-readable file, plain or compressed by xz or gzip, and check that each is labelled.

    Args:
        file: the file and which of its frames.
        keys: names of the labels, looked for in the single-point calculator, then in ``info`` and ``arrays``.
        key: key of the study file that names this file, for errors.

    Returns:
        Labelled frames by their index in the file, in the order of the slice.

    Raises:
        WorkloadError: the file is missing, unreadable or empty, its slice takes no frame, or a frame lacks a finite
            energy or force.
    """
    if not file.path.is_file():
        raise WorkloadError(key, str(file.path), "an existing file")
    frames = read_structures(file.path, key)
    if not frames:
        raise WorkloadError(key, f"{file.path} without frames", "a file with at least one frame")
    indices = file.indices(len(frames))
    if not indices:
        raise WorkloadError(key, str(file), f"a slice that takes at least one of the file's {len(frames)} frames")
    return {index: _with_labels(frames[index], keys, f"{file.path.name} frame {index}") for index in indices}


def read_structures(path: Path, key: str) -> list[Atoms]:
    """Read all structures of any ASE-readable file, plain or compressed by xz or gzip, with whatever labels they have.

    Args:
        path: the file.
        key: key of the file that names this one, for errors.

    Raises:
        WorkloadError: the file cannot be read.
    """
    # ASE seeks in a compressed stream again and again, which takes about a hundred times longer than unpacking it.
    packed_file = _PACKED.get(path.suffix)
    try:
        if packed_file is None:
            return _all_structures(path)
        with tempfile.TemporaryDirectory(prefix="tunebench-") as folder:
            plain = Path(folder) / path.stem
            with packed_file(path) as packed, plain.open("wb") as file:
                shutil.copyfileobj(packed, file)
            return _all_structures(plain)
    except Exception as error:  # ASE's readers raise whatever their parsing meets; all of it means the same here
        raise WorkloadError(key, f"{path} ({type(error).__name__}: {error})", "a file that ASE can read") from error


def file_hash(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _all_structures(path: Path) -> list[Atoms]:
    return list(ase.io.read(path, index=":", do_not_split_by_at_sign=True))  # the path is a whole name, also with an @


def _voigt(stress: Array) -> Array:
    if stress.shape == (6,):
        return stress
    voigt: Array = full_3x3_to_voigt_6_stress(stress.reshape(3, 3))
    return voigt


def _numbers_text(values: Array) -> str:
    # Python's shortest exact form always has a point or an exponent; ASE would read a whole number without as an int.
    return " ".join(repr(value) for value in values.ravel().tolist())


def _frame_text(frame: Atoms) -> str:
    results = frame.calc.results
    header = []
    if frame.pbc.any():
        header.append(f'Lattice="{_numbers_text(frame.cell.array)}"')
    header.append("Properties=species:S:1:pos:R:3:forces:R:3")
    header.append(f"energy={float(results['energy'])!r}")
    if "stress" in results:
        xx, yy, zz, yz, xz, xy = results["stress"]
        tensor = np.array([xx, xy, xz, xy, yy, yz, xz, yz, zz], dtype=np.float64)
        header.append(f'stress="{_numbers_text(tensor)}"')
    header.append('pbc="{} {} {}"'.format(*("T" if periodic else "F" for periodic in frame.pbc)))
    rows = (
        f"{symbol:<2} {_numbers_text(position)} {_numbers_text(force)}"
        for symbol, position, force in zip(frame.symbols, frame.positions, results["forces"], strict=True)
    )
    return "\n".join([str(len(frame)), " ".join(header), *rows]) + "\n"


def _with_labels(frame: Atoms, keys: ExtxyzKeys, where: str) -> Atoms:
    energy = _label(frame, "energy", keys.energy, where)
    forces = _label(frame, "forces", keys.forces, where)
    if energy.size != 1:
        raise WorkloadError("data.keys.energy", f"{where}: {energy.size} numbers", "one total energy a frame, eV")
    if forces.shape != (len(frame), 3):
        raise WorkloadError("data.keys.forces", f"{where}: shape {forces.shape}", f"shape ({len(frame)}, 3), eV/Å")
    stress = _available(frame).get(keys.stress)
    stress = None if stress is None else _finite(np.asarray(stress, dtype=np.float64), "stress", where)
    labelled = labelled_atoms(frame, energy=energy.item(), forces=forces, stress=stress)
    if keys.config_type in frame.info:
        labelled.info[CONFIG_TYPE] = str(frame.info[keys.config_type])
    return labelled


def _label(frame: Atoms, role: str, name: str, where: str) -> Array:
    available = _available(frame)
    if name not in available:
        known = ", ".join(sorted(set(available) - {"numbers", "positions"})) or "no labels at all"
        raise WorkloadError(f"data.keys.{role}", name, f"a name that {where} has ({known})")
    return _finite(np.asarray(available[name], dtype=np.float64), role, where)


def _available(frame: Atoms) -> dict[str, Any]:
    calculated = {} if frame.calc is None else {k: v for k, v in frame.calc.results.items() if v is not None}
    return {**frame.arrays, **frame.info, **calculated}


def _finite(values: Array, role: str, where: str) -> Array:
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise WorkloadError(f"data.keys.{role}", f"{where}: {bad} numbers that are NaN or infinite", "finite labels")
    return values
