"""calibration.json: what one step of every arm takes alone, on each kind of device, and what a trial's step takes.

This module is the contract between measuring and analysis. It imports neither Ray nor torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
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
SCHEMA_VERSION: Literal[2] = 2
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


class DeviceTimes(Section):
    """Solo step times of a study's arms, measured on one device, in one process, round after round."""

    device: str = Field(description="name of the GPU or of the processor")
    kind: Literal["cpu", "cuda"] = Field(description="what sort of device it is")
    accelerator: str | None = Field(
        default=None,
        description="its kind as Ray names it and the journal keeps it, empty where Ray does not know; null where Ray "
        "was not asked",
    )
    date: Annotated[str, AfterValidator(_dated)] = Field(description="when it was measured, ISO 8601 with time zone")
    rounds: PositiveInt = Field(description="times that every step was measured")
    environment: dict[str, Any] = Field(description="as environment.json has it")
    steps: Annotated[tuple[SoloStep, ...], Field(strict=False)] = Field(description="one entry per arm and settings")

    def is_of(self, accelerator: str) -> bool:
        """Whether it was measured on a kind of device, by the name that Ray gives it.

        Without Ray's own name the device's is looked at: Ray cuts a GPU's name down, and puts hyphens between words.
        """
        if self.accelerator is not None:
            return self.accelerator == accelerator
        return bool(accelerator) and f" {_words(accelerator)} " in f" {_words(self.device)} "

    def replaces(self, other: DeviceTimes) -> bool:
        """Whether both are of one kind of device; processors that Ray gives no kind cannot be told apart."""
        if self.accelerator and other.accelerator:
            return self.accelerator == other.accelerator
        if self.accelerator or other.accelerator:
            return self.is_of(other.accelerator or "") or other.is_of(self.accelerator or "")
        return self.kind == other.kind and (self.kind == "cpu" or self.device == other.device)

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


def _words(name: str) -> str:
    return " ".join(name.replace("-", " ").split())


class Calibration(Section):
    """The step times of a study: a table for each kind of device on which they were measured."""

    schema_version: Literal[2] = Field(description="of this file")
    study_hash: str = Field(description="hash of the study whose arms were measured")
    tables: Annotated[tuple[DeviceTimes, ...], Field(strict=False, min_length=1)] = Field(
        description="one for each kind of device, in the order in which they came"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_version_1(cls, content: Any) -> Any:
        """A file of version 1 is one table, of a device whose kind nobody asked Ray for."""
        if not isinstance(content, dict) or content.get("schema_version") != 1:
            return content
        table = {name: value for name, value in content.items() if name not in ("schema_version", "study_hash")}
        return {"schema_version": SCHEMA_VERSION, "study_hash": content.get("study_hash"), "tables": [table]}

    def of(self, accelerator: str | None) -> DeviceTimes | None:
        """The table of a trial's kind of device; None where there is none.

        Args:
            accelerator: as the journal has it. Where nobody wrote it or Ray did not know it, the only table is meant.
        """
        own = [table for table in self.tables if accelerator is not None and table.is_of(accelerator)]
        if not own and not accelerator and len(self.tables) == 1:
            return self.tables[0]
        return own[0] if own else None

    def covering(self, trials: Iterable[tuple[SearchSpace, str, Mapping[str, Any]]]) -> DeviceTimes | None:
        """The first table that has a step of all these trials: of the kind of device in whose seconds budgets count.

        Which trials of an arm meet a fast device is chance, and a budget must not depend on it.

        Args:
            trials: search space, workload and searched hyperparameters, as for `DeviceTimes.find`.
        """
        left = list(self.tables)
        for space, workload, params in trials:
            left = [table for table in left if table.find(space, workload, params) is not None]
        return left[0] if left else None

    def step_time(
        self, space: SearchSpace, workload: str, params: Mapping[str, Any], accelerator: str | None
    ) -> StepTime | None:
        """Mean seconds of one of a trial's steps, alone on a device of its kind; None where it was not measured.

        Arguments are those of `DeviceTimes.find` and of `of`.

        Raises:
            ValueError: the arm's rule refreshes and the trial does not say how often.
        """
        table = self.of(accelerator)
        return None if table is None else table.step_time(space, workload, params)


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


def write_calibration(run: Path, calibration: Calibration) -> Path:
    """Write RUN/calibration.json whole, in place of an earlier one, and return its path."""
    with replacing(run / CALIBRATION) as partial:
        partial.write_text(f"{calibration.model_dump_json(indent=2)}\n", encoding="utf-8")
    return run / CALIBRATION


def read_calibration(run: Path, study_hash: str) -> Calibration | None:
    """The tables of a run; None where there are none.

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
        found = Calibration.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise RunError(f"{CALIBRATION}: {_first(error)}") from error
    if found.study_hash != study_hash:
        raise RunError(f"{CALIBRATION}: found times of study {found.study_hash[:12]}, allowed: {study_hash[:12]}")
    return found


def add_tables(run: Path, study_hash: str, tables: Sequence[DeviceTimes]) -> Calibration:
    """Write tables into RUN/calibration.json, each in place of the one of its kind of device; returns all of them.

    Raises:
        RunError: as `read_calibration`.
    """
    before = read_calibration(run, study_hash)
    found = before.tables if before else ()
    for table in tables:
        place = next((place for place, other in enumerate(found) if table.replaces(other)), len(found))
        others = [other for other in found if not table.replaces(other)]
        found = (*others[:place], table, *others[place:])
    whole = Calibration(schema_version=SCHEMA_VERSION, study_hash=study_hash, tables=found)
    write_calibration(run, whole)
    return whole


def _first(error: ValidationError) -> str:
    """The first problem of a file in one line."""
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    found = " ".join(str(problem["input"]).split())[:60]
    return f"{place + ': ' if place else ''}found {found!r}, allowed: {problem['msg']}"
