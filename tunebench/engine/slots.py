"""How many trials a cohort should train at once: measured on the device at hand.

Doubling the slots is worth it as long as a step takes clearly less than twice as long; one doubling that does not pay
may be noise, two in a row end the measurement. The plain graph is measured, not the compiled one: it shows the same
knee, needs no compiler and takes more memory, so what fits it fits the other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tunebench.engine.cohort import Cohort
from tunebench.engine.graphs import release_memory
from tunebench.engine.task import TrialTask
from tunebench.engine.watchdog import Watchdog

_log = logging.getLogger(__name__)

LEAST_GAIN = 1.15
"""Throughput that a doubling of the slots must bring, relative to that before."""

MEMORY_SHARE = 0.6
"""Share of the device's free memory that the step may take; the rest is for evaluation and for other optimizers."""

_WARM, _TIMED, _REPEATS = 3, 2, 3


@dataclass(frozen=True, kw_only=True)
class SlotTiming:
    """What was measured with a number of slots.

    Attributes:
        slots: trials in the step.
        step_s: seconds of one step.
        memory_bytes: peak memory of the device; 0 where it is not known.
    """

    slots: int
    step_s: float
    memory_bytes: int

    @property
    def throughput(self) -> float:
        """Trial-steps per second."""
        return self.slots / self.step_s


def automatic_slots(task: TrialTask, most: int = 64, watchdog: Watchdog | None = None) -> int:
    """Slots for a workload on this device: where doubling stops paying, or memory or `most` ends it.

    Args:
        task: any trial of the workload.
        most: more are not wanted.
        watchdog: as for `Cohort`.

    Raises:
        Untraceable: the model cannot be written as a function of its weights.
        WorkloadError: the data or the model's arguments are refused.
        torch.OutOfMemoryError: not even one slot fits.
    """
    with TemporaryDirectory(prefix="tunebench-slots-") as folder:
        measured = measure_slots(_measured_task(task, Path(folder)), most, _worth_doubling, watchdog)
    best = chosen(measured)
    line = ", ".join(f"{timing.slots}: {timing.throughput:.0f}/s" for timing in measured)
    _log.info("%s: trial-steps by slots %s; taking %d", task.workload.name, line, best)
    return best


def chosen(measured: list[SlotTiming]) -> int:
    """The fewest slots from which a further doubling's gain is left."""
    best = max(timing.throughput for timing in measured)
    return next(timing.slots for timing in measured if LEAST_GAIN * timing.throughput > best)


def measure_slots(
    task: TrialTask,
    most: int,
    go_on: Callable[[list[SlotTiming], torch.device], bool],
    watchdog: Watchdog | None = None,
) -> list[SlotTiming]:
    """Time steps with 1, 2, 4, ... slots until `go_on` says no, memory runs out or `most` is reached.

    Raises:
        torch.OutOfMemoryError: not even one slot fits.
    """
    cohort = Cohort(task, 1 << (most.bit_length() - 1), compiled=False, exact=True, watchdog=watchdog)
    measured: list[SlotTiming] = []
    try:
        while not measured or (2 * measured[-1].slots <= cohort.slots and go_on(measured, cohort.device)):
            wanted = 2 * measured[-1].slots if measured else 1
            while len(cohort.trials) < wanted:
                cohort.join(replace(task, key=replace(task.key, config_index=len(cohort.trials))))
            measured.append(_timed(cohort, wanted))
    except torch.OutOfMemoryError:
        if not measured:
            raise
    for name in cohort.trials:
        cohort.leave(name)
    del cohort
    release_memory(torch.device(task.device))
    return measured


def _measured_task(task: TrialTask, run: Path) -> TrialTask:
    """The trial in a run directory of its own, with a horizon that no measurement reaches."""
    steps = (_WARM + _REPEATS * _TIMED) * 64
    workload = task.workload.model_copy(update={"max_steps": steps})
    return replace(task, run=run, workload=workload, evaluation_steps=(steps,), rungs=(), horizons=())


def _timed(cohort: Cohort, slots: int) -> SlotTiming:
    on_gpu = cohort.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(cohort.device)
    cohort.run(_WARM)
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        cohort.run(_TIMED)
        times.append((time.perf_counter() - began) / _TIMED)
    memory = torch.cuda.max_memory_allocated(cohort.device) if on_gpu else 0
    return SlotTiming(slots=slots, step_s=min(times), memory_bytes=memory)  # others on the machine only add time


def _worth_doubling(measured: list[SlotTiming], device: torch.device) -> bool:
    if len(measured) > 2 and chosen(measured) <= measured[-3].slots:
        return False
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    available = free + torch.cuda.memory_reserved(device)
    return 2 * measured[-1].memory_bytes <= MEMORY_SHARE * available
