"""Whether a cohort trains as the lightning engine does, as nearly as the lightning engine repeats itself.

On a GPU sums come in another order in every run, so two lightning runs of one trial differ, too, and the difference
grows with the steps. Each trial is run several times by the lightning engine and by a cohort, from the same weights,
over the same batches; neighbours in the cohort are the trials of the other optimizers. Further lightning runs are
nudged: they begin with every weight moved to one of its two neighbours in its precision, a rounding that each operation
may bring where it is done in another way, as a cohort does all of them. And others run as NequIP compiles a model
itself (`compile_mode: compile`), which does them in another way at every step.

The distance of two runs is the largest relative difference of their training losses (means between evaluations), or of
their validation force errors, over all evaluations. Printed are the distances among lightning runs, among them and the
nudged, among them and the compiled, among cohorts, and from cohorts to the plain lightning runs.

    python benchmarks/engine_agreement.py --device cuda --data threebpa --models nequip-small --out OUT [--json FILE]

In float32, as models are trained; with `--dtype float64` rounding has no time to grow, and what remains is a fault.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import throughput
from tunebench.engine.cohort import Cohort
from tunebench.engine.lightning import run_trial
from tunebench.engine.modules import trial_module
from tunebench.engine.task import Evaluation, TrialTask
from tunebench.study.record import Readout, Split

Curve = list[Evaluation]
Distance = Callable[[Curve, Curve], float]


@dataclass(frozen=True, kw_only=True)
class Range:
    """Distances of pairs of runs: their median and the largest; 0 of no pairs."""

    median: float
    largest: float

    @classmethod
    def of(cls, distance: Distance, pairs: Iterable[tuple[Curve, Curve]]) -> Range:
        """Over these pairs."""
        found = [distance(one, other) for one, other in pairs] or [0.0]
        return cls(median=statistics.median(found), largest=max(found))

    def __str__(self) -> str:
        return f"{self.median:.1e} (at most {self.largest:.1e})"


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Distances of one trial's runs, relative.

    Attributes:
        measure: what differs.
        lightning: among lightning runs that are alike.
        nudged: among lightning runs, of which one or both are nudged.
        compiled: among lightning runs, of which one or both are compiled by NequIP.
        cohorts: among cohorts.
        departure: from cohorts to lightning runs that are neither.
    """

    model: str
    optimizer: str
    measure: str
    lightning: Range
    nudged: Range
    compiled: Range
    cohorts: Range
    departure: Range

    @property
    def within(self) -> bool:
        """Whether the usual distance of a cohort is no larger than the largest between two lightning runs."""
        return self.departure.median <= max(each.largest for each in (self.lightning, self.nudged, self.compiled))

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.optimizer}, {self.measure}: lightning runs {self.lightning}, nudged {self.nudged}, "
            f"compiled {self.compiled}, cohorts {self.cohorts}, cohort to lightning {self.departure}, "
            f"{'within' if self.within else 'OUTSIDE'} the spread"
        )


def loss_distance(one: Curve, other: Curve) -> float:
    """Largest relative difference of training losses over the evaluations of two runs of a trial."""
    return max(abs(a.train_loss / b.train_loss - 1) for a, b in zip(one, other, strict=True))


def error_distance(one: Curve, other: Curve) -> float:
    """The same of the validation force errors of the raw weights."""
    return max(abs(_force_error(a) / _force_error(b) - 1) for a, b in zip(one, other, strict=True))


def _force_error(evaluation: Evaluation) -> float:
    return evaluation.errors[Split.VAL][Readout.RAW]["forces_mae"]


MEASURES: dict[str, Distance] = {"training loss": loss_distance, "validation force MAE": error_distance}


@dataclass(frozen=True, kw_only=True)
class Runs:
    """All runs of one trial."""

    lightning: Sequence[Curve]
    nudged: Sequence[Curve]
    compiled: Sequence[Curve]
    cohorts: Sequence[Curve]

    def compared(self, model: str, optimizer: str) -> list[Agreement]:
        """By every measure."""
        pairs = itertools.combinations

        def beside(others: Sequence[Curve]) -> list[tuple[Curve, Curve]]:
            return [*itertools.product(self.lightning, others), *pairs(others, 2)]

        return [
            Agreement(
                model=model,
                optimizer=optimizer,
                measure=measure,
                lightning=Range.of(distance, pairs(self.lightning, 2)),
                nudged=Range.of(distance, beside(self.nudged)),
                compiled=Range.of(distance, beside(self.compiled)),
                cohorts=Range.of(distance, pairs(self.cohorts, 2)),
                departure=Range.of(distance, itertools.product(self.cohorts, self.lightning)),
            )
            for measure, distance in MEASURES.items()
        ]

    def plain(self) -> dict[str, Any]:
        """Training loss and validation force error of each run by evaluation, for JSON."""
        return {
            name: [[(e.step, e.train_loss, _force_error(e)) for e in curve] for curve in curves]
            for name, curves in vars(self).items()
        }


def tasks_of(arguments: argparse.Namespace, setup: throughput.Setup, model: str, run: Path) -> list[TrialTask]:
    """A trial of each optimizer, evaluated every so many steps."""
    cell = throughput.Cell(
        model, arguments.batch_size, "cohort", len(throughput.MIX), "mixed", setup.device == "cuda", 0
    )
    steps = tuple(range(setup.evaluate_every, setup.horizon + 1, setup.evaluate_every))
    tasks = [throughput.make_task(setup, cell, index, run, steps) for index in range(len(throughput.MIX))]
    return [_with_model(task, {"dtype": arguments.dtype}) for task in tasks]


def _with_model(task: TrialTask, changes: Mapping[str, Any]) -> TrialTask:
    model = task.workload.model.model_copy(update=dict(changes))
    return replace(task, workload=task.workload.model_copy(update={"model": model}))


def compiled_by_nequip(task: TrialTask) -> TrialTask:
    """The same trial with NequIP's own compilation of its model."""
    return _with_model(task, {"arguments": {**task.workload.model.arguments, "compile_mode": "compile"}})


def by_cohort(tasks: Sequence[TrialTask], cache: Path, *, compiled: bool) -> list[Curve]:
    """The reports of trials that train side by side to their end."""
    cohort = Cohort(tasks[0], len(tasks), cache=cache, compiled=compiled)
    for task in tasks:
        cohort.join(task)
    curves: dict[str, Curve] = {task.key.trial_id: [] for task in tasks}
    while cohort.trials:
        for name, report in cohort.advance():
            curves[name].append(report)
        for name in cohort.trials:
            cohort.go_on(name)
    return list(curves.values())


def by_lightning(task: TrialTask) -> Curve:
    """The reports of one trial."""
    curve: Curve = []
    run_trial(task, curve.append)
    return curve


@contextmanager
def nudging(seed: int) -> Iterator[None]:
    """Lightning runs within begin with every weight moved to one of its two neighbours in its own precision."""
    generator = torch.Generator().manual_seed(seed)

    def nudged(*arguments: Any) -> Any:
        module = trial_module(*arguments)
        with torch.no_grad():
            for weight in module.model.parameters():
                up = torch.rand(weight.shape, generator=generator, dtype=torch.float64) < 0.5
                end = torch.where(up, torch.inf, -torch.inf).to(weight)
                weight.copy_(torch.nextafter(weight, end))
        return module

    with mock.patch("tunebench.engine.lightning.trial_module", nudged):
        yield


def runs_of(arguments: argparse.Namespace, setup: throughput.Setup, model: str) -> Iterator[tuple[str, Runs]]:
    """All runs of each optimizer's trial, as soon as they are done."""

    def tasks() -> list[TrialTask]:  # each run in a folder of its own, so that none goes on with another's checkpoint
        return tasks_of(arguments, setup, model, Path(tempfile.mkdtemp(dir=folder)))

    def repeated(index: int, seeds: Iterable[int | None]) -> list[Curve]:
        curves = []
        for seed in seeds:
            with nullcontext() if seed is None else nudging(seed):
                curves.append(by_lightning(tasks()[index]))
        return curves

    with tempfile.TemporaryDirectory() as folder:
        compiled = setup.device == "cuda"
        cohorts = [by_cohort(tasks(), setup.cache, compiled=compiled) for _ in range(arguments.cohorts)]
        for optimizer in arguments.optimizers:
            index = throughput.MIX.index(optimizer)
            yield (
                optimizer,
                Runs(
                    lightning=repeated(index, [None] * arguments.repeats),
                    nudged=repeated(index, range(arguments.nudged)),
                    compiled=[by_lightning(compiled_by_nequip(tasks()[index])) for _ in range(arguments.compiled)],
                    cohorts=[curves[index] for curves in cohorts],
                ),
            )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", choices=list(throughput.STUDIES), default="ethanol")
    parser.add_argument("--models", nargs="+", choices=list(throughput.MODELS), default=["nequip-small"])
    parser.add_argument("--optimizers", nargs="+", choices=throughput.MIX, default=list(throughput.MIX))
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--batch-size", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="of each trial")
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--repeats", type=int, default=2, help="lightning runs of each trial, at least 2")
    parser.add_argument("--nudged", type=int, default=2, help="further lightning runs, from weights one rounding apart")
    parser.add_argument("--compiled", type=int, default=1, help="further lightning runs, compiled as NequIP does it")
    parser.add_argument("--cohorts", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache of compiled graphs")
    parser.add_argument("--json", type=Path, help="file for distances and curves")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error(f"--repeats: found {arguments.repeats}, allowed: 2 or more")
    if arguments.steps % arguments.every:
        parser.error(f"--every: found {arguments.every}, allowed: a divisor of --steps ({arguments.steps})")
    return arguments


def main() -> None:
    """Print every comparison; exit code 1 where a cohort lies outside the spread of lightning's runs."""
    arguments = parse_arguments()
    cache = arguments.out / "cache"
    setup = throughput.bare_setup(arguments, evaluate_every=arguments.every, horizon=arguments.steps, cache=cache)
    torch.set_num_threads(arguments.threads)
    found: list[Agreement] = []
    curves = {}
    for model in arguments.models:
        for optimizer, runs in runs_of(arguments, setup, model):
            curves[f"{model}/{optimizer}"] = runs.plain()
            for agreement in runs.compared(model, optimizer):
                found.append(agreement)
                print(agreement, flush=True)
    if arguments.json:
        entries = [{**asdict(each), "within": each.within} for each in found]
        content = {"agreements": entries, "curves": curves}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if all(each.within for each in found) else 1)


if __name__ == "__main__":
    main()
