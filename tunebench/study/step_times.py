"""calibration.json: what one step of every arm takes alone on its device, and what a trial's step takes on average.

This module is the contract between measuring and analysis. It imports neither Ray nor torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from tunebench.study.errors import RunError
from tunebench.study.files import replacing
from tunebench.study.search_space import Role, Scalar, SearchSpace
from tunebench.study.spec import PositiveFloat, PositiveInt, Section

CALIBRATION = "calibration.json"
SCHEMA_VERSION: Literal[1] = 1
REFRESH_PERIOD = "precondition_frequency"
"""Hyperparameter that says every how many steps a matrix optimizer refreshes its preconditioners."""
LARGEST_SPREAD = 0.2
"""Distance of the quartiles over the median above which other work on the device is suspected."""
UNSTEADY = (
    f"have quartiles more than {LARGEST_SPREAD:.0%} of the median apart: measure again while nothing else runs here"
)


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step over the rounds of a calibration: median and quartiles."""

    median_s: float
    low_s: float
    high_s: float

    @classmethod
    def over(cls, rounds_s: Sequence[float]) -> StepTime:
        """Of the seconds that each round found; with one round all three are alike."""
        low, median, high = (
            statistics.quantiles(rounds_s, n=4, method="inclusive") if len(rounds_s) > 1 else 3 * [*rounds_s]
        )
        return cls(median_s=median, low_s=low, high_s=high)


class TimedStep(Section):
    """One kind of step, measured."""

    median_s: PositiveFloat = Field(description="median over the rounds, s")
    low_s: PositiveFloat = Field(description="lower quartile, s")
    high_s: PositiveFloat = Field(description="upper quartile, s")
    steps_per_round: PositiveInt = Field(description="steps that each round timed")
    rounds_s: Annotated[tuple[PositiveFloat, ...], Field(min_length=1, strict=False)] = Field(
        description="seconds of a step in each round"
    )

    @classmethod
    def of(cls, rounds_s: Sequence[float], steps_per_round: int) -> TimedStep:
        """From what the rounds found."""
        found = StepTime.over(rounds_s)
        return cls(**vars(found), steps_per_round=steps_per_round, rounds_s=tuple(rounds_s))


class SoloStep(Section):
    """The step of an arm under one choice of the settings that change what a step costs."""

    workload: str = Field(description="name of the workload")
    optimizer: str = Field(description="name of the optimizer")
    settings: dict[str, Scalar] = Field(description="searched settings that change the cost of a step, by name")
    engine: Literal["cohort", "lightning"] = Field(description="what trained: a cohort of one slot, or NequIP's module")
    threads: PositiveInt = Field(description="of the process that trained")
    plain: TimedStep = Field(description="a step that refreshes no preconditioner")
    refresh: TimedStep | None = Field(default=None, description="a step that does; null where the rule has none")

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median, of the kind of step where it is larger."""
        kinds = [timed for timed in (self.plain, self.refresh) if timed is not None]
        return max((timed.high_s - timed.low_s) / timed.median_s for timed in kinds)

    @model_validator(mode="after")
    def _check_rounds(self) -> SoloStep:
        if self.refresh is not None and len(self.refresh.rounds_s) != len(self.plain.rounds_s):
            raise ValueError("unlike numbers of rounds; allowed: as many with refreshes as without")
        return self

    def mean(self, period: float | None) -> StepTime:
        """Mean seconds of a step that refreshes every `period` steps: plain + (refresh - plain) / period.

        The formula is applied round by round, so that a drift of the clock that hits both leaves little in the spread.
        Evaluation and the first step of a trial, which sets up the preconditioners, are not part of it.

        Args:
            period: steps between two refreshes; None where the rule has none.

        Raises:
            ValueError: the rule refreshes and no period is given, or one below 1.
        """
        if self.refresh is None:
            return StepTime.over(self.plain.rounds_s)
        if period is None or not period >= 1:
            raise ValueError(f"{REFRESH_PERIOD}: found {period}, allowed: 1 or more")
        pairs = zip(self.plain.rounds_s, self.refresh.rounds_s, strict=True)
        return StepTime.over([plain + (refresh - plain) / period for plain, refresh in pairs])


def _dated(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"{text!r} without a time zone; allowed: for example 2026-11-22T08:00:00+00:00")
    return text


class Calibration(Section):
    """The table of a study's solo step times, measured on one device, in one process, round after round."""

    schema_version: Literal[1] = Field(description="of this file")
    study_hash: str = Field(description="hash of the study whose arms were measured")
    date: Annotated[str, AfterValidator(_dated)] = Field(description="when it was measured, ISO 8601 with time zone")
    device: str = Field(description="name of the GPU or of the processor")
    kind: Literal["cpu", "cuda"] = Field(description="what sort of device it is")
    rounds: PositiveInt = Field(description="times that every step was measured")
    environment: dict[str, Any] = Field(description="as environment.json has it")
    steps: Annotated[tuple[SoloStep, ...], Field(strict=False)] = Field(description="one entry per arm and settings")

    def find(self, space: SearchSpace, workload: str, params: Mapping[str, Any]) -> SoloStep | None:
        """The step of a trial's arm under its settings; None where it was not measured.

        Args:
            space: the arm's search space, as the study froze it.
            workload: name of the trial's workload.
            params: the trial's searched hyperparameters.
        """
        settings = cost_settings(space, params)
        named = (step for step in self.steps if (step.workload, step.optimizer) == (workload, space.name))
        return next((step for step in named if step.settings == settings), None)

    def step_time(self, space: SearchSpace, workload: str, params: Mapping[str, Any]) -> StepTime | None:
        """Mean seconds of one of a trial's steps, alone on the device; None where it was not measured.

        Arguments are those of `find`.

        Raises:
            ValueError: the arm's rule refreshes and the trial does not say how often.
        """
        found = self.find(space, workload, params)
        if found is None:
            return None
        period = {**params, **space.fixed_values()}.get(REFRESH_PERIOD)
        return found.mean(None if period is None else float(period))


def cost_settings(space: SearchSpace, params: Mapping[str, Any]) -> dict[str, Scalar]:
    """The searched settings among `params` that may change what a step costs.

    Those are of the roles `structure` and `cost`, without the refresh period, which the mean accounts for. What a study
    fixes is alike in all trials of an arm.
    """
    names = (name for name, p in space.parameters.items() if p.role in (Role.STRUCTURE, Role.COST))
    return {name: params[name] for name in names if name != REFRESH_PERIOD}


def settings_of(trials: Sequence[Mapping[str, Any]], space: SearchSpace) -> list[dict[str, Scalar]]:
    """The settings of an arm that are worth measuring.

    Args:
        trials: searched hyperparameters of the arm's trials; empty where there are none yet.
        space: the arm's search space.

    Returns:
        Those of the trials, each once; without trials the defaults, and them with each other choice in turn.
    """
    found = [cost_settings(space, params) for params in trials]
    if not found:
        defaults = cost_settings(space, space.defaults())
        found = [defaults, *({**defaults, name: value} for name in defaults for value in _choices(space, name))]
    return [settings for index, settings in enumerate(found) if settings not in found[:index]]


def _choices(space: SearchSpace, name: str) -> Sequence[Scalar]:
    """Values of a searched setting: its choices, or the ends of its range."""
    parameter = space.parameters[name]
    return parameter.choices if parameter.kind == "choice" else (parameter.low, parameter.high)


def write_calibration(run: Path, table: Calibration) -> Path:
    """Write RUN/calibration.json whole, in place of an earlier one, and return its path."""
    with replacing(run / CALIBRATION) as partial:
        partial.write_text(f"{table.model_dump_json(indent=2)}\n", encoding="utf-8")
    return run / CALIBRATION


def read_calibration(run: Path, study_hash: str) -> Calibration | None:
    """The table of a run; None where there is none.

    Args:
        run: the run directory.
        study_hash: of the run's study.

    Raises:
        RunError: in one line, a file that is damaged, of another version or of another study.
    """
    file = run / CALIBRATION
    if not file.is_file():
        return None
    try:
        table = Calibration.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise RunError(f"{CALIBRATION}: {_first(error)}") from error
    if table.study_hash != study_hash:
        raise RunError(f"{CALIBRATION}: found times of study {table.study_hash[:12]}, allowed: {study_hash[:12]}")
    return table


def _first(error: ValidationError) -> str:
    """The first problem of a file in one line."""
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    found = " ".join(str(problem["input"]).split())[:60]
    return f"{place + ': ' if place else ''}found {found!r}, allowed: {problem['msg']}"
