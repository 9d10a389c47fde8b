"""GFN2-xTB data: molecular-dynamics snapshots made here, one trajectory for each split.

Each trajectory runs in a process of its own with one thread. That makes the snapshots independent of the caller's
thread count, lets the splits run side by side, keeps a crash of the Fortran library away from the study, and is faster
than tblite's own threads for systems of this size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.collections import g2

import tunebench
from tunebench.study.record import OOD_PREFIX, Split
from tunebench.study.spec import XtbData
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.molecules import MOLECULES
from tunebench.workloads.structure_files import read_prepared
from tunebench.workloads.trajectory import METHOD, PERIODIC_SAMPLING_METHOD, WATER_BOX, steps_of

HOT = OOD_PREFIX + "hot"
_LIBRARIES = ("ase", "numpy", "tblite")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def identity(data: XtbData) -> dict[str, Any]:
    """What decides the snapshots: the description and the versions of the libraries that make them."""
    return {"data": data.model_dump(mode="json"), "versions": {name: version(name) for name in _LIBRARIES}}


def level_of_theory(data: XtbData) -> str:
    """The method of the labels and the library that computes it (Bannwarth et al., doi:10.1021/acs.jctc.8b01176)."""
    sampling = f", sampled with {PERIODIC_SAMPLING_METHOD}" if data.system == WATER_BOX else ""
    return f"{METHOD}, tblite {version('tblite')}{sampling}"


def xtb_frames(data: XtbData, progress: Callable[[str], None]) -> dict[str, list[Atoms]]:
    """Run the trajectories of all splits, as many at once as the machine has cores.

    Args:
        data: system, temperatures, times and frame counts.
        progress: called with a line of text now and then; calls come from several threads, one at a time each.

    Returns:
        Labelled frames of ``train``, ``val``, ``test`` and, with ``ood_temperature_kelvin``, ``ood:hot``.

    Raises:
        WorkloadError: unknown molecule, impossible times, or a trajectory that failed.
    """
    if data.system != WATER_BOX and MOLECULES.get(data.system, data.system) not in g2.names:
        allowed = f"{WATER_BOX}, {', '.join(sorted(MOLECULES))} or a name of ASE's G2 collection"
        raise WorkloadError("data.system", data.system, allowed)
    steps_of(data)
    counts = _counts(data)
    with tempfile.TemporaryDirectory(prefix="tunebench-xtb-") as folder, ThreadPoolExecutor(_workers()) as pool:
        paths = {split: Path(folder) / f"{index}.xyz" for index, split in enumerate(counts)}
        runs = [pool.submit(_run, data, split, counts[split], paths[split], progress) for split in counts]
        for run in runs:
            run.result()
        return {split: read_prepared(path) for split, path in paths.items()}


def _counts(data: XtbData) -> dict[str, int]:
    frames = data.frames
    counts = {str(Split.TRAIN): frames.train, str(Split.VAL): frames.val, str(Split.TEST): frames.test}
    if data.ood_temperature_kelvin is None:
        if frames.ood:
            raise WorkloadError("data.frames.ood", frames.ood, "0 without `ood_temperature_kelvin`")
        return counts
    if frames.ood == 0:
        raise WorkloadError("data.frames.ood", 0, "at least 1 when `ood_temperature_kelvin` is given")
    return {**counts, HOT: frames.ood}


def _workers() -> int:
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _run(data: XtbData, split: str, frames: int, path: Path, progress: Callable[[str], None]) -> None:
    kelvin = data.ood_temperature_kelvin if split == HOT else data.temperature_kelvin
    request = {"data": data.model_dump(mode="json"), "split": split, "frames": frames, "kelvin": kelvin}
    package_root = str(Path(tunebench.__file__).resolve().parents[1])
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    with subprocess.Popen(
        [sys.executable, "-m", "tunebench.workloads.trajectory", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **_ONE_THREAD, "PYTHONPATH": search_path},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        last = ""
        for line in process.stdout:
            last = line.strip() or last
            if last.startswith(f"{split}:"):
                progress(f"{data.system} {last}")
    if process.returncode != 0:
        found = f"{data.system} at {kelvin} K, split {split}: {last or f'exit status {process.returncode}'}"
        raise WorkloadError("data.system", found, "a system, temperature and time step that GFN2-xTB can follow")
