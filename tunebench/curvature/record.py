"""What a measurement of curvature leaves in a run directory, ``curvature/TRIAL.json``. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunebench.curvature.spectrum import Spectrum
from tunebench.study.errors import RunError
from tunebench.study.files import replacing

CURVATURE = "curvature"
"""Folder of a run directory."""

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CurvatureSettings:
    """How to measure.

    Attributes:
        frames: training frames that the loss runs over at most, drawn without repetition.
        chunk_frames: of them, those that go through the model together.
        probes: random vectors. steps: of Lanczos from each of them.
        trace_products: of Hutch++ for each operator; 0 leaves it out.
        seed: of frames and random vectors, which all steps, operators and trials share.
        keep_graphs: keep the graphs of the gradients: half the time, and the memory of all frames at once.
    """

    frames: int = 40
    chunk_frames: int = 8
    probes: int = 4
    steps: int = 40
    trace_products: int = 30
    seed: int = 0
    keep_graphs: bool = True

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        least = {"frames": 1, "chunk_frames": 1, "probes": 1, "steps": 1, "trace_products": 0, "seed": 0}
        for name, at_least in least.items():
            if getattr(self, name) < at_least:
                raise RunError(f"curvature: {name}: found {getattr(self, name)}, allowed: at least {at_least}")
        if 0 < self.trace_products < 3:
            raise RunError(f"curvature: trace_products: found {self.trace_products}, allowed: 0, or at least 3")


@dataclass(frozen=True, kw_only=True, eq=False)
class OperatorRecord:
    """One operator at one checkpoint.

    Attributes:
        spectrum: as the Lanczos runs see it.
        trace, trace_error: by Hutch++, and its standard error; NaN where it was left out.
        products: Hessian-vector products. seconds: they took.
    """

    spectrum: Spectrum
    trace: float
    trace_error: float
    products: int
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class CurvaturePoint:
    """A trial at one checkpoint.

    Attributes:
        step: finished training steps.
        readout: the weights that the Hessian is taken at, ``raw`` or ``schedule_free``.
        loss: of the frames. gradient_norm: of its gradient, Euclidean.
        parameters: trainable ones. live: those that the loss depends on, the dimension of the operators.
        frames: in the loss. force_labels: components among them that have labels.
        hessian: of the loss.
        preconditioned: with the optimizer's own P; None where it has none, and `preconditioner` says why.
        preconditioner: ``{definition, parts}`` or ``{missing}``.
    """

    step: int
    readout: str
    loss: float
    gradient_norm: float
    parameters: int
    live: int
    frames: int
    force_labels: int
    hessian: OperatorRecord
    preconditioned: OperatorRecord | None
    preconditioner: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class CurvatureRecord:
    """Curvature along one trial.

    Attributes:
        trial: its id. workload, optimizer, stage: of its key.
        retrained: whether it was trained again from its seeds to these steps; else its checkpoint was read.
        device: that measured.
        settings: how.
        points: ascending in their steps.
    """

    trial: str
    workload: str
    optimizer: str
    stage: str
    retrained: bool
    device: str
    settings: CurvatureSettings
    points: tuple[CurvaturePoint, ...]


def summary_rows(record: CurvatureRecord) -> list[dict[str, Any]]:
    """One row of plain numbers per checkpoint and operator: ends, trace, condition and spread of the spectrum.

    `trace` is Hutch++'s where it was measured, else the runs' own Hutchinson estimate. What is not known is None.
    """
    rows = []
    for point in record.points:
        for name, operator in (("H", point.hessian), ("preconditioned H", point.preconditioned)):
            if operator is None:
                continue
            found = operator.spectrum
            trace = found.trace if math.isnan(operator.trace) else (operator.trace, operator.trace_error)
            row = {
                "trial": record.trial,
                "step": point.step,
                "operator": name,
                "largest": found.largest.value,
                "largest_bound": found.largest.bound,
                "least": found.least.value,
                "least_bound": found.least.bound,
                "trace": trace[0],
                "trace_error": trace[1],
                "condition": found.condition[0],
                "condition_error": found.condition[1],
                "negative_share": found.negative_share,
                "spread_decades": found.spread_decades,
                "loss": point.loss,
                "products": operator.products,
                "seconds": operator.seconds,
            }
            rows.append(_plain(row))
    return rows


def write_record(run: Path, record: CurvatureRecord) -> Path:
    """Write a record into its run, in place of an earlier one of the trial; returns the file."""
    plain = {"schema_version": SCHEMA_VERSION, **_plain(asdict(record))}
    file = run / CURVATURE / f"{record.trial}.json"
    with replacing(file) as partial:
        partial.write_text(json.dumps(plain, indent=1, allow_nan=False), encoding="utf-8")
    return file


def record_files(run: Path) -> list[Path]:
    """Files with records of a run, in order of the trials' names; none where nothing was measured."""
    return sorted((run / CURVATURE).glob("*.json"))


def read_record(file: Path) -> CurvatureRecord:
    """The record of one trial.

    Raises:
        RunError: a file that cannot be read, or of another version.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise RunError(f"{file}: schema_version: found {version!r}, allowed: {SCHEMA_VERSION}")
        points = tuple(_point(point) for point in content.pop("points"))
        return CurvatureRecord(**content | {"settings": CurvatureSettings(**content["settings"])}, points=points)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RunError(f"{file}: found {found}, allowed: what `tunebench curvature` writes") from error


def _point(plain: Mapping[str, Any]) -> CurvaturePoint:
    operators = {name: _operator(plain[name]) for name in ("hessian", "preconditioned")}
    assert operators["hessian"] is not None
    return CurvaturePoint(**{**plain, **operators})


def _operator(plain: Mapping[str, Any] | None) -> OperatorRecord | None:
    if plain is None:
        return None
    spectrum = {
        name: tuple(np.array(run) for run in plain["spectrum"][name]) for name in ("values", "weights", "bounds")
    }
    traces = {name: math.nan if plain[name] is None else plain[name] for name in ("trace", "trace_error")}
    return OperatorRecord(**{**plain, **traces, "spectrum": Spectrum(size=plain["spectrum"]["size"], **spectrum)})


def _plain(value: Any) -> Any:
    """Numbers, strings, lists and dictionaries; a number that is not finite becomes null."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
