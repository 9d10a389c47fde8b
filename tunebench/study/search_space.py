"""Search spaces: what each optimizer's arm may vary, within which bounds, and on whose authority.

One YAML file per optimizer in ``search_spaces/``. Every range maps the unit interval to values, so a point of a
low-discrepancy sequence means the same share of the range in every arm (common random numbers).
"""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import Field, model_validator

from tunebench.study.installed import shipped_folder
from tunebench.study.problems import Problem, one_of, parse
from tunebench.study.spec import Arm, InWords, Name, Schedule, ScheduleKind, Section, StudyError
from tunebench.study.strict_yaml import read_yaml

_HUGE = 2**53  # above it floats no longer tell whole numbers apart

Scalar = bool | int | float | str | None
Number = Annotated[float, Field(allow_inf_nan=False)]


class Role(StrEnum):
    """What a hyperparameter does; arms share the structure of a role.

    LEARNING_RATE: size of a step. DECAY: weight decay. COST: trades device time for progress per step.
    STABILITY: averaging and clamping that keep steps sane. STRUCTURE: what is taken for a matrix, or which variant of
    the algorithm runs.
    """

    LEARNING_RATE = "learning_rate"
    DECAY = "decay"
    COST = "cost"
    STABILITY = "stability"
    STRUCTURE = "structure"


class Treats(StrEnum):
    """Which weights an optimizer's own update rule must treat; a run refuses an arm where it treats others (rule F10).

    ALL: every trainable weight. MATRICES: exactly the matrices of the model under `fctp_view`, at least one; the rest
    is left to another rule.
    """

    ALL = "all"
    MATRICES = "matrices"


class ParameterBase(Section):
    """What every searched hyperparameter states, of whichever kind."""

    role: Annotated[Role, Field(strict=False)] = Field(description="learning_rate, decay, cost, stability or structure")
    source: str = Field(min_length=1, description="who published the range or the default: arXiv number, documentation")

    @abstractmethod
    def distribution(self) -> BaseDistribution:
        """The same range as Optuna's distribution."""

    @abstractmethod
    def value_at(self, unit: float) -> Any:
        """The value at a share of the range; `unit` in [0, 1], uniform units give the distribution's values."""

    @abstractmethod
    def unit_of(self, value: Any) -> float:
        """The share of the range, in [0, 1], at which a value lies; for steps the middle of the value's bin."""

    @abstractmethod
    def refuses(self, value: object) -> str | None:
        """What is allowed instead, where a study may not fix the hyperparameter to `value`; else None."""


class FloatParameter(ParameterBase):
    """A real number in [low, high]."""

    kind: Literal["float"] = Field(description="a real number")
    low: Number = Field(description="lower end")
    high: Number = Field(description="upper end")
    log: bool = Field(default=False, description="uniform in the logarithm")
    default: Number = Field(description="value where nothing is searched")
    published: Annotated[tuple[Number, ...], Field(strict=False)] = Field(
        default=(), description="best values published for NequIP or Allegro, else the library's default"
    )

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        _check_bounds(self)
        return self

    def distribution(self) -> FloatDistribution:
        """The same range as Optuna's distribution."""
        return FloatDistribution(self.low, self.high, log=self.log)

    def value_at(self, unit: float) -> float:
        """The value at a share of the range, `unit` in [0, 1]."""
        low, high = _scaled(self.low, self.log), _scaled(self.high, self.log)
        scaled = low + _unit(unit) * (high - low)
        return min(max(math.exp(scaled) if self.log else scaled, self.low), self.high)

    def unit_of(self, value: float) -> float:
        """The share of the range, in [0, 1], at which a value lies."""
        low, high = _scaled(self.low, self.log), _scaled(self.high, self.log)
        return (_scaled(_inside(self, value), self.log) - low) / (high - low)

    def refuses(self, value: Any) -> str | None:
        """Any finite number may be fixed, also outside the range; negative only where the range is."""
        if not _is_number(value):
            return f"a number, for example {self.default:g}"
        if self.role is Role.LEARNING_RATE and value <= 0.0:
            return "a number above 0"
        return "a number of 0 or more" if value < 0.0 <= self.low else None


class IntParameter(ParameterBase):
    """A whole number in [low, high]."""

    kind: Literal["int"] = Field(description="a whole number")
    low: int = Field(description="lower end")
    high: int = Field(description="upper end")
    log: bool = Field(default=False, description="uniform in the logarithm")
    default: int = Field(description="value where nothing is searched")

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        _check_bounds(self)
        return self

    def distribution(self) -> IntDistribution:
        """The same range as Optuna's distribution."""
        return IntDistribution(self.low, self.high, log=self.log)

    def value_at(self, unit: float) -> int:
        """The whole number at a share of the range; each owns the interval of half a step around it, as in Optuna."""
        low, high = _scaled(self.low - 0.5, self.log), _scaled(self.high + 0.5, self.log)
        scaled = low + _unit(unit) * (high - low)
        value = math.floor((math.exp(scaled) if self.log else scaled) + 0.5)
        return min(max(value, self.low), self.high)

    def unit_of(self, value: int) -> float:
        """The middle of the value's interval as a share of the range, in [0, 1]."""
        low, high = _scaled(self.low - 0.5, self.log), _scaled(self.high + 0.5, self.log)
        ends = (_scaled(_inside(self, value) + half, self.log) for half in (-0.5, 0.5))
        return (sum(ends) / 2.0 - low) / (high - low)

    def refuses(self, value: object) -> str | None:
        """Any whole number may be fixed, also outside the range; below 1 only where the range goes there."""
        if not isinstance(value, int) or not _is_number(value):
            return f"an integer, for example {self.default}"
        return "an integer of 1 or more" if value < 1 <= self.low else None


class ChoiceParameter(ParameterBase):
    """One of a few values, equally likely."""

    kind: Literal["choice"] = Field(description="one of a few values")
    choices: Annotated[tuple[Scalar, ...], Field(strict=False, min_length=2)] = Field(
        description="the values; null may be one"
    )
    default: Scalar = Field(description="value where nothing is searched")

    @model_validator(mode="after")
    def _check_choices(self) -> Self:
        if len({_identity(choice) for choice in self.choices}) < len(self.choices):
            raise ValueError(f"{list(self.choices)} in choices; allowed: each value once")
        if self.refuses(self.default):
            raise ValueError(f"{self.default!r} as default; allowed: {self.refuses(self.default)}")
        return self

    def distribution(self) -> CategoricalDistribution:
        """The same choices as Optuna's distribution."""
        return CategoricalDistribution(self.choices)

    def value_at(self, unit: float) -> Scalar:
        """The choice at a share of the range, cut into equal bins in the order of the file."""
        return self.choices[min(math.floor(_unit(unit) * len(self.choices)), len(self.choices) - 1)]

    def unit_of(self, value: Scalar) -> float:
        """The middle of the choice's bin, in [0, 1]."""
        identities = [_identity(choice) for choice in self.choices]
        if _identity(value) not in identities:
            raise ValueError(f"found {value!r}, allowed: one of {list(self.choices)}")
        return (identities.index(_identity(value)) + 0.5) / len(self.choices)

    def refuses(self, value: object) -> str | None:
        """Only a choice may be fixed."""
        known = [_identity(choice) for choice in self.choices]
        return None if _identity(value) in known else f"one of {_listed(self.choices)}"


Parameter = FloatParameter | IntParameter | ChoiceParameter
Tagged = Annotated[Parameter, Field(discriminator="kind")]


class Setting(Section):
    """A hyperparameter that is not searched."""

    value: Scalar = Field(description="its value in every trial of the arm")
    source: str = Field(min_length=1, description="who published the value, or why it is alike in all arms")


class SearchSpace(Section):
    """One optimizer's hyperparameters: what is searched and what is fixed."""

    name: Name = Field(description="name of the optimizer and of the file")
    description: str = Field(min_length=1, description="what the optimizer does, and which variant this is")
    implementation: str = Field(description="import path of the update rule")
    available: bool = Field(default=True, description="false where this version has no update rule")
    reason: str | None = Field(default=None, description="why it is not available")
    schedule: Annotated[ScheduleKind, Field(strict=False)] | None = Field(
        default=None, description="kind of learning-rate schedule that belongs to the optimizer; the warm-up stays"
    )
    treats: Annotated[Treats, Field(strict=False)] = Field(
        default=Treats.ALL,
        description="weights under the optimizer's own rule: all, or the matrices that fctp_view makes of the model",
    )
    readout: Literal["ema", "schedule_free"] = Field(
        default="ema", description="averaged weights that are read out: their moving average, or schedule-free's own x"
    )
    parameters: dict[Name, Tagged] = Field(description="searched hyperparameters by name")
    fixed: dict[Name, Setting] = Field(default_factory=dict, description="what is not searched, by name")

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        both = sorted(self.parameters.keys() & self.fixed.keys())
        if both:
            raise ValueError(f"{both[0]} both in parameters and in fixed; allowed: one of the two")
        if not self.available and not self.reason:
            raise ValueError("available: false without a reason; allowed: a reason")
        if self.treats is Treats.MATRICES and "fctp_view" not in {*self.parameters, *self.fixed}:
            raise ValueError("treats: matrices without fctp_view; allowed: fctp_view in parameters or in fixed")
        return self

    @classmethod
    def load(cls, name: str, path: Path | None = None) -> SearchSpace:
        """The search space of an optimizer, from ``search_spaces/NAME.yaml`` or from another file.

        Raises:
            StudyError: unknown optimizer, or a file that is missing, malformed or about another optimizer.
        """
        file = path or _shipped_file(name)
        space = parse(cls, read_yaml(file), file)
        if space.name != name:
            raise StudyError(file, "name", space.name, f"{name}, the optimizer that names this file")
        return space

    def defaults(self) -> dict[str, Scalar]:
        """The configuration nobody tuned: every default, and what is fixed."""
        return {**{name: parameter.default for name, parameter in self.parameters.items()}, **self.fixed_values()}

    def fixed_values(self) -> dict[str, Scalar]:
        """What is not searched, without its sources."""
        return {name: setting.value for name, setting in self.fixed.items()}

    def fix(self, values: dict[str, Any]) -> SearchSpace:
        """The space with hyperparameters moved out of the search; doing it twice changes nothing.

        Raises:
            ValueError: a value that `fixing_problems` refuses.
        """
        for problem in self.fixing_problems(values, ""):
            raise ValueError(f"{problem.key}: found {problem.found!r}, allowed: {problem.allowed}")
        settings = {name: self._setting(name, value) for name, value in values.items()}
        rest = {name: parameter for name, parameter in self.parameters.items() if name not in values}
        return self.model_copy(update={"parameters": rest, "fixed": {**self.fixed, **settings}})

    def untuned(self) -> SearchSpace:
        """The space that searches nothing: every hyperparameter at its default."""
        settings = {
            name: Setting(value=parameter.default, source=f"default, not tuned; {parameter.source}")
            for name, parameter in self.parameters.items()
        }
        return self.model_copy(update={"parameters": {}, "fixed": {**self.fixed, **settings}})

    def fixing_problems(self, values: dict[str, Any], key: str) -> list[Problem]:
        """What is wrong with hyperparameters that a study fixes; `key` is put in front of each name."""
        problems = []
        for name, value in values.items():
            place = f"{key}.{name}".removeprefix(".")
            if name in self.parameters:
                allowed = self.parameters[name].refuses(value)
            elif name in self.fixed:
                allowed = _unlike(value, self.fixed[name].value)
            else:
                problems.append(Problem(place, value, one_of([*self.parameters, *self.fixed], name)))
                continue
            if allowed:
                problems.append(Problem(place, value, allowed))
        return problems

    def schedule_of(self, arm: Arm, study: Schedule) -> Schedule:
        """The arm's own schedule, else the study's with the optimizer's own kind."""
        if arm.schedule is not None:
            return arm.schedule
        return study if self.schedule is None else study.model_copy(update={"kind": self.schedule})

    def _setting(self, name: str, value: Any) -> Setting:
        if name in self.fixed and _identity(self.fixed[name].value) == _identity(value):
            return self.fixed[name]
        parameter = self.parameters.get(name)
        if isinstance(parameter, FloatParameter):
            value = float(value)
        if isinstance(parameter, ChoiceParameter):
            value = parameter.value_at(parameter.unit_of(value))
        return Setting(value=value, source="fixed by the study")


def available_optimizers() -> tuple[str, ...]:
    """Names of the optimizers that have a search space and an update rule, in alphabetical order."""
    return tuple(name for name in shipped_optimizers() if SearchSpace.load(name).available)


def shipped_optimizers() -> tuple[str, ...]:
    """Names of all search spaces, available or not, in alphabetical order."""
    return tuple(sorted(file.stem for file in shipped_folder("search_spaces").glob("*.yaml")))


def _shipped_file(name: str) -> Path:
    if name not in shipped_optimizers():
        raise StudyError(
            shipped_folder("search_spaces"), name, InWords("no search space"), one_of(available_optimizers(), name)
        )
    return shipped_folder("search_spaces") / f"{name}.yaml"


def _check_bounds(parameter: FloatParameter | IntParameter) -> None:
    low, high = parameter.low, parameter.high
    if not low < high:
        raise ValueError(f"low {low:g}, high {high:g}; allowed: low below high")
    if parameter.log and low <= 0:
        raise ValueError(f"low {low:g} with log; allowed: low above 0")
    if not low <= parameter.default <= high:
        raise ValueError(f"default {parameter.default:g}; allowed: {low:g} to {high:g}")


def _unit(unit: float) -> float:
    if not 0.0 <= unit <= 1.0:
        raise ValueError(f"unit: found {unit!r}, allowed: 0 to 1")
    return unit


def _inside(parameter: FloatParameter | IntParameter, value: float) -> float:
    if not parameter.low <= value <= parameter.high:
        raise ValueError(f"found {value!r}, allowed: {parameter.low:g} to {parameter.high:g}")
    return value


def _scaled(value: float, log: bool) -> float:
    return math.log(value) if log else value


def _identity(value: object) -> tuple[str, object]:
    """Tells true from 1, but not 10 from 10.0."""
    return ("bool", value) if isinstance(value, bool) else ("", value)


def _listed(values: tuple[Scalar, ...]) -> str:
    return ", ".join(json.dumps(value) for value in values)


def _is_number(value: object) -> bool:
    """A finite number of ordinary size; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _HUGE


def _unlike(value: Any, like: Scalar) -> str | None:
    """What is allowed where `value` is not of the sort of the setting it would replace."""
    if isinstance(like, bool) or isinstance(value, bool):
        return None if isinstance(value, bool) and isinstance(like, bool) else f"a value like {like!r}"
    if isinstance(like, int | float):
        allowed = f"{'an integer' if isinstance(like, int) else 'a number'} of 0 or more, like {like:g}"
        whole = isinstance(value, int) or not isinstance(like, int)
        return None if whole and _is_number(value) and value >= 0 else allowed
    return None if isinstance(value, type(like)) else f"a value like {like!r}"
