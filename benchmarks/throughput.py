"""Trial-steps per second of the cohort engine beside `nequip-train`, eager and compiled, and a process per trial.

All ways train the same model in float32 on the same data with the same batch size and evaluate the validation split
every `--evaluate-every` steps; data loading, evaluation and what each way writes down are part of the time:

- `nequip`: NequIP's own command with its plain config and torch's AdamW;
- `nequip-compile`: the same with `compile_mode: compile`;
- `lightning`: one trial of tunebench's lightning engine, alone;
- `processes`: lightning engines that share the device, one trial and one thread each, for each of `--processes`;
- `cohort`: one cohort for each of `--slots`, once with AdamW in all slots and once with five optimizers in turn.

tunebench evaluates two readouts, NequIP one. A rate counts the trial-steps between two evaluations over the time
between them, from the first evaluation after the warm-up on, for `--seconds`. Start-up is what comes before: seconds to
the first step, the imports of `nequip-train`'s process and a cohort's first evaluation included. Each cell is a line of
OUT/throughput.csv as soon as it is measured and is not measured again, so a stopped command is continued by the same
command; OUT/cache keeps traces and compiled graphs.

    python benchmarks/throughput.py --device cuda --models nequip-small,allegro --slots 1 32 --out OUT --json FILE
    python benchmarks/throughput.py --device cpu --models tiny-nequip --slots 1 16 --ways lightning,cohort
"""

from __future__ import annotations

import argparse
import csv
import faulthandler
import gc
import itertools
import json
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, fields, replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
import yaml
from nequip.data import AtomicDataDict
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from tunebench.engine.batches import task_frames
from tunebench.engine.cohort import Cohort
from tunebench.engine.lightning import run_trial
from tunebench.engine.loss import LossWeights, weighted_loss
from tunebench.engine.nequip_config import plain_nequip_config, training_module
from tunebench.engine.task import Evaluation, Seeds, TrialTask
from tunebench.study.installed import shipped_folder
from tunebench.study.plan import trial_seeds
from tunebench.study.record import Readout, Reason, Split, Stage, TrialKey
from tunebench.study.resolve import resolve
from tunebench.study.search_space import SearchSpace
from tunebench.study.seeds import named_seed
from tunebench.study.spec import Arm, Family, Model, Study, StudyError
from tunebench.workloads.data import PreparedData, prepare
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.models import build_model

MODELS: dict[str, tuple[Family, str, dict[str, Any]]] = {
    "nequip-small": (Family.NEQUIP, "small", {"num_layers": 3, "l_max": 1, "num_features": 32, "parity": False}),
    "nequip-4layer": (
        Family.NEQUIP,
        "small",
        {"num_layers": 4, "l_max": 2, "num_features": [64, 32, 32], "parity": False},
    ),
    "allegro": (
        Family.ALLEGRO,
        "small",
        {"num_layers": 2, "l_max": 2, "num_scalar_features": 64, "num_tensor_features": 32},
    ),
    "tiny-nequip": (Family.NEQUIP, "tiny", {}),
    "tiny-allegro": (Family.ALLEGRO, "tiny", {}),
}
"""Family, preset and arguments; NequIP with 32 features and 3 layers, 64/32/32 and 4 layers; Allegro with 64/32."""

STUDIES = {"ethanol": "quickstart.yaml", "threebpa": "threebpa.yaml"}
WAYS = ("lightning", "nequip", "nequip-compile", "processes", "cohort")
MIX = ("adamw", "schedule_free", "muon", "soap", "soap_muon")
PROCESSES = {"cpu": [1, 2], "cuda": [1, 4, 8, 16]}
PEAK_TFLOPS = {"cpu": math.nan, "cuda": 67.0}  # an H200's float32 without tensor cores

_WARM_UP = 30  # refreshes come every tenth step, and a graph is captured at the second step of its kind
_WINDOWS = 3
_GRACE_S = 10.0


@dataclass(frozen=True)
class Cell:
    """What is measured.

    Attributes:
        trials: side by side: slots, processes, or 1.
        optimizers: ``adamw`` in all trials, or ``mixed``.
        compiled: whether a cohort compiles its step; `nequip-compile` always does.
        round: of the whole benchmark.
    """

    model: str
    batch_size: int
    way: str
    trials: int
    optimizers: str
    compiled: bool
    round: int

    @property
    def name(self) -> str:
        """For a line of text, without the round."""
        many = f" x {self.trials}" if self.way in ("processes", "cohort") else ""
        mixed = " mixed" if self.optimizers == "mixed" else ""
        plain = " not compiled" if self.way == "cohort" and not self.compiled else ""
        return f"{self.way}{many}{mixed}{plain}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a way returns of a cell.

    Attributes:
        stamps: trial-steps so far and the time, s, at each evaluation from the end of the warm-up on.
        start_up_s: seconds to the first step.
        memory_gib: peak of the memory allocated on the device, without its contexts; on the CPU, of the processes.
        reserved_gib: peak of what torch holds on the device, graphs' own pools included.
        waste_atoms, waste_edges: share of a mean batch that is padding.
    """

    stamps: tuple[tuple[float, float], ...]
    start_up_s: float
    memory_gib: float
    reserved_gib: float
    waste_atoms: float = 0.0
    waste_edges: float = 0.0


@dataclass(frozen=True)
class Row:
    """A line of the csv; NaN where the cell failed.

    Attributes:
        setting: device, versions, data and evaluations, alike in all rows of a file.
        rate: trial-steps per second, the median of up to three windows. slowest, fastest: of the windows.
        steps: trial-steps in the windows.
        gflop: floating-point operations of the matrix products of one step of one trial, padding left out.
        failure: one line; empty where there is none.
    """

    setting: str
    model: str
    batch_size: int
    way: str
    trials: int
    optimizers: str
    compiled: bool
    round: int
    rate: float = math.nan
    slowest: float = math.nan
    fastest: float = math.nan
    steps: float = math.nan
    start_up_s: float = math.nan
    memory_gib: float = math.nan
    reserved_gib: float = math.nan
    waste_atoms: float = math.nan
    waste_edges: float = math.nan
    gflop: float = math.nan
    failure: str = ""

    @property
    def cell(self) -> Cell:
        """What was measured."""
        return Cell(**{field.name: getattr(self, field.name) for field in fields(Cell)})


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What all cells of a command share.

    Attributes:
        seconds, periods: of steady state: whole evaluation periods, until the time is over or, if given, so many.
        horizon: steps of a trial, seldom reached.
        profiles: folder for profiles of the cohorts; None makes none.
        patience_s: a cell that takes longer is given up.
        threads: of every way but `processes`.
    """

    study: Study
    data: PreparedData
    device: str
    threads: int
    evaluate_every: int
    horizon: int
    cache: Path
    seconds: float = math.inf
    periods: int | None = None
    patience_s: float = math.inf
    profiles: Path | None = None


class CellFailed(Exception):
    """A cell could not be measured, in one line."""


def make_task(
    setup: Setup, cell: Cell, index: int, run: Path, evaluation_steps: Sequence[int] | None = None
) -> TrialTask:
    """A trial of a cell; trials differ in their order of batches and, in a mix, their optimizer.

    Without `evaluation_steps` it is evaluated after the first step, after the warm-up and then in each period.
    """
    optimizer = MIX[index % len(MIX)] if cell.optimizers == "mixed" else "adamw"
    space = SearchSpace.load(optimizer)
    workload = setup.study.workloads[0]
    family, preset, arguments = MODELS[cell.model]
    model = Model(family=family, preset=preset, arguments=arguments, r_max_angstrom=workload.model.r_max_angstrom)
    changed = {"model": model, "batch_size": cell.batch_size, "max_steps": setup.horizon}
    seeds = trial_seeds(setup.study.seed, workload.name, Stage.TUNE, 0)
    return TrialTask(
        key=TrialKey(workload=workload.name, optimizer=optimizer, stage=Stage.TUNE, config_index=index, seed_index=0),
        workload=workload.model_copy(update={**changed, "evaluate_every_steps": None}),
        data=setup.data,
        hyperparameters=space.defaults(),
        averaged=Readout(space.readout),
        schedule=space.schedule_of(Arm(name=optimizer), setup.study.schedule),
        objective=setup.study.objective,
        seeds=Seeds(**{**seeds, "order": named_seed(setup.study.seed, "throughput order", index)}),
        evaluation_steps=tuple(evaluation_steps or (1, *range(_WARM_UP, setup.horizon + 1, setup.evaluate_every))),
        run=run,
        device=setup.device,
        threads=1 if cell.way == "processes" else setup.threads,
        treats=space.treats,
    )


class Stopwatch:
    """Time stamps of tunebench's engines at their evaluations.

    Args:
        setup: says for how long.
        barrier: where processes wait for each other at the end of the warm-up.
    """

    def __init__(self, setup: Setup, barrier: Barrier | None = None) -> None:
        self._setup, self._barrier = setup, barrier
        self._began = time.monotonic()
        self._start_up_s = math.nan
        self._stamps: list[tuple[float, float]] = []
        if setup.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def report(self, evaluation: Evaluation) -> None:
        """Receive a report of a single trial; SystemExit once there is enough."""
        if self.over([evaluation]):
            raise SystemExit

    def over(self, evaluations: Sequence[Evaluation]) -> bool:
        """Note the reports of trials that step together; whether there is enough.

        Raises:
            CellFailed: a trial has ended.
        """
        for evaluation in evaluations:
            if evaluation.outcome not in (None, Reason.FINISHED):
                raise CellFailed(f"a trial ended {evaluation.outcome} at step {evaluation.step} {evaluation.message}")
        step = evaluations[0].step
        if step == 1:
            self._start_up_s = _now(self._setup.device) - self._began
        elif step == _WARM_UP and self._barrier is not None:
            self._barrier.wait(self._setup.patience_s)
        if step >= _WARM_UP:
            self._stamps.append((float(sum(e.step for e in evaluations)), _now(self._setup.device)))
        at_horizon = step == self._setup.horizon
        return at_horizon or enough(self._stamps, self._setup.seconds, self._setup.periods)

    def measured(self) -> Measured:
        """All that was seen, and this process's peak memory."""
        allocated, reserved = peak_memory_gib(self._setup.device)
        return Measured(
            stamps=tuple(self._stamps), start_up_s=self._start_up_s, memory_gib=allocated, reserved_gib=reserved
        )


def enough(stamps: Sequence[tuple[float, float]], seconds: float, periods: int | None) -> bool:
    """Whether the steady state has lasted long enough."""
    if periods is not None:
        return len(stamps) > periods
    return len(stamps) > 1 and stamps[-1][1] - stamps[0][1] >= seconds


def _now(device: str) -> float:
    """A clock that all processes share, after the device has done what it was told to."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()


def peak_memory_gib(device: str) -> tuple[float, float]:
    """Peak of allocated and of reserved memory of this process, GiB; both its resident set on the CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    return resident, resident


# --- the ways --------------------------------------------------------------------------------------------------------


def train_lightning(setup: Setup, cell: Cell, index: int = 0, barrier: Barrier | None = None) -> Measured:
    """One trial of the lightning engine in this process."""
    watch = Stopwatch(setup, barrier)
    with tempfile.TemporaryDirectory() as folder, suppress(SystemExit):  # there is enough
        run_trial(make_task(setup, cell, index, Path(folder)), watch.report)
    return watch.measured()


def train_cohort(setup: Setup, cell: Cell) -> Measured:
    """One cohort in this process, all slots taken."""
    torch.set_num_threads(setup.threads)
    watch = Stopwatch(setup)
    with tempfile.TemporaryDirectory() as folder:
        tasks = [make_task(setup, cell, index, Path(folder)) for index in range(cell.trials)]
        cohort = Cohort(tasks[0], cell.trials, cache=setup.cache, compiled=cell.compiled)
        for task in tasks:
            cohort.join(task)
        while not watch.over(_next_reports(cohort)):
            pass
        measured = watch.measured()
        if setup.profiles is not None:
            write_profile(
                cohort, setup, setup.profiles / f"{cell.model}-{cell.batch_size}-{cell.name.replace(' ', '-')}.txt"
            )
        for name in cohort.trials:
            cohort.leave(name)
    waste = cohort.padding.usual_waste
    return replace(measured, waste_atoms=waste.atoms, waste_edges=waste.edges)


def _next_reports(cohort: Cohort) -> list[Evaluation]:
    reports = cohort.advance()
    for name in cohort.trials:
        cohort.go_on(name)
    return [report for _, report in reports]


def write_profile(cohort: Cohort, setup: Setup, path: Path) -> None:
    """What a cohort's time goes to from one evaluation to the next, by kernel or operation."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    by = "self_cpu_time_total"
    if setup.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        by = "self_device_time_total"
    began = _now(setup.device)
    with torch.profiler.profile(activities=activities) as profiled:
        _next_reports(cohort)
        seconds = _now(setup.device) - began
    found = profiled.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{seconds:.3f} s for {setup.evaluate_every} steps and an evaluation\n{found}\n", encoding="utf-8")


def train_nequip(setup: Setup, cell: Cell) -> Measured:
    """One trial by NequIP's own command, in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stamps = folder / "stamps.json"
        (folder / "config.yaml").write_text(yaml.safe_dump(nequip_config(setup, cell, stamps)), encoding="utf-8")
        found = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(setup.threads),
            "PYTHONPATH": os.pathsep.join(path for path in found if path),
        }
        command = [sys.executable, "-m", "nequip.scripts.train", "-cp", name, "-cn", "config"]
        began = time.monotonic()
        try:
            ended = subprocess.run(
                command, cwd=name, env=environment, capture_output=True, text=True, timeout=setup.patience_s
            )
        except subprocess.TimeoutExpired as error:
            raise CellFailed(f"nothing after {setup.patience_s:g} s") from error
        if ended.returncode or not stamps.exists():
            said = ended.stderr.strip().splitlines() or ["no message"]
            raise CellFailed(f"nequip-train, status {ended.returncode}: {said[-1]}")
        noted = json.loads(stamps.read_text(encoding="utf-8"))
    return Measured(
        stamps=tuple((step, moment) for step, moment in noted["stamps"]),
        start_up_s=noted["first_step"] - began,
        memory_gib=noted["memory_gib"],
        reserved_gib=noted["reserved_gib"],
    )


def nequip_config(setup: Setup, cell: Cell, stamps: Path) -> dict[str, Any]:
    """The plain config of a cell's trial, with torch's own AdamW and a clock."""
    config = plain_nequip_config(make_task(setup, cell, 0, stamps.parent), setup.evaluate_every)
    config["training_module"]["optimizer"]["_target_"] = "torch.optim.AdamW"
    if cell.way == "nequip-compile":
        config["training_module"]["model"]["compile_mode"] = "compile"
    clock = {
        "_target_": "throughput.StepClock",
        "file": str(stamps),
        "device": setup.device,
        "seconds": setup.seconds,
        "periods": setup.periods,
    }
    logger = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(stamps.parent)}
    config["trainer"] |= {"callbacks": [clock], "logger": logger}
    plain: dict[str, Any] = json.loads(json.dumps(config))  # tuples are nothing for safe YAML
    return plain


class StepClock(lightning.Callback):
    """Lightning callback of `nequip-train`: notes the time at each evaluation, and stops the training.

    Args:
        file: JSON file that it writes at the end.
        device: ``cpu`` or ``cuda``.
        seconds, periods: as `Setup`'s.
    """

    def __init__(self, file: str, device: str, seconds: float, periods: int | None) -> None:
        self._file, self._device = Path(file), device
        self._seconds, self._periods = seconds, periods
        self._first_step = math.nan
        self._stamps: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the end of the first step."""
        if trainer.global_step == 1:
            self._first_step = _now(self._device)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note an evaluation; stop after the last."""
        if not trainer.should_stop:
            self._stamps.append((trainer.global_step, _now(self._device)))
            trainer.should_stop = enough(self._stamps, self._seconds, self._periods)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what was noted."""
        allocated, reserved = peak_memory_gib(self._device)
        noted = {"stamps": self._stamps, "first_step": self._first_step, "memory_gib": allocated}
        self._file.write_text(json.dumps({**noted, "reserved_gib": reserved}), encoding="utf-8")


def train_processes(setup: Setup, cell: Cell) -> Measured:
    """Lightning engines in processes of their own, in step at the end of their warm-up."""
    barrier = multiprocessing.get_context("spawn").Barrier(cell.trials)
    with workers(cell.trials, setup.patience_s, barrier) as started:
        for index, worker in enumerate(started):
            worker.submit(train_lightning, setup, cell, index)
        found = [worker.result() for worker in started]
    return Measured(
        stamps=common_stamps([measured.stamps for measured in found]),
        start_up_s=max(measured.start_up_s for measured in found),
        memory_gib=sum(measured.memory_gib for measured in found),
        reserved_gib=sum(measured.reserved_gib for measured in found),
    )


def common_stamps(of_processes: Sequence[Sequence[tuple[float, float]]]) -> tuple[tuple[float, float], ...]:
    """Steps of all processes together at the evaluations of the first one, while all of them train."""
    begin = max(stamps[0][1] for stamps in of_processes)
    end = min(stamps[-1][1] for stamps in of_processes)
    moments = [begin, *(moment for _, moment in of_processes[0] if begin < moment < end), end]
    steps = sum(np.interp(moments, [t for _, t in stamps], [n for n, _ in stamps]) for stamps in of_processes)
    return tuple(zip(np.asarray(steps).tolist(), moments, strict=True))


def flops(setup: Setup, cell: Cell) -> float:
    """Floating-point operations of one training step's matrix products, forces and both backward passes included.

    Counted on the eager model without padding, by torch's own formulas, which know no elementwise operations.
    """
    task = make_task(setup, cell, 0, Path())
    model = build_model(training_module(task)["model"])
    frames = task_frames(task, Split.TRAIN)
    batch = AtomicDataDict.batched_from_list([frames[index] for index in range(cell.batch_size)])
    with _FlopCounter() as counter:  # type: ignore[no-untyped-call]
        loss = weighted_loss(model(dict(batch)), batch, LossWeights.of(task.workload.loss))
        torch.autograd.backward(loss)
    return float(counter.total)


class _FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What `FlopCounterMode` counts, without its hooks on modules, which refuse the derivative inside the model."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=found)
        return found


# --- processes -------------------------------------------------------------------------------------------------------


class Worker:
    """A process that measures what it is told to, one thing after another.

    Args:
        patience_s: seconds that one thing may take.
        barrier: handed to everything that it runs.
    """

    def __init__(self, patience_s: float, barrier: Barrier | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._patience_s = patience_s
        self._busy = False
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, barrier, patience_s), daemon=True)
        self._process.start()
        theirs.close()

    def submit(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin."""
        self._busy = True
        self._ours.send((function, arguments))

    def result(self) -> Any:
        """Wait for what was submitted.

        Raises:
            CellFailed: it raised, took too long, or its process died.
        """
        if not self._ours.poll(self._patience_s):
            raise CellFailed(f"nothing after {self._patience_s:g} s")
        try:
            done, found = self._ours.recv()
        except EOFError as error:
            self._process.join()
            raise CellFailed(f"its process died, status {self._process.exitcode}") from error
        self._busy = False
        if not done:
            raise CellFailed(found)
        return found

    def close(self) -> None:
        """End the process, whatever it does."""
        with suppress(OSError):  # it may be dead
            self._ours.send(None)
        self._process.join(0.0 if self._busy else _GRACE_S)
        self._process.kill()
        self._process.join()


@contextmanager
def workers(count: int, patience_s: float, barrier: Barrier | None = None) -> Iterator[list[Worker]]:
    """Fresh processes, which end with the block."""
    started = [Worker(patience_s, barrier) for _ in range(count)]
    try:
        yield started
    finally:
        for worker in started:
            worker.close()


def _serve(pipe: Any, barrier: Barrier | None, patience_s: float) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    shared = {} if barrier is None else {"barrier": barrier}
    while (order := pipe.recv()) is not None:
        function, arguments = order
        faulthandler.dump_traceback_later(patience_s)  # says where a cell stood that is about to be given up
        try:
            answer = True, function(*arguments, **shared)
        except Exception as error:  # becomes the cell's failure
            answer = False, one_line(error)
        faulthandler.cancel_dump_traceback_later()
        gc.collect()  # captured graphs keep device memory that the next cell needs
        torch.cuda.empty_cache()
        pipe.send(answer)


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def one_line(error: Exception) -> str:
    """What went wrong, without line breaks."""
    said = (str(error).strip() or "no message").splitlines()[0]
    return said if isinstance(error, CellFailed) else f"{type(error).__name__}: {said}"


# --- cells -----------------------------------------------------------------------------------------------------------


def cells(arguments: argparse.Namespace) -> list[Cell]:
    """What the command asks for, round by round; a mix needs a slot for each of its optimizers."""
    found = []
    every = itertools.product(range(arguments.rounds), arguments.models, arguments.batch_sizes, arguments.ways)
    for number, model, batch_size, way in every:
        if way == "cohort":
            kinds = itertools.product(arguments.slots, arguments.optimizers, arguments.compiled)
            shapes = [kind for kind in kinds if kind[1] != "mixed" or kind[0] >= len(MIX)]
        else:
            counts = arguments.processes if way == "processes" else [1]
            shapes = [(count, "adamw", way == "nequip-compile") for count in counts]
        found += [Cell(model, batch_size, way, *shape, number) for shape in shapes]
    return found


def run_cells(wanted: Iterable[Cell], setup: Setup, setting: str, file: Path, stop: float) -> None:
    """Measure what the csv lacks, until the time is over."""
    done = {row.cell for row in read_rows(file) if not row.failure}
    own = OwnWorker(setup)
    counted: dict[tuple[str, int], float] = {}
    for cell in (cell for cell in wanted if cell not in done):
        if time.monotonic() > stop:
            print(f"time is over before {cell.model}, batch {cell.batch_size}: {cell.name}")
            break
        named = dict(zip((field.name for field in fields(Cell)), astuple(cell), strict=True))
        row = Row(setting=setting, **named)
        try:
            shape = cell.model, cell.batch_size
            if shape not in counted:
                counted[shape] = own.run(flops, setup, cell) / 1e9
            row = summarised(row, _measure(setup, cell, own), counted[shape])
        except CellFailed as error:
            row = replace(row, failure=one_line(error))
        append_row(file, row)
    own.close()


def _measure(setup: Setup, cell: Cell, own: OwnWorker) -> Measured:
    if cell.way in ("nequip", "nequip-compile"):
        return train_nequip(setup, cell)
    if cell.way == "processes":
        return train_processes(setup, cell)
    found: Measured = own.run(train_cohort if cell.way == "cohort" else train_lightning, setup, cell)
    return found


class OwnWorker:
    """The process of cells that need one: on CUDA the same as long as none fails; on the CPU fresh, for its memory."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._worker: Worker | None = None

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call it there.

        Raises:
            CellFailed: as `Worker.result`.
        """
        if self._worker is None:
            self._worker = Worker(self._setup.patience_s)
        keep = False
        try:
            self._worker.submit(function, *arguments)
            found = self._worker.result()
            keep = self._setup.device == "cuda"
        finally:
            if not keep:
                self.close()
        return found

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


def summarised(row: Row, measured: Measured, gflop: float) -> Row:
    """The row of a cell that was measured.

    Raises:
        CellFailed: there is no time between two evaluations.
    """
    if len(measured.stamps) < 2:
        raise CellFailed(f"found {len(measured.stamps)} evaluation(s) after the warm-up, allowed: at least 2")
    rates = window_rates(measured.stamps)
    return replace(
        row,
        rate=statistics.median(rates),
        slowest=min(rates),
        fastest=max(rates),
        steps=measured.stamps[-1][0] - measured.stamps[0][0],
        start_up_s=measured.start_up_s,
        memory_gib=measured.memory_gib,
        reserved_gib=measured.reserved_gib,
        waste_atoms=measured.waste_atoms,
        waste_edges=measured.waste_edges,
        gflop=gflop,
    )


def window_rates(stamps: Sequence[tuple[float, float]]) -> list[float]:
    """Steps per second of up to three windows that together make up the whole time, each of whole evaluations."""
    intervals = len(stamps) - 1
    edges = np.linspace(0, intervals, min(_WINDOWS, intervals) + 1).round().astype(int).tolist()
    pairs = [(stamps[i], stamps[j]) for i, j in itertools.pairwise(edges)]
    return [(last[0] - first[0]) / (last[1] - first[1]) for first, last in pairs]


def append_row(file: Path, row: Row) -> None:
    """Add a line to the csv, and print it."""
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        if new:
            writer.writerow(field.name for field in fields(Row))
        writer.writerow(astuple(row))
    said = row.failure or f"{row.rate:.4g} trial-steps/s, start-up {row.start_up_s:.1f} s, {row.memory_gib:.2f} GiB"
    print(f"{row.model}, batch {row.batch_size}, {row.cell.name}: {said}", flush=True)


def read_rows(file: Path) -> list[Row]:
    """What a csv holds; nothing where there is none."""
    if not file.exists():
        return []
    text = {"setting", "model", "way", "optimizers", "failure"}
    kinds: dict[str, Callable[[str], Any]] = {field.name: float for field in fields(Row) if field.name not in text}
    kinds |= dict.fromkeys(text, str) | dict.fromkeys(("batch_size", "trials", "round"), int)
    kinds["compiled"] = "True".__eq__
    with file.open(newline="", encoding="utf-8") as stream:
        return [Row(**{name: kinds[name](value) for name, value in line.items()}) for line in csv.DictReader(stream)]


# --- results ---------------------------------------------------------------------------------------------------------


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row per cell: medians over the rounds, the spread over all windows, the start-up of the first round.

    In the order of `MODELS` and `WAYS`, whatever was measured first.
    """
    rounds: dict[Cell, list[Row]] = {}
    for row in rows:
        rounds.setdefault(replace(row.cell, round=0), []).append(row)
    found = []
    for group in rounds.values():
        good = [row for row in group if not row.failure]
        if not good:
            found.append(group[-1])
            continue
        found.append(
            replace(
                good[0],
                round=0,
                rate=statistics.median(row.rate for row in good),
                slowest=min(row.slowest for row in good),
                fastest=max(row.fastest for row in good),
                memory_gib=max(row.memory_gib for row in good),
                reserved_gib=max(row.reserved_gib for row in good),
            )
        )
    return sorted(found, key=_place)


def _place(row: Row) -> tuple[int, int, int, int, str, bool]:
    models = list(MODELS)
    return models.index(row.model), row.batch_size, WAYS.index(row.way), row.trials, row.optimizers, row.compiled


def ratios(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Each cohort's rate over those of the other ways with the same model and batch size; None where one is lacking.

    ``mixed_over_adamw`` is the time per step of a mix over that of AdamW alone, lower is better.
    """
    found = []
    for row in rows:
        if row.way != "cohort" or row.failure:
            continue
        beside = [r for r in rows if (r.model, r.batch_size) == (row.model, row.batch_size) and not r.failure]
        best = {way: max((r.rate for r in beside if r.way == way), default=math.nan) for way in WAYS[:-1]}
        alone = replace(row.cell, optimizers="adamw")
        pure = next((r.rate for r in beside if r.cell == alone), math.nan)
        entry: dict[str, Any] = {name: getattr(row, name) for name in ("model", "batch_size", "trials", "optimizers")}
        entry |= {"compiled": row.compiled, "trial_steps_per_s": row.rate}
        entry |= {f"cohort_vs_{way.replace('-', '_')}": _ratio(row.rate, rate) for way, rate in best.items()}
        entry["mixed_over_adamw"] = _ratio(pure, row.rate) if row.optimizers == "mixed" else None
        found.append(entry)
    return found


def _ratio(over: float, under: float) -> float | None:
    return over / under if math.isfinite(over / under) else None


def headline(found: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The ratios of one cohort: of the first model and batch size, with the most slots, the faster of its forms.

    Those over the other ways are of AdamW alone, which is what the other ways train.
    """
    names = [name for name in (found[0] if found else {}) if name.startswith("cohort_vs_")]
    lead: dict[str, float | None] = dict.fromkeys([*names, "mixed_over_adamw"])
    if not found:
        return lead
    first = [e for e in found if (e["model"], e["batch_size"]) == (found[0]["model"], found[0]["batch_size"])]
    for optimizers, wanted in (("adamw", names), ("mixed", ["mixed_over_adamw"])):
        own = [e for e in first if e["optimizers"] == optimizers]
        if own:
            chosen = max(own, key=lambda e: (e["trials"], e["trial_steps_per_s"]))
            lead |= {name: chosen[name] for name in wanted}
    return lead


def table(rows: Sequence[Row], peak_tflops: float) -> str:
    """Markdown: a row per cell."""
    head = (
        "| model | batch | way | trial-steps/s | slowest to fastest window | ms per step of all | start-up s "
        "| memory GiB | reserved GiB | padding, atoms | edges | GFLOP per trial-step | TFLOP/s | of peak |"
    )
    lines = [head, "|---|---:|---|" + "---:|" * 11]
    for row in rows:
        begin = f"| {row.model} | {row.batch_size} | {row.cell.name} |"
        if row.failure:
            lines.append(f"{begin} failed: {row.failure} |" + " |" * 10)
            continue
        tflops = row.gflop * row.rate / 1e3
        rest = [
            f"{row.rate:.4g}",
            f"{row.slowest:.4g} to {row.fastest:.4g}",
            f"{1e3 * row.trials / row.rate:.2f}",
            f"{row.start_up_s:.1f}",
            f"{row.memory_gib:.2f}",
            f"{row.reserved_gib:.2f}",
            f"{row.waste_atoms:.1%}",
            f"{row.waste_edges:.1%}",
            f"{row.gflop:.3f}",
            f"{tflops:.4f}",
            "-" if math.isnan(peak_tflops) else f"{tflops / peak_tflops:.2%}",
        ]
        lines.append(f"{begin} {' | '.join(rest)} |")
    return "\n".join(lines)


def ratio_lines(found: Sequence[dict[str, Any]]) -> str:
    """The comparisons that the benchmark exists for, a line each."""
    lines = []
    for entry in found:
        mixed, plain = entry["optimizers"] == "mixed", not entry["compiled"]
        name = f"cohort x {entry['trials']}{' mixed' if mixed else ''}{' not compiled' if plain else ''}"
        over = [
            f"{key.removeprefix('cohort_vs_').replace('_', '-')} {value:.2f}"
            for key, value in entry.items()
            if key.startswith("cohort_vs_") and value is not None
        ]
        line = f"{entry['model']}, batch {entry['batch_size']}: {name} over {', '.join(over) or 'nothing measured'}"
        if entry["mixed_over_adamw"] is not None:
            line += f"; a step takes {entry['mixed_over_adamw']:.2f} times as long as with AdamW alone"
        lines.append(line)
    return "\n".join(lines)


def draw(rows: Sequence[Row], title: str, path: Path) -> None:
    """Trial-steps per second by way on a logarithmic axis: a column per model, a row per batch size."""
    import matplotlib as mpl  # not needed by the processes that are timed

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    models = list(dict.fromkeys(row.model for row in rows))
    sizes = list(dict.fromkeys(row.batch_size for row in rows))
    most = max(sum((r.model, r.batch_size) == (m, s) for r in rows) for m in models for s in sizes)
    size = (5.2 * len(models), (0.8 + 0.28 * most) * len(sizes) + 0.6)
    figure, axes = plt.subplots(len(sizes), len(models), figsize=size, squeeze=False)
    for (line, batch_size), (column, model) in itertools.product(enumerate(sizes), enumerate(models)):
        axis = axes[line][column]
        shown = [r for r in rows if (r.model, r.batch_size) == (model, batch_size) and not r.failure][::-1]
        colours = ["#0072b2" if row.way == "cohort" else "#999999" for row in shown]
        spread = np.array([[row.rate - row.slowest, row.fastest - row.rate] for row in shown]).reshape(-1, 2).T
        axis.barh(
            [row.cell.name for row in shown],
            [row.rate for row in shown],
            color=colours,
            xerr=spread.clip(0),
            error_kw={"elinewidth": 0.8},
        )
        for place, row in enumerate(shown):
            rate = f"{row.rate:,.0f}" if row.rate >= 100 else f"{row.rate:.3g}"
            axis.text(row.fastest, place, f" {rate}", va="center", fontsize=8)
        axis.set(title=f"{model}, batch {batch_size}", xlabel="trial-steps per second")
        if shown:
            axis.set_xscale("log")
            axis.set_xlim(right=3 * max(row.fastest for row in shown))  # room for the numbers
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write_results(rows: Sequence[Row], arguments: argparse.Namespace, setting: str, out: Path) -> None:
    """Print table and ratios; write them, the plot and the JSON."""
    found = ratios(rows)
    peak = arguments.peak_tflops
    about = f"{setting}, float32; peak {'not given' if math.isnan(peak) else f'{peak:g} TFLOP/s'}"
    text = "\n\n".join(part for part in (about, table(rows, peak), ratio_lines(found)) if part)
    print(text)
    (out / "throughput.md").write_text(text + "\n", encoding="utf-8")
    draw(rows, about, out / "throughput.png")
    if arguments.json:
        content = {"setting": setting, **headline(found), "ratios": found}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- the command -----------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """The command line; lists take blanks or commas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", choices=list(STUDIES), default="ethanol", help="threebpa needs TUNEBENCH_DATA")
    parser.add_argument("--models", nargs="+", default=["nequip-small", "nequip-4layer", "allegro"])
    parser.add_argument("--batch-sizes", nargs="+", default=["5", "32"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--slots", nargs="+", default=["1", "8", "32", "128"])
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "mixed"], help="of the cohorts")
    parser.add_argument("--compiled", nargs="+", default=["0", "1"], help="cohorts without and with Inductor")
    parser.add_argument("--processes", nargs="+", help="per device; left out, 1 2 on the CPU, 1 4 8 16 on CUDA")
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps")
    parser.add_argument("--seconds", type=float, default=8.0, help="of steady state per cell; whole evaluations")
    parser.add_argument("--steps", type=int, help="per trial and cell in place of --seconds, rounded up to evaluations")
    parser.add_argument("--horizon", type=int, default=10_000, help="steps that a trial has at most")
    parser.add_argument("--rounds", type=int, default=1, help="of everything; medians count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every way but processes")
    parser.add_argument("--peak-tflops", type=float, help="of the device; left out, 67 on CUDA (H200, float32)")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds that a cell may take")
    parser.add_argument("--time-limit", type=float, default=math.inf, help="seconds after which no cell starts")
    parser.add_argument("--out", type=Path, help="folder of throughput.{csv,md,png} and the cache")
    parser.add_argument("--profile", action="store_true", help="write OUT/profiles, a file for each cohort")
    parser.add_argument("--json", type=Path, help="file for the ratios")
    arguments = parser.parse_args()
    if arguments.profile and arguments.out is None:
        parser.error("--profile: found no --out, allowed: a folder for the profiles")
    arguments.processes = arguments.processes or list(map(str, PROCESSES[arguments.device]))
    if arguments.peak_tflops is None:
        arguments.peak_tflops = PEAK_TFLOPS[arguments.device]
    for name, allowed in (("models", MODELS), ("ways", WAYS), ("optimizers", ("adamw", "mixed"))):
        setattr(arguments, name, _listed(parser, f"--{name}", getattr(arguments, name), allowed))
    arguments.compiled = [value == "1" for value in _listed(parser, "--compiled", arguments.compiled, ("0", "1"))]
    for name in ("batch_sizes", "slots", "processes"):
        numbers = _listed(parser, f"--{name.replace('_', '-')}", getattr(arguments, name))
        setattr(arguments, name, [int(number) for number in numbers])
    return arguments


def _listed(
    parser: argparse.ArgumentParser, option: str, given: Sequence[str], allowed: Iterable[str] | None = None
) -> list[str]:
    values = [value for text in given for value in text.split(",") if value]
    for value in values:
        if allowed is None and not (value.isdecimal() and int(value)):
            parser.error(f"{option}: found {value}, allowed: numbers above 0")
        if allowed is not None and value not in allowed:
            parser.error(f"{option}: found {value}, allowed: {', '.join(allowed)}")
    return values


def bare_setup(arguments: argparse.Namespace, **own: Any) -> Setup:
    """Data, device and threads of a command line, here and in benchmarks that time for themselves.

    Args:
        arguments: with `data`, `device` and `threads`.
        own: the other fields of `Setup`.

    Raises:
        StudyError, WorkloadError: no data.
    """
    study = resolve(shipped_folder("studies") / STUDIES[arguments.data]).study
    data = prepare(study.workloads[0].data, progress=print)
    return Setup(study=study, data=data, device=arguments.device, threads=arguments.threads, **own)


def make_setup(arguments: argparse.Namespace, out: Path) -> Setup:
    """The data of the study, and what the command says.

    Raises:
        StudyError, WorkloadError: no data.
    """
    every = arguments.evaluate_every
    periods = max((arguments.horizon - _WARM_UP) // every, 1)  # the horizon is an evaluation
    return bare_setup(
        arguments,
        evaluate_every=every,
        seconds=arguments.seconds,
        horizon=_WARM_UP + periods * every,
        patience_s=arguments.patience,
        cache=out / "cache",
        profiles=out / "profiles" if arguments.profile else None,
        periods=None if arguments.steps is None else max(-(-arguments.steps // every), 1),
    )


def describe(arguments: argparse.Namespace, setup: Setup) -> str:
    """What all rows of a file have in common."""
    where = f"CPU, {setup.threads} thread(s)" if setup.device == "cpu" else torch.cuda.get_device_name()
    splits = setup.data.splits
    frames = f"{splits[Split.TRAIN].frames} training and {splits[Split.VAL].frames} validation frames"
    every = f"evaluation every {setup.evaluate_every} steps"
    return f"{where}, torch {torch.__version__}, {arguments.data} ({frames}), {every}"


def main() -> None:
    """Measure what is left to measure, then print and write the results."""
    arguments = parse_arguments()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        file = out / "throughput.csv"
        setup = make_setup(arguments, out)
        setting = describe(arguments, setup)
        if others := {row.setting for row in read_rows(file)} - {setting}:
            raise StudyError(file, "setting", others.pop(), f"{setting}; another --out starts anew")
        wanted = cells(arguments)
        run_cells(wanted, setup, setting, file, began + arguments.time_limit)
        rows = merged(read_rows(file))
        if rows:
            write_results(rows, arguments, setting, out)


if __name__ == "__main__":
    try:
        main()
    except (StudyError, WorkloadError) as error:
        sys.exit(str(error))
