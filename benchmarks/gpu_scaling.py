"""The same study on 1, 2, ... GPUs of one host: trial-steps per second, and how long each GPU was idle.

Every run is a whole `tunebench run` in a folder of its own, one after the other. Two spans of time are looked at:

- the whole: from the start of the command to its end, with imports, Ray's start and the confirm stage;
- the window: from the first evaluation of a tune-stage trial to the end of the last one. Loading compiled graphs and
  capturing CUDA graphs come before that, in each cohort's first steps. What the study costs besides steps is in it:
  trials that start and leave, evaluations, checkpoints, waiting at rungs, and the last trials, which fill no cohort.

Compiling is in neither: a run of one configuration of each arm, which is not reported, comes first and fills the cache
of graphs, `$TUNEBENCH_CACHE` or `--cache` (`--cold` leaves it out). Data are made before.

A device is idle by tunebench's own account when it neither steps nor evaluates (logs/cohort-N.log): while files are
written, while trials join and leave, and while it waits for either. By NVML, asked once a second where `pynvml` is
installed, it is idle when no kernel runs. `--runs` keeps the run directories, with these logs.

The study must be large enough: a run on N GPUs needs N times the slots in trials, and more in every arm that is to wait
at its rungs. `gpu_scaling.yaml` suits two H200s; more GPUs want more `--trials`.

    TUNEBENCH_DATA=DATA python benchmarks/gpu_scaling.py --gpus 1 2 --json gpu-scaling.json
    python benchmarks/gpu_scaling.py studies/quickstart.yaml --device cpu --cpus 1 2 --trials 8 --steps 100
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from benchmarks.whole_study import failures, prepare_data, read_study, run_changed, trial_steps
from tunebench.study.journal import read_trials
from tunebench.study.record import JOURNAL, Stage
from tunebench.tuning.trial_log import LOGS
from tunebench.tuning.work_log import WorkLine, read_work
from tunebench.workloads.data import CACHE_VARIABLE

_SAMPLE_EVERY_S = 1.0
_GRACE = 3  # a third of the horizon, where `--steps` changes it


@dataclass(frozen=True, kw_only=True)
class Use:
    """What a device did in the window, in shares of it.

    Attributes:
        device: ``GPU 0``, or a cohort on a CPU.
        idle: by tunebench's account. nvml: by NVML; None where it was not asked.
        evaluating: in evaluations. writing: idle, in writing files. obeying: idle, in letting trials in and out.
    """

    device: str
    idle: float
    nvml: float | None
    evaluating: float
    writing: float
    obeying: float


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """One run of the study.

    Attributes:
        devices: GPUs, or cohorts on a CPU.
        wall_s: of the whole. window_s: of the window.
        trials: that ended. failed: those of them that diverged, crashed or ran out of memory or time.
        trial_steps: of all trials. window_steps: of the window.
        uses: by device.
    """

    devices: int
    wall_s: float
    window_s: float
    trials: int
    failed: int
    trial_steps: int
    window_steps: int
    uses: tuple[Use, ...]

    @property
    def rate(self) -> float:
        """Trial-steps per second of the whole."""
        return self.trial_steps / self.wall_s

    @property
    def window_rate(self) -> float:
        """Trial-steps per second of the window."""
        return self.window_steps / self.window_s


class Sampler:
    """Asks NVML once a second, in a thread, how busy the GPUs of this host are; without NVML it knows nothing."""

    def __init__(self) -> None:
        self.samples: list[tuple[datetime, dict[str, float]]] = []
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        """Start."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        """End."""
        self._ends.set()
        self._thread.join()

    def _run(self) -> None:
        with suppress(ImportError):
            import pynvml  # on hosts with GPUs, where torch needs it, too

            with suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
                while not self._ends.wait(_SAMPLE_EVERY_S):
                    busy = {str(i): pynvml.nvmlDeviceGetUtilizationRates(h).gpu / 100 for i, h in enumerate(handles)}
                    self.samples.append((datetime.now(), busy))

    def idle(self, gpu: str, began: datetime, ended: datetime) -> float | None:
        """Mean share of a span of time in which no kernel ran on a GPU."""
        busy = [shares[gpu] for at, shares in self.samples if began <= at <= ended and gpu in shares]
        return 1 - sum(busy) / len(busy) if busy else None


def main() -> None:
    """Run the study on each number of devices and print what came out, and the ratios to the first number."""
    arguments = _parser().parse_args()
    if arguments.cache:
        os.environ[CACHE_VARIABLE] = str(arguments.cache.resolve())
    visible = visible_gpus() if arguments.device == "cuda" else []
    counts = arguments.cpus if arguments.device == "cpu" else arguments.gpus or powers_of_two(len(visible))
    if arguments.device == "cuda" and max(counts, default=1) > len(visible):
        raise SystemExit(f"--gpus: found {max(counts, default=1)}, allowed: at most {len(visible)}, which are here")
    study = changed(read_study(arguments.study), arguments)
    prepare_data(arguments.study)
    if not arguments.cold:
        warm_up(arguments.study, study, surroundings(study, 1, visible))
    found = []
    for count in counts:
        found.append(run_on(arguments.study, study, count, visible, arguments.runs))
        print("\n".join(told(found[-1])), flush=True)
    first = found[0]
    ratios = {str(one.devices): (one.window_rate / first.window_rate, one.rate / first.rate) for one in found[1:]}
    for devices, (window, whole) in ratios.items():
        print(f"{devices} vs {first.devices}: {window:.2f} times the rate over the window, {whole:.2f} over the whole")
    if arguments.json:
        plain = {"study": study, "runs": [asdict(one) for one in found], "ratios": ratios}
        arguments.json.write_text(json.dumps(plain, indent=2))


def visible_gpus() -> list[str]:
    """Indices of the GPUs that this process may use, as the host numbers them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... as far as there are devices."""
    return [1 << power for power in range(max(most, 1).bit_length())]


def changed(study: Mapping[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """The study with what the command line says of trials, steps and devices."""
    tune, resources = dict(study.get("tune", {})), dict(study.get("resources", {}))
    workloads = [dict(workload) for workload in study["workloads"]]
    if arguments.trials:
        tune["trials_per_arm"] = arguments.trials
    for workload in workloads:
        workload["max_steps"] = arguments.steps or workload["max_steps"]
        if arguments.evaluate_every:
            workload["evaluate_every_steps"] = arguments.evaluate_every
    if arguments.steps and tune.get("asha"):
        tune["asha"] = tune["asha"] | {"grace_steps": max(arguments.steps // _GRACE, 1)}
    resources["gpus_per_trial"] = 0 if arguments.device == "cpu" else 1
    return {**study, "workloads": workloads, "tune": tune, "resources": resources}


def warm_up(file: Path, study: Mapping[str, Any], environment: Mapping[str, str]) -> None:
    """Run one configuration of each arm, so that every graph of the study is in the cache."""
    tune = {**study.get("tune", {}), "trials_per_arm": 1, "asha": None}
    confirm = {**study.get("confirm", {}), "top_k": 1, "seeds": 1}
    waived = {f"F{number}": "fills a cache" for number in range(1, 20)}
    small = {**study, "tune": tune, "confirm": confirm, "waive": waived}
    with tempfile.TemporaryDirectory(prefix="tunebench-gpu-scaling-") as folder:
        run_changed(file, small, Path(folder) / "run", environment)


def surroundings(study: Mapping[str, Any], count: int, visible: Sequence[str]) -> dict[str, str]:
    """Variables that leave a run so many devices: GPUs, or cores of a CPU."""
    if visible:
        return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(visible[:count])}
    cores = max(int(study["resources"].get("cpus_per_trial", 1)), 1)
    return {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": count * cores})}


def run_on(
    file: Path, study: Mapping[str, Any], count: int, visible: Sequence[str], runs: Path | None = None
) -> Scaled:
    """Run the study on so many devices in a new folder, kept as `runs`/COUNT where that is given.

    Raises:
        subprocess.CalledProcessError: the run failed; what it printed is on the screen.
    """
    with tempfile.TemporaryDirectory(prefix="tunebench-gpu-scaling-") as folder, Sampler() as sampler:
        run = Path(folder) / "run" if runs is None else runs / str(count)
        wall_s = run_changed(file, study, run, surroundings(study, count, visible))
        return scaled(run, count, wall_s, sampler, [f"GPU {index}" for index in visible[:count]])


def scaled(run: Path, count: int, wall_s: float, sampler: Sampler, devices: Sequence[str] = ()) -> Scaled:
    """What a finished run tells; `devices` names those that must be spoken of, were they without work."""
    records, work = read_trials(run), work_by_device(run)
    began = min(lines[0].ended for lines in work.values())
    work = {device: [] for device in devices} | work
    ended = last_end(run)
    window_s = (ended - began).total_seconds()
    done = {device: within(lines, began, ended) for device, lines in sorted(work.items())}
    uses = [
        Use(
            device=device,
            idle=1 - spent.worked_s / window_s,
            nvml=sampler.idle(device.removeprefix("GPU "), began, ended),
            evaluating=spent.evaluating_s / window_s,
            writing=spent.writing_s / window_s,
            obeying=spent.obeying_s / window_s,
        )
        for device, spent in done.items()
    ]
    return Scaled(
        devices=count,
        wall_s=wall_s,
        window_s=window_s,
        trials=len(records),
        failed=failures(records),
        trial_steps=trial_steps(records),
        window_steps=sum(spent.trial_steps for spent in done.values()),
        uses=tuple(uses),
    )


def work_by_device(run: Path) -> dict[str, list[WorkLine]]:
    """What every device of a run did, by ``GPU INDEX``, or by cohort where trials train on CPUs."""
    found: dict[str, list[WorkLine]] = {}
    for file in sorted((run / LOGS).glob("cohort-*.log")):
        gpu, lines = read_work(file)
        found.setdefault(file.stem if gpu is None else f"GPU {gpu}", []).extend(lines)
    return {device: sorted(lines, key=lambda line: line.ended) for device, lines in found.items() if lines}


def within(lines: Sequence[WorkLine], began: datetime, ended: datetime) -> WorkLine:
    """What was done in a span of time; a line that is partly in it counts by that part."""

    def part_of(line: WorkLine) -> float:
        common = (min(line.ended, ended) - max(line.began, began)).total_seconds()
        return max(common, 0.0) / max((line.ended - line.began).total_seconds(), 1e-9)

    def total(name: str) -> float:
        return math.fsum(part_of(line) * getattr(line, name) for line in lines)

    sums = {name: total(name) for name in ("worked_s", "evaluating_s", "writing_s", "obeying_s")}
    return WorkLine(began=began, ended=ended, trial_steps=round(total("trial_steps")), **sums)


def last_end(run: Path) -> datetime:
    """When the last trial of the tune stage ended, local time of the driver."""
    storage = JournalStorage(JournalFileBackend(str(run / JOURNAL)))
    trials = (trial for study in optuna.get_all_study_names(storage) for trial in _trials(study, storage))
    return max(t.datetime_complete for t in trials if t.datetime_complete and t.user_attrs["stage"] == Stage.TUNE)


def _trials(study: str, storage: JournalStorage) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=study, storage=storage).get_trials(deepcopy=False)


def told(one: Scaled) -> list[str]:
    """A run in words, a line for each device."""
    lines = [
        f"{one.devices} device{'s' if one.devices > 1 else ''}: {one.wall_s:.1f} s, {one.trials} trials "
        f"({one.failed} failed), {one.trial_steps} trial-steps, {one.rate:.1f} per second",
        f"  window: {one.window_s:.1f} s, {one.window_steps:.0f} trial-steps, {one.window_rate:.1f} per second",
    ]
    for use in one.uses:
        nvml = "" if use.nvml is None else f", {use.nvml:.1%} by NVML"
        lines.append(
            f"  {use.device}: idle for {use.idle:.1%} of the window by its cohort's log{nvml}; evaluations "
            f"{use.evaluating:.1%}, files {use.writing:.1%}, joining and leaving {use.obeying:.1%}"
        )
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=Path(__file__).with_suffix(".yaml"))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--gpus", type=int, nargs="+", help="left out, all powers of two that are here")
    parser.add_argument("--cpus", type=int, nargs="+", default=[1, 2], help="cohorts, with --device cpu")
    parser.add_argument("--trials", type=int, help="trials_per_arm; left out, the study's")
    parser.add_argument("--steps", type=int, help="max_steps, with rungs from a third on; left out, the study's")
    parser.add_argument("--evaluate-every", type=int, help="steps between evaluations; left out, the study's")
    parser.add_argument("--cache", type=Path, help="folder for graphs and data; left out, $TUNEBENCH_CACHE or ~/.cache")
    parser.add_argument("--cold", action="store_true", help="no run beforehand: the cache has the graphs already")
    parser.add_argument("--runs", type=Path, help="folder where the run directories stay; left out, none stays")
    parser.add_argument("--json", type=Path, help="file for runs and ratios")
    return parser


if __name__ == "__main__":
    main()
