"""Whether a cohort in float32 trains as the lightning engine does, as nearly as the lightning engine repeats itself.

On a GPU sums come in another order in every run, so two lightning runs of one trial differ, too, and the difference
grows with the steps. Here each trial is run several times by the lightning engine and by a cohort, from the same
weights, over the same batches; neighbours in the cohort are the trials of the other optimizers. The distance of two
runs is the largest relative difference of their training losses (means between evaluations), or of their validation
force errors, over all evaluations. Printed are the distances between lightning runs and those from cohort to lightning
runs, and at last their ratio: 1 means that a cohort is as near to lightning as lightning is to itself. A spread of 0
(the CPU in one thread) has no ratio.

    python benchmarks/engine_agreement.py --device cuda --data threebpa --models nequip-small --out OUT [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import throughput
import torch

from tunebench.engine.cohort import Cohort
from tunebench.engine.lightning import run_trial
from tunebench.engine.task import Evaluation, TrialTask
from tunebench.study.installed import shipped_folder
from tunebench.study.record import Readout, Split
from tunebench.study.resolve import resolve
from tunebench.workloads.data import prepare

Curve = list[Evaluation]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Distances of one trial's runs, relative.

    Attributes:
        measure: what differs.
        spread: between lightning runs: median and largest.
        departure: from the cohort's runs to the lightning runs: median and largest.
    """

    model: str
    optimizer: str
    measure: str
    spread: tuple[float, float]
    departure: tuple[float, float]

    @property
    def ratio(self) -> float | None:
        """Median departure over median spread; None where lightning repeats itself exactly."""
        return self.departure[0] / self.spread[0] if self.spread[0] else None

    @property
    def within(self) -> bool:
        """Whether the cohort's usual distance is no larger than the largest between two lightning runs."""
        return self.departure[0] <= self.spread[1]


def loss_distance(one: Curve, other: Curve) -> float:
    """Largest relative difference of training losses over the evaluations of two runs of a trial."""
    return max(abs(a.train_loss / b.train_loss - 1) for a, b in zip(one, other, strict=True))


def error_distance(one: Curve, other: Curve) -> float:
    """The same of the validation force errors of the raw weights."""
    return max(abs(_force_error(a) / _force_error(b) - 1) for a, b in zip(one, other, strict=True))


def _force_error(evaluation: Evaluation) -> float:
    return evaluation.errors[Split.VAL][Readout.RAW]["forces_mae"]


MEASURES = {"training loss": loss_distance, "validation force MAE": error_distance}


def compare(model: str, optimizer: str, lightning: Sequence[Curve], cohort: Sequence[Curve]) -> list[Agreement]:
    """Every measure of one trial, each in its runs by lightning, two or more, and by a cohort."""
    found = []
    for measure, distance in MEASURES.items():
        among = [distance(one, other) for one, other in itertools.combinations(lightning, 2)]
        across = [distance(one, other) for one, other in itertools.product(cohort, lightning)]
        found.append(
            Agreement(
                model=model,
                optimizer=optimizer,
                measure=measure,
                spread=(statistics.median(among), max(among)),
                departure=(statistics.median(across), max(across)),
            )
        )
    return found


def tasks_of(setup: throughput.Setup, model: str, batch_size: int, run: Path) -> list[TrialTask]:
    """A trial of each optimizer, evaluated every so many steps."""
    cell = throughput.Cell(model, batch_size, "cohort", len(throughput.MIX), "mixed", setup.device == "cuda", 0)
    steps = tuple(range(setup.evaluate_every, setup.horizon + 1, setup.evaluate_every))
    return [throughput.make_task(setup, cell, index, run, steps) for index in range(len(throughput.MIX))]


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


def measure(arguments: argparse.Namespace, setup: throughput.Setup, model: str) -> Iterable[Agreement]:
    """All optimizers of one model, each as soon as it is known."""

    def tasks() -> list[TrialTask]:  # each run in a folder of its own, so that none goes on with another's checkpoint
        return tasks_of(setup, model, arguments.batch_size, Path(tempfile.mkdtemp(dir=folder)))

    with tempfile.TemporaryDirectory() as folder:
        compiled = setup.device == "cuda"
        cohorts = [by_cohort(tasks(), setup.cache, compiled=compiled) for _ in range(arguments.cohorts)]
        for index, optimizer in enumerate(throughput.MIX):
            lightning = [by_lightning(tasks()[index]) for _ in range(arguments.repeats)]
            yield from compare(model, optimizer, lightning, [curves[index] for curves in cohorts])


def line(found: Agreement) -> str:
    """One comparison in words."""
    ratio = "-" if found.ratio is None else f"{found.ratio:.2f}"
    return (
        f"{found.model}, {found.optimizer}, {found.measure}: two lightning runs {found.spread[0]:.2e} "
        f"(at most {found.spread[1]:.2e}), cohort and lightning {found.departure[0]:.2e} "
        f"(at most {found.departure[1]:.2e}), ratio {ratio}, {'within' if found.within else 'OUTSIDE'} the spread"
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", choices=list(throughput.STUDIES), default="ethanol")
    parser.add_argument("--models", nargs="+", choices=list(throughput.MODELS), default=["nequip-small"])
    parser.add_argument("--batch-size", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200, help="of each trial")
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations")
    parser.add_argument("--repeats", type=int, default=3, help="lightning runs of each trial, at least 2")
    parser.add_argument("--cohorts", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache of compiled graphs")
    parser.add_argument("--json", type=Path, help="file for the distances")
    arguments = parser.parse_args()
    if arguments.repeats < 2:
        parser.error(f"--repeats: found {arguments.repeats}, allowed: 2 or more")
    if arguments.steps % arguments.every:
        parser.error(f"--every: found {arguments.every}, allowed: a divisor of --steps ({arguments.steps})")
    return arguments


def main() -> None:
    """Print every comparison; exit code 1 where a cohort lies outside the spread of lightning's runs."""
    arguments = parse_arguments()
    study = resolve(shipped_folder("studies") / throughput.STUDIES[arguments.data]).study
    setup = throughput.Setup(
        study=study,
        data=prepare(study.workloads[0].data, progress=print),
        device=arguments.device,
        threads=arguments.threads,
        evaluate_every=arguments.every,
        seconds=math.inf,
        horizon=arguments.steps,
        patience_s=math.inf,
        cache=arguments.out / "cache",
        periods=None,
        profiles=None,
    )
    torch.set_num_threads(arguments.threads)
    found = []
    for model in arguments.models:
        for agreement in measure(arguments, setup, model):
            found.append(agreement)
            print(line(agreement), flush=True)
    if arguments.json:
        entries = [{**asdict(each), "ratio": each.ratio, "within": each.within} for each in found]
        arguments.json.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if all(each.within for each in found) else 1)


if __name__ == "__main__":
    main()
