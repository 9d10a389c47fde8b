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
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ase import Atoms

from tunebench.study.processes import module_search_path, usable_cores
from tunebench.study.record import OOD_PREFIX, Split
from tunebench.study.seeds import named_seed
from tunebench.study.spec import WATER_BOX, SplitFrames, XtbData, XtbMixtureData
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.structure_files import read_prepared
from tunebench.workloads.trajectory import METHOD, PERIODIC_SAMPLING_METHOD
from tunebench.workloads.xtb_checks import check_xtb

HOT = OOD_PREFIX + "hot"
_LIBRARIES = ("ase", "numpy", "tblite")
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def identity(data: XtbData | XtbMixtureData) -> dict[str, Any]:
    """What decides the snapshots: the description and the versions of the libraries that make them."""
    return {"data": data.model_dump(mode="json"), "versions": {name: version(name) for name in _LIBRARIES}}


def level_of_theory(data: XtbData | XtbMixtureData) -> str:
    """The method of the labels and the library that computes it (Bannwarth et al., doi:10.1021/acs.jctc.8b01176)."""
    periodic = isinstance(data, XtbData) and data.system == WATER_BOX
    sampling = f", sampled with {PERIODIC_SAMPLING_METHOD}" if periodic else ""
    return f"{METHOD}, tblite {version('tblite')}{sampling}"


def xtb_frames(data: XtbData, progress: Callable[[str], None]) -> dict[str, list[Atoms]]:
    """Run the trajectories of all splits, as many at once as the machine has cores.

    Whatever ends the call early, an interrupt too, stops the trajectories that run and starts none of those that wait.

    Args:
        data: system, temperatures, times and frame counts.
        progress: called with a line of text now and then; calls come from several threads, one at a time each.

    Returns:
        Labelled frames of ``train``, ``val``, ``test`` and, with ``ood_temperature_kelvin``, ``ood:hot``.

    Raises:
        WorkloadError: unknown molecule, impossible times, or a trajectory that failed.
    """
    check_xtb(data)
    (frames,) = _frames_of([data], progress)
    return frames


def mixture_frames(data: XtbMixtureData, progress: Callable[[str], None]) -> dict[str, list[Atoms]]:
    """Snapshots of every molecule of a mixture, molecule by molecule; otherwise as `xtb_frames`.

    Returns:
        Labelled frames of ``train``, ``val`` and ``test``.
    """
    check_xtb(data)
    of_each = _frames_of(_molecules(data), progress)
    return {split: [frame for frames in of_each for frame in frames[split]] for split in of_each[0]}


def _molecules(data: XtbMixtureData) -> list[XtbData]:
    """A data section for each molecule, with its share of the frames and a seed of its own."""
    shared = data.model_dump(exclude={"source", "systems", "frames", "seed"})
    sections = []
    for index, system in enumerate(data.systems):
        shares = {
            split: count // len(data.systems) + (index < count % len(data.systems))
            for split, count in data.frames.model_dump().items()
        }
        seed = named_seed(data.seed, "mixture", system)
        sections.append(XtbData(source="xtb", system=system, frames=SplitFrames(**shares), seed=seed, **shared))
    return sections


def _frames_of(sections: Sequence[XtbData], progress: Callable[[str], None]) -> list[dict[str, list[Atoms]]]:
    with (
        tempfile.TemporaryDirectory(prefix="tunebench-xtb-") as folder,
        ThreadPoolExecutor(usable_cores()) as pool,
        _Processes(pool) as processes,
    ):
        paths = [
            {split: Path(folder) / f"{number}-{index}.xyz" for index, split in enumerate(_counts(data))}
            for number, data in enumerate(sections)
        ]
        runs = [
            pool.submit(_run, processes, data, split, _counts(data)[split], path, progress)
            for data, own in zip(sections, paths, strict=True)
            for split, path in own.items()
        ]
        for run in runs:
            run.result()
        return [{split: read_prepared(path) for split, path in own.items()} for own in paths]


class _Processes:
    """The trajectories' processes: when the block ends, none runs any more and none starts.

    It must be left before the pool, which waits for its threads and they for these processes.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._started: list[subprocess.Popen[str]] = []
        self._stopped = False

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._stopped = True
            for process in self._started:
                process.kill()  # it holds nothing but a temporary file; one that has ended is left alone

    def start(self, path: Path) -> subprocess.Popen[str]:
        """A process that reads its request on standard input and writes its snapshots to the path."""
        with self._lock:
            if self._stopped:
                raise CancelledError
            process = subprocess.Popen(
                [sys.executable, "-m", "tunebench.workloads.trajectory", str(path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": module_search_path()},
            )
            self._started.append(process)
        return process


def _counts(data: XtbData) -> dict[str, int]:
    frames = data.frames
    counts = {str(Split.TRAIN): frames.train, str(Split.VAL): frames.val, str(Split.TEST): frames.test}
    return counts if data.ood_temperature_kelvin is None else {**counts, HOT: frames.ood}


def _run(
    processes: _Processes, data: XtbData, split: str, frames: int, path: Path, progress: Callable[[str], None]
) -> None:
    kelvin = data.ood_temperature_kelvin if split == HOT else data.temperature_kelvin
    request = {"data": data.model_dump(mode="json"), "split": split, "frames": frames, "kelvin": kelvin}
    with processes.start(path) as process:
        last = _follow(process, json.dumps(request), split, lambda line: progress(f"{data.system} {line}"))
    if process.returncode != 0:
        found = f"{data.system} at {kelvin} K, split {split}: {last or f'exit status {process.returncode}'}"
        raise WorkloadError("data.system", found, "a system, temperature and time step that GFN2-xTB can follow")


def _follow(process: subprocess.Popen[str], request: str, split: str, progress: Callable[[str], None]) -> str:
    """Hand the request over, pass progress on until the output ends, and return the last line."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):  # a process that ended before it read says why in its output
        process.stdin.write(request)
        process.stdin.close()
    last = ""
    for line in process.stdout:
        last = line.strip() or last
        if last.startswith(f"{split}:"):
            progress(last)
    return last
