"""What a run directory says: the names of stages, reasons, splits, readouts and metrics, and one trial's record.

This module is the contract between running and analysis. It imports neither Ray nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

JOURNAL = "journal.log"
STUDY = "study.yaml"
STUDY_HASH = "study.sha256"
ENVIRONMENT = "environment.json"
CURVES = "curves"
SHORTER_CURVES = "shorter_curves"
"""Curves of a trial at horizons before its last one, ``TRIAL.hSTEPS.parquet``."""
ERROR_PARTS = "error_parts"
"""Errors of finished confirm trials by configuration type and by element, ``TRIAL.parquet``, rows of `PART_COLUMNS`."""
PROPERTIES = "properties"
"""Physical properties of confirm trials' models, ``MODEL.parquet``, and curves, ``MODEL.curves.parquet``."""
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
REPORT = "report"
SEARCH_SPACES = "search_spaces"
BUILDING = ".building-"
"""Prefix of what is moved to its name when it is whole; what a kill leaves of it is deleted at the next start."""


class Stage(StrEnum):
    """Where in the protocol a trial stands; only CONFIRM trials rank."""

    TUNE = "tune"
    CONFIRM = "confirm"


class Reason(StrEnum):
    """Why a trial ended.

    MISMATCHED: its update rules treat other weights than its search space promises.
    """

    FINISHED = "FINISHED"
    STOPPED_ASHA = "STOPPED_ASHA"
    DIVERGED = "DIVERGED"
    OOM = "OOM"
    CRASHED = "CRASHED"
    PREEMPTED = "PREEMPTED"
    TIMED_OUT = "TIMED_OUT"
    MISMATCHED = "MISMATCHED"


class Readout(StrEnum):
    """Which weights an error was measured with.

    RAW: the weights the optimizer steps on. EMA: their exponential moving average.
    SCHEDULE_FREE: the averaged iterate x of schedule-free optimizers, which takes EMA's place in their arms.
    REFINED: those that counted, after the study's second-order refinement; they never select and never rank.
    """

    RAW = "raw"
    EMA = "ema"
    SCHEDULE_FREE = "schedule_free"
    REFINED = "refined"


class Split(StrEnum):
    """Fixed split names; an out-of-distribution split is called ``ood:NAME``."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


OOD_PREFIX = "ood:"


class Metric(StrEnum):
    """Curve metrics; all but LEARNING_RATE are better when lower.

    Units: energies eV/atom, forces eV/Å, stress eV/Å³, LOSS and OBJECTIVE as the study weights them.
    """

    LOSS = "loss"
    OBJECTIVE = "objective"
    LEARNING_RATE = "learning_rate"
    ENERGY_PER_ATOM_MAE = "energy_per_atom_mae"
    ENERGY_PER_ATOM_RMSE = "energy_per_atom_rmse"
    FORCES_MAE = "forces_mae"
    FORCES_RMSE = "forces_rmse"
    STRESS_MAE = "stress_mae"
    STRESS_RMSE = "stress_rmse"


class Part(StrEnum):
    """What a part of a split is: frames of one configuration type, or atoms of one element, which have forces alone."""

    CONFIG_TYPE = "config_type"
    ELEMENT = "element"


PART_COLUMNS = ("trial", "split", "readout", "part", "name", "metric", "value", "labels")
"""``labels`` counts the labelled numbers that an error is of."""

CURVE_COLUMNS = ("trial", "step", "wall_s", "device_s", "split", "metric", "readout", "value")


@dataclass(frozen=True, kw_only=True)
class TrialKey:
    """Names a trial: equal keys mean the same work, whichever process or attempt does it."""

    workload: str
    optimizer: str
    stage: Stage
    config_index: int
    seed_index: int

    @property
    def arm(self) -> str:
        """``WORKLOAD/OPTIMIZER``, also the name of the arm's Optuna study."""
        return f"{self.workload}/{self.optimizer}"

    @property
    def trial_id(self) -> str:
        """File-system safe name, for example ``ethanol-nequip.soap.confirm.c003.s1``."""
        return f"{self.workload}.{self.optimizer}.{self.stage}.c{self.config_index:03d}.s{self.seed_index}"


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial as the journal holds it.

    Attributes:
        state: Optuna's state name: WAITING, RUNNING, COMPLETE, PRUNED or FAIL.
        reason: why it ended, ``None`` while it has not.
        detail: what the reason needs, for STOPPED_ASHA ``{rung, cutoff, value, recorded}``, else ``{message}``; with
            a refinement what it did, ``refinement: {end, message, iterations, loss_before, loss_after, ...}``.
        value: the study's objective on the validation split at the last evaluation (lower is better), or ``None``.
        params: the sampled hyperparameters. rungs: step -> objective.
        decisions: what its rungs said of it in turn, ``{trial, rung, value, cutoff, competitors, goes_on, sentinel}``;
            for a sentinel, which goes on all the same, what they would have said.
        sentinel: whether it was chosen, before the start, never to be stopped.
        point: where in the unit cube of the Sobol sequence the hyperparameters come from, which arms share by name;
            empty in the confirm stage and under TPE.
        seeds: named seeds ``{init, order, labels}``.
        ledger: ``{steps, lost_steps, wall_s, device_s, attempts}``; steps at shorter horizons count, and the seconds of
            steps that a kill or a crash took, ``lost_steps``, count as well; device-seconds exclude evaluation. With a
            refinement also ``refine_steps``, training steps that see as many frames, and ``refine_device_s``, which
            the others leave out.
        groups: realised parameter groups, ``[{rule, view, blocks, tensors, parameters, share, ...}]``.
        data_hash: of the prepared data the trial was measured on.
        engine: what trained it last, ``cohort`` or ``lightning``; None before its start.
        device: kind of the device that trained it last, such as ``H200``; empty where Ray does not know, None where it
            was not written.
        result: last measured errors, ``{split: {readout: {metric: value}}}``; test and ood only for the confirm stage.
    """

    key: TrialKey
    number: int
    state: str
    reason: Reason | None
    detail: dict[str, Any]
    value: float | None
    params: dict[str, Any]
    rungs: dict[int, float]
    seeds: dict[str, int]
    ledger: dict[str, float]
    decisions: list[dict[str, Any]] = field(default_factory=list)
    sentinel: bool = False
    point: dict[str, float] = field(default_factory=dict)
    data_hash: str | None = None
    engine: str | None = None
    device: str | None = None
    groups: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
