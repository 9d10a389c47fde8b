"""Seconds from the start of a process to the first step of its cohort, cold and from a warm cache.

Each model's first process has an empty cache of traces and compiled graphs, and its second one finds what the first has
left. The data are prepared before. A cohort compiles its evaluation when it first evaluates, after the first step.

    python benchmarks/first_step.py --device cuda --data threebpa --models nequip-4layer --slots 32 --json FILE
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import throughput
from tunebench.engine.cohort import Cohort
from tunebench.engine.graphs import synchronize

_HORIZON = 10


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Seconds, one after the other.

    Attributes:
        process: to start it, imports included. cohort: data to the device, the model. joins: of all trials.
        step: the first one, with what it traces, compiles, checks and times.
        evaluation: the second step and the first evaluation after it, of two readouts.
    """

    process: float
    cohort: float
    joins: float
    step: float
    evaluation: float

    @property
    def to_first_step(self) -> float:
        """All but the evaluation."""
        return self.process + self.cohort + self.joins + self.step


def first_step(setup: throughput.Setup, cell: throughput.Cell, began: float) -> Parts:
    """In a fresh process; `began` is the parent's monotonic clock when it started this one."""
    logging.basicConfig(format="  %(message)s")
    logging.getLogger("tunebench.engine").setLevel(logging.INFO)
    torch.set_num_threads(setup.threads)
    device = torch.device(setup.device)
    stamps = [began, time.monotonic()]

    def stamp() -> None:
        synchronize(device)
        stamps.append(time.monotonic())

    with tempfile.TemporaryDirectory() as folder:
        steps = (2, setup.horizon)
        tasks = [throughput.make_task(setup, cell, index, Path(folder), steps) for index in range(cell.trials)]
        cohort = Cohort(tasks[0], cell.trials, cache=setup.cache, compiled=cell.compiled)
        stamp()
        for task in tasks:
            cohort.join(task)
        stamp()
        cohort.run(1)
        stamp()
        cohort.advance()
        stamp()
        for name in cohort.trials:
            cohort.leave(name)
    seconds = [after - before for before, after in itertools.pairwise(stamps)]
    names = ("process", "cohort", "joins", "step", "evaluation")
    return Parts(**dict(zip(names, seconds, strict=True)))


def cold_and_warm(setup: throughput.Setup, cell: throughput.Cell) -> dict[str, Parts]:
    """In two processes, one after the other, with a cache of their own."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        own = replace(setup, cache=Path(folder))
        for name in ("cold", "warm"):
            began = time.monotonic()
            with throughput.workers(1, setup.patience_s) as (worker,):
                worker.submit(first_step, own, cell, began)
                found[name] = worker.result()
    return found


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", choices=list(throughput.STUDIES), default="ethanol")
    parser.add_argument("--models", nargs="+", choices=list(throughput.MODELS), default=["nequip-small"])
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--optimizers", choices=["adamw", "mixed"], default="adamw")
    parser.add_argument("--batch-size", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patience", type=float, default=600.0, help="seconds that a process may take")
    parser.add_argument("--json", type=Path, help="file for all parts")
    return parser.parse_args()


def main() -> None:
    """Print a line per model and start."""
    arguments = parse_arguments()
    setup = throughput.bare_setup(
        arguments, evaluate_every=1, horizon=_HORIZON, patience_s=arguments.patience, cache=Path()
    )
    content: dict[str, Any] = {}
    for model in arguments.models:
        cell = throughput.Cell(
            model, arguments.batch_size, "cohort", arguments.slots, arguments.optimizers, setup.device == "cuda", 0
        )
        for name, parts in cold_and_warm(setup, cell).items():
            content.setdefault(model, {})[name] = {**asdict(parts), "to_first_step": parts.to_first_step}
            each = ", ".join(f"{part} {seconds:.1f}" for part, seconds in asdict(parts).items())
            print(f"{model}, {arguments.slots} slots, {name}: first step after {parts.to_first_step:.1f} s ({each})")
    if arguments.json:
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
