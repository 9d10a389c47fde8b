"""Seconds until TensorBoard shows a study: all trials in HPARAMS, every run's scalar tags, the charts of the arms.

Writes a study's journal and events as trials and driver would, without training, starts TensorBoard on them and asks
its HTTP interface until everything is there; with and without TensorBoard's data server, one after the other.

    python benchmarks/board_loading.py [--trials 500] [--evaluations 20]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tunebench.engine.board import TrialBoard, write_experiment
from tunebench.engine.task import Evaluation
from tunebench.study.journal import JournalWriter
from tunebench.study.plan import ArmPlan, plan_arms
from tunebench.study.record import TENSORBOARD, Reason, Stage
from tunebench.study.resolve import ResolvedStudy, resolve
from tunebench.tuning.arm_boards import ARMS, write_arm_boards
from tunebench.tuning.samplers import configuration

HORIZON = 400
_GIVE_UP_S = 300.0
_STATUSES = ["STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING", "STATUS_UNKNOWN"]


def study_of(folder: Path, trials: int) -> ResolvedStudy:
    """A study of two workloads and five optimizers, with so many configurations in all."""
    data = {"source": "xtb", "system": "ethanol", "frames": {"train": 10, "val": 5, "test": 5}}
    workload = {"data": data, "model": {"family": "nequip"}, "max_steps": HORIZON}
    optimizers = ["adamw", "schedule_free", "muon", "soap", "lamb"]
    study = {
        "name": "board-loading",
        "workloads": [{"name": name, **workload} for name in ("first", "second")],
        "optimizers": optimizers,
        "tune": {"trials_per_arm": max(trials // (2 * len(optimizers)), 3)},
    }
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study), encoding="utf-8")
    return resolve(file)


def write_run(run: Path, trials: int, evaluations: int) -> list[ArmPlan]:
    """Journal and events of a finished search."""
    arms = plan_arms(study_of(run, trials))
    write_experiment(run, {name for arm in arms for name in (*arm.space.parameters, *arm.space.fixed)})
    journal, draw = JournalWriter(run), np.random.default_rng(0)
    for arm in arms:
        journal.add_arm(arm.name, {})
        for index in range(arm.trials):
            _write_trial(run, journal, arm, index, evaluations, draw)
    write_arm_boards(run, arms)
    return arms


def _write_trial(
    run: Path, journal: JournalWriter, arm: ArmPlan, index: int, evaluations: int, draw: np.random.Generator
) -> None:
    key = arm.key(Stage.TUNE, index, 0)
    params = configuration(arm.space, {name: float(draw.random()) for name in arm.space.parameters})
    journal.plan(key, params, {n: p.distribution() for n, p in arm.space.parameters.items()}, {"init": 0})
    board = TrialBoard(run, key, {**params, **arm.space.fixed_values()}, 0)
    last = None
    for number in range(1, evaluations + 1):
        last = _evaluation(HORIZON * number // evaluations, float(draw.random()) / number)
        board.add(last)
    board.close(last, Reason.FINISHED)
    ledger = {"steps": HORIZON, "wall_s": 2.0, "device_s": 1.0, "attempts": 1}
    value = None if last is None else last.objective
    journal.finish(key, Reason.FINISHED, value=value, detail={}, ledger=ledger, result={})


def _evaluation(step: int, value: float) -> Evaluation:
    metrics = dict.fromkeys(("energy_per_atom_mae", "forces_mae", "energy_per_atom_rmse", "forces_rmse"), value)
    errors = {"val": {readout: {**metrics, "objective": value} for readout in ("raw", "ema")}}
    return Evaluation(
        step=step,
        objective=value,
        errors=errors,
        wall_s=1.0,
        device_s=1.0,
        train_loss=value,
        learning_rate=0.01,
        attempts=1,
    )


@contextmanager
def served(logdir: Path, *, data_server: bool) -> Iterator[str]:
    """A TensorBoard over a log directory; gives its address at once, before it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--load_fast", str(data_server).lower()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def ask(address: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """TensorBoard's answer; None where it does not answer yet."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/data/{path}", content, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except (OSError, urllib.error.URLError):
        return None


def hparams_listed(address: str) -> int:
    """Configurations that the HPARAMS tab lists."""
    wanted = {"startIndex": 0, "sliceSize": 100_000, "allowedStatuses": _STATUSES}
    wanted["aggregationType"] = "AGGREGATION_AVG"
    groups = ask(address, "plugin/hparams/session_groups", wanted)
    return len(groups["sessionGroups"]) if groups else 0


def seconds_until(count: Callable[[], int], wanted: int, began: float | None = None) -> float:
    """Seconds from `began`, else from now, until a count is reached.

    Raises:
        TimeoutError: it never was.
    """
    began = time.perf_counter() if began is None else began
    while count() < wanted:
        if time.perf_counter() - began > _GIVE_UP_S:
            raise TimeoutError(f"found {count()} after {_GIVE_UP_S:.0f} s, wanted {wanted}")
        time.sleep(0.1)
    return time.perf_counter() - began


def loading_seconds(run: Path, trials: int, arms: int, *, data_server: bool) -> dict[str, float]:
    """Seconds from the start of TensorBoard until each part of a run is shown, and of one look at what is loaded."""
    began = time.perf_counter()
    with served(run / TENSORBOARD, data_server=data_server) as address:

        def tagged(prefix: str) -> int:
            found = ask(address, "plugin/scalars/tags") or {}
            return sum(bool(tags) and run.startswith(prefix) for run, tags in found.items())

        found = {
            "arms' curves": seconds_until(lambda: tagged(f"{ARMS}/"), arms, began),
            "tags of all runs": seconds_until(lambda: tagged(""), trials + arms, began),
            "all in HPARAMS": seconds_until(lambda: hparams_listed(address), trials, began),
        }
        began = time.perf_counter()
        hparams_listed(address)
        found["HPARAMS again"] = time.perf_counter() - began
        return found


def main() -> None:
    """Write a run, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--evaluations", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        arms = write_run(run, arguments.trials, arguments.evaluations)
        trials = sum(arm.trials for arm in arms)
        size = sum(file.stat().st_size for file in (run / TENSORBOARD).rglob("events.*"))
        began = time.perf_counter()
        write_arm_boards(run, arms)
        print(f"{trials} trials, {arguments.evaluations} evaluations each, {size / 2**20:.1f} MiB of events")
        print(f"the driver writes the arms' boards in {time.perf_counter() - began:.2f} s")
        for data_server in (True, False):
            found = loading_seconds(run, trials, len(arms), data_server=data_server)
            shown = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found.items())
            print(f"load_fast={str(data_server).lower()}: {shown}; load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
