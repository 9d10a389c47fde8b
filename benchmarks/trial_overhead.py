"""Seconds per trial of tunebench's lightning engine over seconds of plain `nequip-train` for the same work.

All sides train the same model from the same weights on the same batches with the same optimizer, and validate at the
same steps. tunebench measures two readouts instead of one and writes curve, TensorBoard events and a checkpoint at
every evaluation; NequIP writes its CSV log. Sides alternate in one run:

- tunebench, warm, as in a study, where a trial's process has trained another trial before;
- `nequip-train`, which starts a process per trial, as it always does;
- NequIP warm: what `nequip-train` does after its imports, in this process, so that the start of a process is left out.

    python benchmarks/trial_overhead.py [--steps 200] [--repeats 3] [--device cpu] [--family nequip]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from hydra.utils import instantiate

from tunebench.engine.lightning import run_trial
from tunebench.engine.nequip_config import plain_nequip_config
from tunebench.engine.task import Seeds, TrialTask
from tunebench.study.record import Readout, Stage, TrialKey
from tunebench.study.search_space import SearchSpace
from tunebench.study.spec import Model, Objective, Schedule, SplitFrames, Workload, XtbData
from tunebench.workloads.data import prepare


def make_task(arguments: argparse.Namespace, steps: int, run: Path) -> TrialTask:
    """An AdamW trial on ethanol with an evaluation every quarter of its horizon."""
    data = XtbData(source="xtb", system="ethanol", frames=SplitFrames(train=80, val=40, test=10))
    space = SearchSpace.load("adamw")
    return TrialTask(
        key=TrialKey(workload="ethanol", optimizer="adamw", stage=Stage.TUNE, config_index=0, seed_index=0),
        workload=Workload(
            name="ethanol",
            data=data,
            model=Model(family=arguments.family, preset=arguments.preset, r_max_angstrom=4.0),
            max_steps=steps,
        ),
        data=prepare(data),
        hyperparameters=space.defaults(),
        averaged=Readout.EMA,
        schedule=Schedule(),
        objective=Objective(),
        seeds=Seeds(init=1, order=2, labels=3),
        evaluation_steps=tuple(range(steps // 4, steps + 1, steps // 4)),
        run=run,
        device=arguments.device,
        threads=torch.get_num_threads(),
    )


def tunebench_seconds(task: TrialTask) -> float:
    """One trial in this process, everything it writes included."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run_trial(replace(task, run=Path(folder)), lambda evaluation: None)
    return time.perf_counter() - began


def nequip_train_seconds(task: TrialTask) -> float:
    """The same work by NequIP's own command, started as a user starts it."""
    with tempfile.TemporaryDirectory() as folder:
        config = plain_nequip_config(task, evaluate_every=task.evaluation_steps[0])
        config["trainer"]["logger"] = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": folder}
        (Path(folder) / "config.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "nequip.scripts.train", "-cp", folder, "-cn", "config"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(task.threads)}
        began = time.perf_counter()
        subprocess.run(command, cwd=folder, capture_output=True, check=True, env=environment)
        return time.perf_counter() - began


def warm_nequip_seconds(task: TrialTask) -> float:
    """NequIP's data module, training module and trainer in this process, from its config to the end of the fit."""
    with tempfile.TemporaryDirectory() as folder:
        config = plain_nequip_config(task, evaluate_every=task.evaluation_steps[0])
        config["trainer"]["logger"] = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": folder}
        began = time.perf_counter()
        data = instantiate(config["data"], _recursive_=False)
        trainer = instantiate(config["trainer"], inference_mode=False)
        module = instantiate(
            config["training_module"],
            _recursive_=False,
            _convert_="all",
            num_datasets=data.num_datasets,
            info_dict={},
        )
        trainer.fit(model=module, datamodule=data)
        return time.perf_counter() - began


def medians(sides: Mapping[str, Callable[[TrialTask], float]], task: TrialTask, repeats: int) -> dict[str, float]:
    """Median seconds of each side; sides alternate, so that a slow moment of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            times[name].append(side(task))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure and print seconds per trial and both ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--family", choices=["nequip", "allegro"], default="nequip")
    parser.add_argument("--preset", default="tiny")
    arguments = parser.parse_args()
    steps = max(arguments.steps // 4, 1) * 4  # four evaluations
    task = make_task(arguments, steps, Path())
    sides = {"tunebench": tunebench_seconds, "nequip-train": nequip_train_seconds, "NequIP warm": warm_nequip_seconds}
    for side in (tunebench_seconds, warm_nequip_seconds):
        side(make_task(arguments, 8, Path()))
    seconds = medians(sides, task, arguments.repeats)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{arguments.family} {arguments.preset}, {steps} steps, {device}, median of {arguments.repeats}")
    ours = seconds["tunebench"]
    for name in ("nequip-train", "NequIP warm"):
        plain = seconds[name]
        print(f"seconds per trial: tunebench {ours:.2f}, {name} {plain:.2f}, ratio {ours / plain:.3f}")


if __name__ == "__main__":
    main()
