"""Validation error of AdamW, SOAP, Muon and SOAP-Muon by `fctp_view` on 3BPA, NequIP and Allegro.

Models, data, loss and batch size are those of studies/threebpa.yaml with a shorter horizon; hyperparameters are the
defaults of the search spaces except learning rate and view. An arm is a family, an optimizer and a view; Allegro has no
FullyConnectedTensorProduct and AdamW no matrices, so neither has views. Each arm trains seed 0 at every rate of the
grid (`--rates`; a tenth of them for SOAP-Muon); the lowest final validation force MAE of the averaged weights (EMA)
picks the rate, and the other seeds train at that one. Seeds (initial weights, order of batches) are paired across arms.

Jobs run in warm processes that share the device, rate scans first. A finished job is a line of OUT/matrix-views.csv and
is not run again, so a stopped command is continued by the same command:

    export TUNEBENCH_DATA=FOLDER  # that holds threebpa/
    python benchmarks/matrix_views.py --out OUT --device cuda --processes 12 --seconds 420
    python benchmarks/matrix_views.py --out OUT --report  # the table OUT/matrix-views.md, without running anything
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from tunebench.engine.graphs import release_memory
from tunebench.engine.lightning import run_trial
from tunebench.engine.task import Evaluation, Seeds, TrialTask
from tunebench.optim.matrix_view import FctpView
from tunebench.study.installed import shipped_folder
from tunebench.study.plan import trial_seeds
from tunebench.study.record import Metric, Readout, Reason, Split, Stage, TrialKey
from tunebench.study.resolve import resolve
from tunebench.study.search_space import SearchSpace, Treats
from tunebench.study.spec import Family, Model, Study, StudyError, Workload
from tunebench.workloads.data import PreparedData, prepare
from tunebench.workloads.errors import WorkloadError

OPTIMIZERS = ("adamw", "soap", "muon", "soap_muon")
RATE_FACTORS = {"soap_muon": 0.1}  # its updates have unit RMS, the others' are of Adam's size
NO_VIEW = "-"


@dataclass(frozen=True, order=True)
class Arm:
    """What is compared; `view` is NO_VIEW where nothing is viewed."""

    family: str
    optimizer: str
    view: str

    def rates(self, grid: Iterable[float]) -> list[float]:
        """The arm's learning rates, ascending."""
        factor = RATE_FACTORS.get(self.optimizer, 1.0)
        return sorted({float(f"{rate * factor:.6g}") for rate in grid})


@dataclass(frozen=True)
class Job:
    """One trial."""

    arm: Arm
    rate: float
    seed: int


@dataclass(frozen=True)
class Result:
    """A line of the csv.

    Attributes:
        forces_mae: of the validation split with the EMA weights, meV/Å; NaN where the trial diverged.
        energy_mae: likewise, meV/atom.
        train_loss: mean of the last tenth of the horizon; NaN where the trial diverged.
        seconds: of the trial beside the others in its time, evaluations included.
        share: of the weights under the optimizer's matrix rule; 0 for AdamW.
    """

    family: str
    optimizer: str
    view: str
    rate: float
    seed: int
    forces_mae: float
    energy_mae: float
    train_loss: float
    seconds: float
    share: float
    steps: int
    model: str

    @property
    def job(self) -> Job:
        """What was run."""
        return Job(Arm(self.family, self.optimizer, self.view), self.rate, self.seed)

    @property
    def rank(self) -> float:
        """The force MAE, where divergence is worse than any."""
        return self.forces_mae if math.isfinite(self.forces_mae) else math.inf


@dataclass(frozen=True)
class Setup:
    """What all jobs of a command share."""

    study: Study
    workloads: dict[str, Workload]
    data: PreparedData
    device: str

    def model(self, family: str) -> str:
        """A family's model in the csv."""
        model = self.workloads[family].model
        return f"{model.preset} {json.dumps(model.arguments, sort_keys=True)}"


@cache
def arms() -> tuple[Arm, ...]:
    """All arms, the families interleaved in proportion."""
    found = {str(family): _family_arms(family) for family in Family}
    places = {arm: (i + 0.5) / len(group) for group in found.values() for i, arm in enumerate(group)}
    return tuple(sorted(places, key=lambda arm: (places[arm], arm)))


def _family_arms(family: Family) -> list[Arm]:
    views = {name: _views(family, name) for name in OPTIMIZERS}
    return [Arm(str(family), name, view) for name in OPTIMIZERS for view in views[name]]


def _views(family: Family, optimizer: str) -> Sequence[str]:
    viewed = family is Family.NEQUIP and SearchSpace.load(optimizer).treats is Treats.MATRICES
    return [view.value for view in FctpView] if viewed else [NO_VIEW]


def pending(results: Iterable[Result], grid: Sequence[float], seeds: int) -> list[Job]:
    """Jobs that can be started on these results, rate scans first; an arm's other seeds wait for its whole scan."""
    results = list(results)
    done = {result.job for result in results}
    scans = [Job(arm, rate, 0) for arm in arms() for rate in arm.rates(grid)]
    scanned = [arm for arm in arms() if all(Job(arm, rate, 0) in done for rate in arm.rates(grid))]
    chosen = {arm: chosen_rate(_scan(results, arm)) for arm in scanned}
    rest = [Job(arm, chosen[arm], seed) for seed in range(1, seeds) for arm in scanned]
    return [job for job in (*scans, *rest) if job not in done]


def chosen_rate(scan: Sequence[Result]) -> float:
    """The rate of the lowest validation force MAE; the lowest rate where all diverged."""
    return min(scan, key=lambda result: (result.rank, result.rate)).rate


def _scan(results: Iterable[Result], arm: Arm) -> list[Result]:
    return [result for result in results if result.job.arm == arm and result.seed == 0]


def make_task(job: Job, setup: Setup, run: Path) -> TrialTask:
    """The trial of a job, measured at its end and at nine tenths of it, from where on the training loss counts."""
    workload = setup.workloads[job.arm.family]
    space = SearchSpace.load(job.arm.optimizer)
    chosen: dict[str, Any] = {"learning_rate": job.rate}
    if job.arm.view != NO_VIEW:
        chosen["fctp_view"] = job.arm.view
    horizon = workload.max_steps
    return TrialTask(
        key=TrialKey(
            workload=workload.name,
            optimizer=job.arm.optimizer,
            stage=Stage.TUNE,
            config_index=0,
            seed_index=job.seed,
        ),
        workload=workload,
        data=setup.data,
        hyperparameters={**space.defaults(), **chosen},
        averaged=Readout.EMA,
        schedule=setup.study.schedule,
        objective=setup.study.objective,
        seeds=Seeds(**trial_seeds(setup.study.seed, workload.name, Stage.TUNE, job.seed)),
        evaluation_steps=(horizon - max(horizon // 10, 1), horizon),
        run=run,
        device=setup.device,
        threads=1,
        treats=space.treats,
    )


def train(job: Job, setup: Setup) -> Result:
    """One job in this process.

    Raises:
        RuntimeError: the trial ended neither at its horizon nor by divergence.
        Exception: whatever broke the training.
    """
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(job, setup, Path(folder))
        last = run_trial(task, lambda evaluation: None)
    release_memory(torch.device(setup.device))  # captured graphs keep some that the other processes need
    if last.outcome not in (Reason.FINISHED, Reason.DIVERGED):
        raise RuntimeError(f"{job}: found {last.outcome} ({last.message}), allowed: FINISHED or DIVERGED")
    return _result(job, setup, task, last, time.perf_counter() - began)


def _result(job: Job, setup: Setup, task: TrialTask, last: Evaluation, seconds: float) -> Result:
    finished = last.outcome is Reason.FINISHED
    errors = last.errors[Split.VAL][Readout.EMA] if finished else {}
    own = [row["share"] for row in last.groups if row["rule"] == job.arm.optimizer and task.treats is Treats.MATRICES]
    return Result(
        **asdict(job.arm),
        rate=job.rate,
        seed=job.seed,
        forces_mae=1e3 * errors.get(Metric.FORCES_MAE, math.nan),
        energy_mae=1e3 * errors.get(Metric.ENERGY_PER_ATOM_MAE, math.nan),
        train_loss=last.train_loss if finished else math.nan,
        seconds=seconds,
        share=sum(own, 0.0),
        steps=task.workload.max_steps,
        model=setup.model(job.arm.family),
    )


def run_jobs(setup: Setup, file: Path, arguments: argparse.Namespace) -> list[Job]:
    """Run what is pending until nothing is, or until the time is over and the jobs in flight have ended.

    Returns:
        Jobs that broke; their tracebacks are printed, and the next command tries them again.
    """
    stop = time.monotonic() + arguments.seconds
    results = read_results(file)
    broken: list[Job] = []
    flying: dict[Future[Result], Job] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.processes, mp_context=context, initializer=_begin_worker) as pool:
        while True:
            busy = {*flying.values(), *broken}
            ready = [job for job in pending(results, arguments.rates, arguments.seeds) if job not in busy]
            room = arguments.processes - len(flying) if time.monotonic() < stop else 0
            flying |= {pool.submit(train, job, setup): job for job in ready[:room]}
            if not flying:
                return broken
            ended, _ = wait(flying, return_when=FIRST_COMPLETED)
            for future in ended:
                job, error = flying.pop(future), future.exception()
                if error is None:
                    results.append(future.result())
                    append_result(file, results[-1])
                else:
                    broken.append(job)
                    traceback.print_exception(error)


def _begin_worker() -> None:
    torch.set_num_threads(1)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """End this process with a parent that was killed, which tells its pool nothing."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def append_result(file: Path, result: Result) -> None:
    """Add a line to the csv, and print it."""
    new = not file.exists()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        if new:
            writer.writerow(field.name for field in fields(Result))
        writer.writerow(astuple(result))
    arm = f"{result.family} {result.optimizer} {result.view}"
    errors = f"{result.forces_mae:.2f} meV/Å, {result.energy_mae:.3f} meV/atom"
    print(f"{arm}, rate {result.rate:g}, seed {result.seed}: {errors}, {result.seconds:.0f} s", flush=True)


def read_results(file: Path) -> list[Result]:
    """What a csv holds; nothing where there is none."""
    if not file.exists():
        return []
    kinds = {"rate": float, "seed": int, "steps": int}
    kinds |= dict.fromkeys(("forces_mae", "energy_mae", "train_loss", "seconds", "share"), float)
    with file.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    return [Result(**{name: kinds.get(name, str)(text) for name, text in row.items()}) for row in rows]


def check_same(file: Path, setup: Setup) -> None:
    """Refuse to continue a csv of other models or another horizon.

    Raises:
        StudyError: in one line.
    """
    for result in read_results(file):
        found = (result.model, result.steps)
        allowed = (setup.model(result.family), setup.workloads[result.family].max_steps)
        if found != allowed:
            raise StudyError(file, f"{result.family} model, steps", found, f"{allowed}; another --out starts anew")


def make_setup(arguments: argparse.Namespace) -> Setup:
    """The study's workloads with the command's horizon and model, and their data, which they share.

    Raises:
        StudyError, WorkloadError: no data where TUNEBENCH_DATA says.
    """
    study = resolve(shipped_folder("studies") / "threebpa.yaml").study
    short = {"max_steps": arguments.steps, "evaluate_every_steps": None}
    workloads = {
        str(w.model.family): w.model_copy(update={**short, "model": _model(w.model, arguments)})
        for w in study.workloads
    }
    return Setup(study, workloads, prepare(study.workloads[0].data, progress=print), arguments.device)


def _model(model: Model, arguments: argparse.Namespace) -> Model:
    settings = model.model_dump()
    if arguments.preset is not None:
        settings |= {"preset": arguments.preset, "arguments": {}}
    if arguments.arguments is not None and model.family is Family.NEQUIP:
        settings["arguments"] = yaml.safe_load(arguments.arguments)
    return Model(**settings)


def table(results: Sequence[Result]) -> str:
    """Markdown: a row per arm over its seeds at the chosen rate."""
    found = {result.job.arm for result in results}
    steps = ", ".join(sorted({f"{result.steps} steps" for result in results}))
    models = "; ".join(sorted({f"{result.family} {result.model}" for result in results}))
    about = (
        f"3BPA, {steps}, {models}. Validation MAE of the EMA weights, mean ± standard deviation over the seeds that "
        "reached the horizon; seed 0 also picked the rate."
    )
    head = "| model | optimizer | view | forces meV/Å | energy meV/atom | rate, of how many | edge of the grid |"
    lines = [about, "", f"{head} matrix share | seeds | diverged | s per trial |", "|---|---|---|" + "---:|" * 8]
    lines += [_row(results, arm) for family in Family for arm in _family_arms(family) if arm in found]
    return "\n".join(lines)


def _row(results: Sequence[Result], arm: Arm) -> str:
    scan = _scan(results, arm)
    rate = chosen_rate(scan)
    seeds = [result for result in results if result.job.arm == arm and result.rate == rate]
    ended = [result for result in seeds if math.isfinite(result.rank)]
    cells = [
        *(arm.family, arm.optimizer, arm.view),
        _spread([result.forces_mae for result in ended], 2),
        _spread([result.energy_mae for result in ended], 3),
        f"{rate:g} of {len(scan)}",
        edge(rate, [result.rate for result in scan]),
        f"{seeds[0].share:.1%}",
        str(len(seeds)),
        str(len(seeds) - len(ended)),
        f"{statistics.mean(result.seconds for result in seeds):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def edge(rate: float, grid: Sequence[float]) -> str:
    """Where a rate lies at the edge of its grid, so that the best rate may lie outside."""
    sides = [name for name, end in (("lowest", min(grid)), ("highest", max(grid))) if rate == end]
    return " and ".join(sides) or "no"


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "diverged"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of matrix-views.csv and matrix-views.md")
    parser.add_argument("--report", action="store_true", help="only the table of what the csv holds")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2, 3e-2], help="learning rates scanned")
    parser.add_argument(
        "--preset",
        choices=["tiny", "small", "paper"],
        help="for both families, in place of the study's preset and arguments",
    )
    parser.add_argument("--arguments", help="NequIP's, in place of the study's, as YAML: '{num_layers: 3, l_max: 1}'")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=12, help="jobs at a time on the device")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no job starts later than this")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error(f"--steps: found {arguments.steps}, allowed: 2 or more")
    return arguments


def main() -> None:
    """Run what is left to run, then write and print the table; status 1 where a job broke."""
    arguments = parse_arguments()
    file = arguments.out / "matrix-views.csv"
    broken: list[Job] = []
    if not arguments.report:
        setup = make_setup(arguments)
        check_same(file, setup)
        arguments.out.mkdir(parents=True, exist_ok=True)
        broken = run_jobs(setup, file, arguments)
    results = read_results(file)
    if not results:
        sys.exit(f"{file}: found no finished job, allowed: at least one")
    text = table(results)
    (arguments.out / "matrix-views.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if not arguments.report:
        print(f"ready to run: {len(pending(results, arguments.rates, arguments.seeds))} jobs, {len(broken)} broke")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    try:
        main()
    except (StudyError, WorkloadError) as error:
        sys.exit(str(error))
