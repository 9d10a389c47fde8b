"""How long a report takes, and how much memory: runs of 1000, 10 000 and more trials with 200 points each.

    python benchmarks/report_scale.py --trials 1000 10000 100000

Each run is written in the form of `tunebench run` (journal, one Parquet file per trial), then `python -m analysis`
reports on it in a process of its own, whose seconds by the clock and on the processor and whose peak memory are
printed, with the size of the page and the load of the machine meanwhile. 2 workloads, 5 optimizers.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml
from optuna.distributions import distribution_to_json

from tunebench.study.load import ResolvedStudy, resolve
from tunebench.study.record import CURVES, ENVIRONMENT, JOURNAL, REPORT, Metric, Reason, Split, Stage, TrialKey
from tunebench.study.seeds import named_seed

OPTIMIZERS = ("adamw", "radam", "sgd", "muon", "soap")
WORKLOADS = ("first", "second")
POINTS, HORIZON, TOP_K, SEEDS = 200, 4000, 3, 5
_COMPLETE, _PRUNED, _FAIL = 1, 2, 3
_OPTUNA_STATE = {Reason.FINISHED: _COMPLETE, Reason.STOPPED_ASHA: _PRUNED, Reason.DIVERGED: _FAIL}


def write_run(folder: Path, trials: int) -> Path:
    """Write a finished run of about so many trials into `folder`/run and return it."""
    confirm = TOP_K * SEEDS
    per_arm = max(trials // (len(OPTIMIZERS) * len(WORKLOADS)) - confirm, TOP_K)
    study = folder / "study.yaml"
    study.write_text(_study_text(per_arm), encoding="utf-8")
    resolved, run = resolve(study), folder / "run"
    (run / CURVES).mkdir(parents=True)
    resolved.write(run)
    (run / ENVIRONMENT).write_text("{}", encoding="utf-8")
    generator = np.random.default_rng(1)
    with (run / JOURNAL).open("w", encoding="utf-8") as journal:
        number = 0
        for study_id, (workload, optimizer) in enumerate((w, o) for w in WORKLOADS for o in OPTIMIZERS):
            _write(journal, {"op_code": 0, "study_name": f"{workload}/{optimizer}", "directions": [1]})
            for key in _keys(workload, optimizer, per_arm):
                for line in _trial_lines(resolved, key, study_id, number, generator, run):
                    _write(journal, line)
                number += 1
    return run


def measure(run: Path) -> tuple[float, float, float]:
    """Seconds by the clock and on the processor and peak memory in GiB of `python -m analysis RUN`.

    Peak memory is that of the largest process so far, so runs should be measured from the smallest on.
    """
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "analysis", str(run)], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, processor, after.ru_maxrss / 1024**2


def main(arguments: list[str] | None = None) -> int:
    """Measure runs from the smallest to the largest and print one row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[1000, 10_000, 100_000])
    options = parser.parse_args(arguments)
    print("| trials | report, s | on the processor, s | peak memory, GiB | page, MB | load |")
    print("| --- | --- | --- | --- | --- | --- |")
    for trials in sorted(options.trials):
        folder = Path(tempfile.mkdtemp(prefix="report-scale-"))
        try:
            run = write_run(folder, trials)
            seconds, processor, memory = measure(run)
            page = (run / REPORT / "index.html").stat().st_size / 1e6
        finally:
            shutil.rmtree(folder)
        load = os.getloadavg()[0]
        print(f"| {trials} | {seconds:.1f} | {processor:.1f} | {memory:.2f} | {page:.1f} | {load:.1f} |", flush=True)
    return 0


def _study_text(per_arm: int) -> str:
    data = {"source": "xtb", "system": "ethanol", "frames": {"train": 20, "val": 10, "test": 10}}
    workload = {"data": data, "model": {"family": "nequip"}, "max_steps": HORIZON}
    return yaml.safe_dump(
        {
            "name": "scale",
            "workloads": [{"name": name, **workload} for name in WORKLOADS],
            "optimizers": list(OPTIMIZERS),
            "tune": {"trials_per_arm": per_arm},
            "confirm": {"top_k": TOP_K, "seeds": SEEDS},
        }
    )


def _keys(workload: str, optimizer: str, per_arm: int) -> Iterator[TrialKey]:
    arm = {"workload": workload, "optimizer": optimizer}
    for config in range(per_arm):
        yield TrialKey(**arm, stage=Stage.TUNE, config_index=config, seed_index=0)
    for config in range(TOP_K):
        for seed in range(SEEDS):
            yield TrialKey(**arm, stage=Stage.CONFIRM, config_index=config, seed_index=seed)


def _trial_lines(
    resolved: ResolvedStudy, key: TrialKey, study_id: int, number: int, generator: np.random.Generator, run: Path
) -> Iterator[dict[str, Any]]:
    """The journal's operations of one trial, as `tunebench.study.journal.JournalWriter` writes them; and its curve."""
    space = resolved.spaces[key.optimizer]
    tune = key.stage is Stage.TUNE
    reason = Reason.FINISHED
    if tune and key.config_index >= TOP_K:
        reason = (Reason.FINISHED, Reason.STOPPED_ASHA, Reason.STOPPED_ASHA, Reason.DIVERGED)[key.config_index % 4]
    level = 0.02 * (1.0 + 0.2 * generator.random() + 0.001 * min(key.config_index, 900))
    errors = {str(Metric.FORCES_MAE): level, str(Metric.ENERGY_PER_ATOM_MAE): 0.05 * level}
    value = level + 10.0 * errors[Metric.ENERGY_PER_ATOM_MAE]
    ranges = {name: parameter.distribution() for name, parameter in space.parameters.items()}
    values = {name: parameter.value_at(generator.random()) for name, parameter in space.parameters.items()}
    attributes = {
        "trial_id": key.trial_id,
        "key": {**vars(key), "stage": key.stage.value},
        "stage": key.stage.value,
        "seeds": {name: named_seed(0, name, key.stage, key.seed_index) for name in ("init", "order", "labels")},
        "data_hash": "0" * 64,
    }
    yield {
        "op_code": 4,
        "study_id": study_id,
        "datetime_start": None,
        "state": 4,
        "value": None,
        "values": None,
        "distributions": {name: distribution_to_json(found) for name, found in ranges.items()},
        "params": {name: ranges[name].to_internal_repr(found) for name, found in values.items()},
        "user_attrs": attributes,
        "system_attrs": {},
        "intermediate_values": {},
    }
    yield {"op_code": 6, "trial_id": number, "state": 0, "values": None, "datetime_start": "2026-01-01T00:00:00+00:00"}
    split = {"val": {"ema": errors, "raw": {name: 1.1 * error for name, error in errors.items()}}}
    failed = reason is Reason.DIVERGED
    attributes = {
        "groups": [{"rule": key.optimizer, "tensors": 4, "parameters": 9000, "share": 1.0}],
        "detail": {"message": "loss is not finite"} if failed else {},
        "ledger": {"steps": HORIZON, "wall_s": 60.0, "device_s": 50.0, "attempts": 1},
        "result": {} if failed else split if tune else {**split, "test": split["val"]},
        "reason": reason.value,
    }
    yield {"op_code": 7, "trial_id": number, "step": HORIZON // 4, "intermediate_value": 2.0 * value}
    for name, content in attributes.items():
        yield {"op_code": 8, "trial_id": number, "user_attr": {name: content}}
    yield {
        "op_code": 6,
        "trial_id": number,
        "state": _OPTUNA_STATE[reason],
        "values": None if failed else [value],
        "datetime_complete": "2026-01-01T00:01:00+00:00",
    }
    _write_curve(run / CURVES / f"{key.trial_id}.parquet", key.trial_id, errors)


def _write_curve(file: Path, trial_id: str, ends: dict[str, float]) -> None:
    """200 points: 50 evaluations of two metrics in two readouts, falling to the trial's last errors."""
    evaluations = POINTS // 4
    step = np.tile(np.linspace(HORIZON // evaluations, HORIZON, evaluations).astype(np.int64), 4)
    readouts = {"ema": 1.0, "raw": 1.1}
    parts = [(metric, name, factor * end) for metric, end in ends.items() for name, factor in readouts.items()]
    decay = np.exp(2.5 * (1.0 - np.linspace(1.0 / evaluations, 1.0, evaluations)))
    table = pa.table(
        {
            "trial": pa.array([trial_id] * POINTS),
            "step": step,
            "wall_s": 0.015 * step,
            "device_s": 0.0125 * step,
            "split": pa.array([Split.VAL.value] * POINTS),
            "metric": pa.array([metric for metric, _, _ in parts for _ in range(evaluations)]),
            "readout": pa.array([readout for _, readout, _ in parts for _ in range(evaluations)]),
            "value": np.concatenate([end * decay for _, _, end in parts]),
        }
    )
    pyarrow.parquet.write_table(table, file)


def _write(journal: Any, line: dict[str, Any]) -> None:
    journal.write(json.dumps({"worker_id": "scale", **line}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    sys.exit(main())
