"""Curvature of a run's trial, with and without its optimizer's preconditioner."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from nequip.utils.global_state import set_global_state

from tunebench.curvature.operators import Hessian, Operator
from tunebench.curvature.preconditioners import OptimizerState, Preconditioned, preconditioner
from tunebench.curvature.quadrature import quadrature
from tunebench.curvature.record import CurvaturePoint, CurvatureRecord, CurvatureSettings, OperatorRecord, write_record
from tunebench.curvature.snapshots import Snapshot, checkpoint_snapshot, trained_snapshots
from tunebench.curvature.trace import hutch_plus_plus
from tunebench.engine.full_batch import full_batch, model_in
from tunebench.engine.graphs import synchronize
from tunebench.engine.task import TrialTask, trial_task
from tunebench.study.errors import RunError
from tunebench.study.journal import read_trials
from tunebench.study.plan import ArmPlan, plan_arms
from tunebench.study.record import Reason, Split, Stage, TrialRecord
from tunebench.study.resolve import ResolvedStudy, load_run
from tunebench.study.seeds import named_seed
from tunebench.study.spec import Engine
from tunebench.workloads.data import prepare

Say = Callable[[str], None]

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def measure_curvature(
    run: Path,
    trial: str,
    settings: CurvatureSettings,
    say: Say,
    *,
    at: Sequence[int] = (),
    along_rungs: bool = False,
    device: str | None = None,
) -> CurvatureRecord:
    """Measure the curvature of one trial of a run and write ``curvature/TRIAL.json``.

    Args:
        run: the run directory; apart from that file nothing in it changes.
        trial: id of the trial, or the start of one that names no other.
        settings: how.
        say: takes lines for the user.
        at: steps to train the trial to again, from its seeds; left out, its checkpoint is read.
        along_rungs: add its rungs and the last step it came to.
        device: ``cpu`` or ``cuda``; left out, CUDA where there is any.

    Raises:
        RunError: no such trial, no checkpoint, steps outside its horizon, or data other than the run's.
        StudyError: the run's study is not valid.
    """
    set_global_state()
    torch.backends.cuda.matmul.allow_tf32 = False
    record, arm, task = _trial(run, trial)
    task = replace(task, device=device or _DEVICE)
    steps = tuple(sorted({*at, *(_rungs(arm, record, task.horizon) if along_rungs else ())}))
    snapshots: Iterable[Snapshot]
    if steps:
        engine = Engine.COHORT if record.engine == Engine.COHORT else Engine.LIGHTNING  # the reference
        snapshots = trained_snapshots(task, steps, engine)
    else:
        snapshots = [checkpoint_snapshot(task)]
    name = torch.cuda.get_device_name() if task.device == "cuda" else "cpu"
    found = CurvatureRecord(
        trial=record.key.trial_id,
        workload=record.key.workload,
        optimizer=record.key.optimizer,
        stage=record.key.stage.value,
        retrained=bool(steps),
        device=name,
        settings=settings,
        points=(),
    )
    for snapshot in snapshots:
        point = measure_point(task, snapshot, settings)
        say(_line(record.key.trial_id, point))
        found = replace(found, points=(*found.points, point))
        write_record(run, found)  # a kill takes the steps that are left, and none that were measured
    return found


def measure_point(task: TrialTask, snapshot: Snapshot, settings: CurvatureSettings) -> CurvaturePoint:
    """Spectra of the Hessian of the training loss and of C^T H C, see `Preconditioner`, in float64."""
    model = model_in(task, torch.float64, snapshot.model)
    loss = full_batch(
        task,
        model,
        Split.TRAIN,
        chunk_frames=settings.chunk_frames,
        most=settings.frames,
        seed=named_seed(settings.seed, "curvature frames"),
    )
    loss.set_weights(snapshot.weights)
    hessian = Hessian(loss, _draw(settings, "dead"), keep_graphs=settings.keep_graphs)
    preconditioned, described = _preconditioned(hessian, snapshot.optimizer, task.device)
    return CurvaturePoint(
        step=snapshot.step,
        readout=snapshot.readout.value,
        loss=hessian.loss,
        gradient_norm=float(hessian.gradient.norm()),
        parameters=hessian.coordinates.total,
        live=hessian.size,
        frames=loss.frames,
        force_labels=loss.counts.forces,
        hessian=_measured(hessian, settings),
        preconditioned=None if preconditioned is None else _measured(preconditioned, settings),
        preconditioner=described,
    )


def _preconditioned(
    hessian: Hessian, state: OptimizerState, device: str
) -> tuple[Preconditioned | None, dict[str, object]]:
    """The operator, and what its P is or why there is none."""
    tensors = {name: tensor.to(device) for name, tensor in state.tensors.items()}
    weights = {name: tensor.to(device) for name, tensor in state.weights.items()}
    try:
        found = preconditioner(replace(state, tensors=tensors, weights=weights))
    except ValueError as error:
        return None, {"missing": str(error)}
    described: dict[str, object] = {"definition": found.definition, "parts": [asdict(part) for part in found.parts]}
    return Preconditioned(hessian, hessian.coordinates, found), described


def _measured(operator: Operator, settings: CurvatureSettings) -> OperatorRecord:
    synchronize(operator.device)
    began, before = time.perf_counter(), operator.products
    spectrum = quadrature(operator, _draw(settings, "probes"), probes=settings.probes, steps=settings.steps)
    products = settings.trace_products
    trace = hutch_plus_plus(operator, _draw(settings, "trace"), products) if products else None
    synchronize(operator.device)
    return OperatorRecord(
        spectrum=spectrum,
        trace=math.nan if trace is None else trace.value,
        trace_error=math.nan if trace is None else trace.standard_error,
        products=operator.products - before,
        seconds=time.perf_counter() - began,
    )


def _draw(settings: CurvatureSettings, purpose: str) -> np.random.Generator:
    """The same vectors for every operator, step and trial of one model: what differs is not the draw."""
    return np.random.default_rng(named_seed(settings.seed, "curvature", purpose))


def _only_trial(run: Path, trial: str) -> TrialRecord:
    records = read_trials(run)
    found = [record for record in records if record.key.trial_id == trial]
    found = found or [record for record in records if record.key.trial_id.startswith(trial)]
    if len(found) != 1:
        names = ", ".join(sorted(record.key.trial_id for record in found or records)[:6])
        raise RunError(f"{run}: trial {trial!r}: found {len(found)} whose id begins so, allowed: one, such as {names}")
    return found[0]


def planned_steps(run: Path, trial: str) -> tuple[int, ...]:
    """The steps of `along_rungs`: the trial's rungs and the last step it came to."""
    record, arm, task = _trial(run, trial)
    return tuple(_rungs(arm, record, task.horizon))


def _trial(run: Path, trial: str) -> tuple[TrialRecord, ArmPlan, TrialTask]:
    """A trial as the journal has it, its arm, and its task."""
    resolved, record = load_run(run), _only_trial(run, trial)
    arm = next(arm for arm in plan_arms(resolved) if arm.name == record.key.arm)
    return record, arm, _task(resolved, arm, record, run)


def _task(resolved: ResolvedStudy, arm: ArmPlan, record: TrialRecord, run: Path) -> TrialTask:
    """The trial's task at the last horizon that it began."""
    data = prepare(arm.workload.data, base=resolved.file.parent)
    if record.data_hash not in (None, data.hash):
        allowed = f"{str(record.data_hash)[:12]}, the data the trial was measured on"
        raise RunError(f"{run}: {record.key.workload}: found data {data.hash[:12]}, allowed: {allowed}")
    found = trial_task(resolved, arm, data, record.key, params=record.params, seeds=record.seeds, run=run.resolve())
    went_all_the_way = record.reason is Reason.FINISHED or not found.horizons
    last = arm.workload.max_steps if went_all_the_way else max(record.rungs, default=found.horizon)
    return found.at(last) or found  # rungs of a truncated schedule are no horizons


def _rungs(arm: ArmPlan, record: TrialRecord, horizon: int) -> list[int]:
    """Steps at which the arm's trials are compared, as far as the trial came, and its end."""
    cut = record.key.stage is Stage.TUNE and record.reason is not Reason.FINISHED and horizon not in record.rungs
    end = max(record.rungs, default=0) if cut else horizon
    if not end:
        raise RunError(f"{record.key.trial_id}: found an end before its first rung, allowed: steps of its own (--at)")
    return [*(rung for rung in arm.rungs if rung < end), end]


def _line(trial: str, point: CurvaturePoint) -> str:
    def words(name: str, operator: OperatorRecord) -> str:
        found = operator.spectrum
        return f"{name} {found.least.value:.3g} to {found.largest.value:.3g}, condition {found.condition[0]:.3g}"

    parts = [words("eigenvalues", point.hessian)]
    if point.preconditioned is not None:
        parts.append(words("preconditioned", point.preconditioned))
    else:
        parts.append(f"no preconditioner: {point.preconditioner['missing']}")
    return f"{trial} step {point.step}: {'; '.join(parts)}"
