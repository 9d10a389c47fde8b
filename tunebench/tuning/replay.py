"""Successive halving again, over recorded curves: what other settings, or another arrival, would have lost.

Only trials whose curve reaches the horizon can be replayed. Where a run stopped trials, those that went all the way are
the good ones, so its sentinels are replayed, which were drawn at random; a run that stopped nobody replays all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from tunebench.study.decision import Fate
from tunebench.study.errors import RunError
from tunebench.study.false_stops import clopper_pearson, false_stops
from tunebench.study.journal import read_trials
from tunebench.study.objective import selected_readout
from tunebench.study.plan import ArmPlan, legs, plan_arms, rung_steps
from tunebench.study.record import CURVES, Metric, Reason, Split, Stage, TrialRecord
from tunebench.study.resolve import load_run
from tunebench.study.spec import Asha, AshaForm, AshaOrder, Fidelity, Objective
from tunebench.tuning.ladder import Ladder

Curve = Mapping[int, float]
"""Objective by step, lower is better; the last step is the horizon."""

_FEWEST = 3  # trials that halving can be replayed with


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """One replay of one arm.

    Attributes:
        survivors: trials that reached the horizon. steps: paid by all trials together.
    """

    survivors: frozenset[str]
    steps: int


def replay(
    curves: Mapping[str, Curve],
    asha: Asha,
    rungs: tuple[int, ...],
    draw: np.random.Generator,
    fewest: int = 1,
    fidelity: Fidelity = Fidelity.TRUNCATE,
) -> Replayed:
    """Let trials with known curves pass the rungs, arriving in random order as devices of any speed would let them.

    Args:
        curves: by trial id, each with a value at every rung and at the horizon.
        asha: form, order and reduction factor; sentinels are left out, for the question is what stopping does.
        rungs: ascending steps below the horizon.
        draw: source of the arrivals.
        fewest: trials that a rung lets go on at least.
        fidelity: TRUNCATE or RESCALE; under the latter who goes on starts anew, and pays for that.
    """
    ladder = Ladder(asha, rungs, curves, fewest=fewest)
    passed = dict.fromkeys(sorted(curves), 0)
    while movable := [name for name, index in passed.items() if _may_move(ladder, name, index)]:
        name = movable[int(draw.integers(len(movable)))]
        if passed[name] < len(rungs):
            rung = rungs[passed[name]]
            ladder.arrive(name, rung, curves[name][rung])
        passed[name] += 1
    paid = legs(rungs, max(max(curve) for curve in curves.values()), fidelity)
    survivors = frozenset(name for name, index in passed.items() if index > len(rungs))
    return Replayed(survivors=survivors, steps=sum(sum(paid[:index]) for index in passed.values()))


def _may_move(ladder: Ladder, name: str, index: int) -> bool:
    if index > len(ladder.rungs):
        return False
    return index == 0 or ladder.fate(name, ladder.rungs[index - 1]) is Fate.GO_ON


def replay_run(run: Path, changes: Mapping[str, Any], arrivals: int, seed: int) -> dict[str, Any]:
    """Replay every arm of a run's tune stage under its own settings, changed where asked.

    Args:
        run: the run directory.
        changes: keys of `tune.asha` with other values.
        arrivals: random arrivals to replay; in the deterministic order all of them decide alike.
        seed: of the arrivals.

    Raises:
        RunError: no arm has enough recorded trials, or settings contradict each other.
    """
    resolved = load_run(run)
    own = resolved.study.tune.asha or Asha()
    asha = own.model_copy(update=dict(changes))
    if asha.form is AshaForm.STOPPING and asha.order is AshaOrder.DETERMINISTIC:
        raise RunError(f"{run}: order: found deterministic, allowed: asynchronous with form stopping")
    records = [record for record in read_trials(run) if record.key.stage is Stage.TUNE]
    rows = []
    for arm in plan_arms(resolved):
        of_arm = [record for record in records if record.key.arm == arm.name]
        rungs = rung_steps(asha, arm.workload.max_steps)
        curves = _complete_curves(run, arm, of_arm, rungs, resolved.study.objective)
        if len(curves) >= _FEWEST and rungs:
            draw = np.random.default_rng(seed)
            fewest = resolved.study.confirm.top_k
            runs = [replay(curves, asha, rungs, draw, fewest, arm.fidelity) for _ in range(arrivals)]
            rows.append(
                {"arm": arm.name, "rungs": list(rungs), "fidelity": arm.fidelity.value, **_losses(curves, runs)}
            )
    if not rows:
        raise RunError(
            f"{run}: found no arm with {_FEWEST} sentinels, or trials of a run without stopping, that reached the "
            "horizon and were measured at these rungs, allowed: a run with tune.asha.sentinels, or with asha: null"
        )
    evidence = [found.to_plain() for found in false_stops(records)]
    return {"run": str(run), "asha": asha.model_dump(mode="json"), "arrivals": arrivals, "arms": rows} | {
        "sentinels": evidence
    }


def _losses(curves: Mapping[str, Curve], runs: Sequence[Replayed]) -> dict[str, Any]:
    """How often the best trial is lost, how much worse the best that is left is, and what is saved."""
    final = {name: curve[max(curve)] for name, curve in curves.items()}
    best = min(final, key=lambda name: (final[name], name))
    lost = sum(best not in one.survivors for one in runs)
    left = [min((final[name] for name in one.survivors), default=math.inf) for one in runs]
    full = len(curves) * max(max(curve) for curve in curves.values())
    low, high = clopper_pearson(lost, len(runs))
    return {
        "trials": len(curves),
        "best": best,
        "best_lost": lost / len(runs),
        "best_lost_low": low,
        "best_lost_high": high,
        "best_objective": final[best],
        "best_left_objective": float(np.mean(left)),
        "different_outcomes": len({one.survivors for one in runs}),
        "steps_saved": 1.0 - float(np.mean([one.steps for one in runs])) / full,
    }


def _complete_curves(
    run: Path, arm: ArmPlan, records: Sequence[TrialRecord], rungs: tuple[int, ...], objective: Objective
) -> dict[str, Curve]:
    stopped = any(record.reason is Reason.STOPPED_ASHA for record in records)
    curves = {}
    for record in records:
        if record.reason is Reason.FINISHED and (record.sentinel or not stopped):
            curve = _curve(run, arm, record, objective)
            if {*rungs, arm.workload.max_steps} <= curve.keys():
                curves[record.key.trial_id] = curve
    return curves


def _curve(run: Path, arm: ArmPlan, record: TrialRecord, objective: Objective) -> Curve:
    """What the rungs compare: errors along one schedule, or those at the ends of complete ones."""
    if arm.fidelity is Fidelity.TRUNCATE:
        return objective_curve(run, record.key.trial_id, objective)
    ends = {} if record.value is None else {arm.workload.max_steps: record.value}
    return {**record.rungs, **ends}


def objective_curve(run: Path, trial: str, objective: Objective) -> Curve:
    """A trial's objective by step, with the readout that the study's policy selects at each; empty without a file."""
    file = run / CURVES / f"{trial}.parquet"
    if not file.is_file():
        return {}
    wanted = [("split", "==", Split.VAL.value), ("metric", "==", Metric.OBJECTIVE.value)]
    by_step: dict[int, dict[str, float]] = {}
    for row in pq.read_table(file, columns=["step", "readout", "value"], filters=wanted).to_pylist():
        by_step.setdefault(row["step"], {})[row["readout"]] = row["value"]
    return {step: values[str(selected_readout(values, objective))] for step, values in by_step.items()}
