"""Writes run directories whose truth is known, through the program's own study files and journal."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from tunebench.study.journal import JournalWriter
from tunebench.study.load import ResolvedStudy, resolve
from tunebench.study.record import CURVE_COLUMNS, CURVES, ENVIRONMENT, Reason, Stage, TrialKey
from tunebench.study.seeds import named_seed

HORIZON = 240
RUNG = 60
EVALUATIONS = range(12, HORIZON + 1, 12)
ENERGY_PER_FORCE = 0.05
VALIDATION_PER_TEST = 0.9
RAW_PER_AVERAGED = 1.1
OOD_PER_TEST = 2.0
SECOND_CONFIGURATION = 1.3
DEVICE_SECONDS = 60.0
_DATA = {
    "source": "xtb",
    "system": "ethanol",
    "ood_temperature_kelvin": 600.0,
    "frames": {"train": 20, "val": 10, "test": 10, "ood": 10},
}
_STEP_SECONDS = {"soap": 0.05, "muon": 0.035}
_GROUPS = {"muon": {"muon": 0.7, "adamw": 0.3}, "soap": {"soap": 0.8, "adam": 0.2}}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run to write.

    Attributes:
        arms: optimizer -> test force MAE (eV/Å) of its best configuration by confirm seed, in the averaged weights;
            ``inf`` is a seed that diverges, ``nan`` one that still runs.
        hopeless: optimizers whose tune trials all diverge, so that nothing of them is confirmed.
        crash: reason of the seeds that are ``inf``.
        force_fractions: share of frames with force labels by workload, where it is not 1.
        settings: what the study says of an arm beside its name.
        waive: reasons by rule.
        sentinels: the first so many configurations of every arm are sentinels.
        asha: whether the study stops trials early.
        afforded: configurations by optimizer that a cap on device-seconds pays for, where that is not all of them.
        properties: sections of physical properties; `model_rows` files are the test's own.
        data: the study's data section, with `data_hash` where trials were measured on data that exist.
    """

    arms: Mapping[str, Sequence[float]]
    workloads: tuple[str, ...] = ("ethanol-nequip",)
    trials_per_arm: int = 6
    top_k: int = 1
    sampler: str = "sobol"
    readout: str = "best"
    hopeless: tuple[str, ...] = ()
    crash: Reason = Reason.DIVERGED
    description: str = "Synthetic."
    force_fractions: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    waive: Mapping[str, str] = field(default_factory=dict)
    sentinels: int = 0
    asha: bool = True
    afforded: Mapping[str, int] = field(default_factory=dict)
    properties: Sequence[Mapping[str, Any]] = ()
    data: Mapping[str, Any] = field(default_factory=lambda: dict(_DATA))
    data_hash: str = ""


def study_text(plan: Plan) -> str:
    """The study file of a plan."""
    seeds = max(len(values) for values in plan.arms.values())
    cap = {"device_seconds_per_arm": DEVICE_SECONDS} if plan.afforded else {}
    stopping = {} if plan.asha else {"asha": None}
    return yaml.safe_dump(
        {
            "name": "synthetic",
            "description": plan.description,
            "seed": 7,
            "workloads": [
                {
                    "name": name,
                    "data": dict(plan.data),
                    "model": {"family": "nequip"},
                    "max_steps": HORIZON,
                    "labels": {"force_fraction": plan.force_fractions.get(name, 1.0)},
                }
                for name in plan.workloads
            ],
            "optimizers": [{"name": name, **plan.settings.get(name, {})} for name in plan.arms],
            "properties": [dict(section) for section in plan.properties],
            "waive": dict(plan.waive),
            "objective": {"readout": plan.readout},
            "tune": {"trials_per_arm": plan.trials_per_arm, "sampler": plan.sampler} | cap | stopping,
            "confirm": {"top_k": plan.top_k, "seeds": seeds},
        }
    )


def write_run(run: Path, plan: Plan) -> Path:
    """Write a run directory and return it; both stages of every arm, curves and environment included."""
    run.mkdir(parents=True, exist_ok=True)
    file = run.with_suffix(".yaml")
    file.write_text(study_text(plan), encoding="utf-8")
    resolved = resolve(file)
    resolved.write(run)
    (run / CURVES).mkdir(exist_ok=True)
    (run / ENVIRONMENT).write_text(json.dumps({"versions": {"tunebench": "0.1.0"}, "device": "cpu"}), encoding="utf-8")
    writer = _Writer(run, resolved, plan)
    for workload in plan.workloads:
        for optimizer in plan.arms:
            writer.arm(workload, optimizer)
    return run


class _Writer:
    def __init__(self, run: Path, resolved: ResolvedStudy, plan: Plan) -> None:
        self.run, self.resolved, self.plan = run, resolved, plan
        self.journal = JournalWriter(run)

    def arm(self, workload: str, optimizer: str) -> None:
        self.journal.add_arm(f"{workload}/{optimizer}", {})
        finite = [value for value in self.plan.arms[optimizer] if math.isfinite(value)]
        level = float(np.mean(finite)) if finite else 0.1
        wanted = self.plan.trials_per_arm * self.plan.settings.get(optimizer, {}).get("budget", 1)
        if self.plan.afforded:
            self.journal.afford(f"{workload}/{optimizer}", wanted, self.plan.afforded.get(optimizer, wanted))
        for config in range(self.plan.afforded.get(optimizer, wanted)):
            self._tune(
                TrialKey(workload=workload, optimizer=optimizer, stage=Stage.TUNE, config_index=config, seed_index=0),
                level,
            )
        if optimizer in self.plan.hopeless:
            return
        for place in range(self.plan.top_k):
            for seed, value in enumerate(self.plan.arms[optimizer]):
                key = TrialKey(
                    workload=workload, optimizer=optimizer, stage=Stage.CONFIRM, config_index=1 + place, seed_index=seed
                )
                self._confirm(key, value * SECOND_CONFIGURATION**place)

    def _tune(self, key: TrialKey, level: float) -> None:
        """Configuration 1 is the best; one of the last diverges, the two before it are stopped at the rung."""
        self._plan(key)
        last = self.plan.afforded.get(key.optimizer, self.plan.trials_per_arm) - 1
        forces = level * (1.0 + 0.15 * abs(key.config_index - 1))
        if key.config_index == last or key.optimizer in self.plan.hopeless:
            self._fail(key, forces, Reason.DIVERGED)
        elif key.config_index >= last - 2 and key.config_index > 2:
            self._finish(key, 2.5 * forces, Reason.STOPPED_ASHA, RUNG)
        else:
            self._finish(key, forces, Reason.FINISHED, HORIZON)

    def _confirm(self, key: TrialKey, forces: float) -> None:
        self._plan(key)
        if math.isnan(forces):
            self.journal.start(key, self._groups(key))
            self._curve(key, 0.05, RUNG)
        elif math.isinf(forces):
            self._fail(key, 0.1, self.plan.crash)
        else:
            self._finish(key, forces, Reason.FINISHED, HORIZON)

    def _plan(self, key: TrialKey) -> None:
        space = self.resolved.spaces[key.optimizer]
        unit = 0.25 + 0.5 * min(key.config_index / max(1, self.plan.trials_per_arm - 1), 1.0)
        self.journal.plan(
            key,
            {name: parameter.value_at(unit) for name, parameter in space.parameters.items()},
            {name: parameter.distribution() for name, parameter in space.parameters.items()},
            {name: named_seed(7, name, key.stage, key.seed_index) for name in ("init", "order", "labels")},
            data_hash=self.plan.data_hash or hashlib.sha256(key.workload.encode()).hexdigest(),
            sentinel=key.stage is Stage.TUNE and key.config_index < self.plan.sentinels,
        )

    def _groups(self, key: TrialKey) -> list[dict[str, Any]]:
        rule = self.plan.settings.get(key.optimizer, {}).get("optimizer", key.optimizer)
        shares = _GROUPS.get(rule, {rule: 1.0})
        return [
            {"rule": rule, "tensors": 4, "parameters": int(9000 * share), "share": share}
            for rule, share in shares.items()
        ]

    def _fail(self, key: TrialKey, forces: float, reason: Reason) -> None:
        self.journal.start(key, self._groups(key))
        self._curve(key, 5.0 * forces, RUNG // 2)
        detail = {"message": f"loss is not finite at step {RUNG // 2}"}
        self.journal.finish(key, reason, value=None, detail=detail, ledger=self._ledger(key, RUNG // 2), result={})

    def _finish(self, key: TrialKey, forces: float, reason: Reason, steps: int) -> None:
        self.journal.start(key, self._groups(key))
        self._curve(key, forces, steps)
        validation = errors(key.optimizer, VALIDATION_PER_TEST * forces)
        value = objective(validation[averaged(key.optimizer)])
        self.journal.record_rung(key, RUNG, value * (1.0 if steps == RUNG else 2.0))
        result = {"val": validation}
        if key.stage is Stage.CONFIRM:
            result |= {"test": errors(key.optimizer, forces), "ood:hot": errors(key.optimizer, OOD_PER_TEST * forces)}
        detail = {"rung": RUNG, "cutoff": 0.7 * value, "value": value, "recorded": 3} if steps == RUNG else {}
        if self.plan.readout == "raw":
            value = objective(validation["raw"])
        self.journal.finish(key, reason, value=value, detail=detail, ledger=self._ledger(key, steps), result=result)

    def _ledger(self, key: TrialKey, steps: int) -> dict[str, float]:
        seconds = steps * _STEP_SECONDS.get(key.optimizer, 0.02)
        return {"steps": steps, "wall_s": 1.2 * seconds, "device_s": seconds, "attempts": 1}

    def _curve(self, key: TrialKey, final_forces: float, steps: int) -> None:
        rows = []
        for step in (s for s in EVALUATIONS if s <= steps):
            decay = math.exp(2.5 * (1.0 - step / steps))
            device_s = step * _STEP_SECONDS.get(key.optimizer, 0.02)
            for readout, metrics in errors(key.optimizer, VALIDATION_PER_TEST * final_forces * decay).items():
                rows += [
                    (key.trial_id, step, 1.2 * device_s, device_s, "val", metric, readout, value)
                    for metric, value in {**metrics, "objective": objective(metrics)}.items()
                ]
        frame = pd.DataFrame(rows, columns=list(CURVE_COLUMNS))
        frame.to_parquet(self.run / CURVES / f"{key.trial_id}.parquet", index=False)


def averaged(optimizer: str) -> str:
    """Name of an optimizer's averaged readout."""
    return "schedule_free" if optimizer == "schedule_free" else "ema"


def errors(optimizer: str, forces: float) -> dict[str, dict[str, float]]:
    """Errors of both readouts; the averaged weights have the force MAE that is given, the raw ones are worse."""
    return {
        readout: {
            "forces_mae": factor * forces,
            "forces_rmse": 1.4 * factor * forces,
            "energy_per_atom_mae": ENERGY_PER_FORCE * factor * forces,
            "energy_per_atom_rmse": 1.4 * ENERGY_PER_FORCE * factor * forces,
        }
        for readout, factor in ((averaged(optimizer), 1.0), ("raw", RAW_PER_AVERAGED))
    }


def objective(metrics: Mapping[str, float]) -> float:
    """The default objective, spelled out: 10 times the energy error per atom plus the force error."""
    return 10.0 * metrics["energy_per_atom_mae"] + metrics["forces_mae"]
