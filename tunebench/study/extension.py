"""A run that was given more than its study file says: configurations, every arm alike, and wider ranges (F2, F5)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunebench.study.errors import RunError
from tunebench.study.files import replacing
from tunebench.study.search_space import FloatParameter

if TYPE_CHECKING:
    from tunebench.study.edges import Widening
    from tunebench.study.resolve import ResolvedStudy
    from tunebench.study.search_space import SearchSpace

EXTENSION = "extension.json"

Ranges = dict[str, dict[str, tuple[float, float]]]
"""Low and high end by optimizer and hyperparameter."""


@dataclass(frozen=True, kw_only=True)
class Extension:
    """What a run was given besides its study.

    Attributes:
        trials_per_arm: configurations of every arm, those of the study included.
        earlier: what that was at the start and before each later extension, ascending.
        widened: ranges that are wider than those of the study.
    """

    trials_per_arm: int
    earlier: tuple[int, ...]
    widened: Ranges


def extended(resolved: ResolvedStudy, run: Path) -> ResolvedStudy:
    """The study with the configurations and ranges that its run was extended to; its hash stays that of the frozen one.

    A cap on device-seconds grows with the configurations.

    Raises:
        RunError: the file of the extension cannot be read.
    """
    extension = read_extension(resolved, run)
    own = resolved.study.tune
    cap = own.device_seconds_per_arm
    longer = None if cap is None else cap * extension.trials_per_arm / own.trials_per_arm
    tune = own.model_copy(update={"trials_per_arm": extension.trials_per_arm, "device_seconds_per_arm": longer})
    spaces = {name: _widened(space, extension.widened.get(name, {})) for name, space in resolved.spaces.items()}
    study = resolved.study.model_copy(update={"tune": tune})
    return replace(resolved, study=study, spaces=spaces, earlier_trials_per_arm=extension.earlier)


def read_extension(resolved: ResolvedStudy, run: Path) -> Extension:
    """What a run was extended to; without an extension that is what the study says.

    Raises:
        RunError: the file of the extension cannot be read.
    """
    file, least = run / EXTENSION, resolved.study.tune.trials_per_arm
    if not file.is_file():
        return Extension(trials_per_arm=least, earlier=resolved.earlier_trials_per_arm, widened={})
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        trials, widened = content["trials_per_arm"], _ranges(content.get("widened", {}), resolved.spaces)
        earlier = tuple(content.get("earlier", [(*resolved.earlier_trials_per_arm, least)[0]]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file}: found {error}, allowed: trials_per_arm, an integer of at least {least}") from None
    if not isinstance(trials, int) or trials < least:
        raise RunError(f"{file}: trials_per_arm: found {trials!r}, allowed: an integer of at least {least}")
    numbers = all(isinstance(each, int) for each in earlier)
    if not earlier or not numbers or sorted({*earlier, trials}) != [*earlier, trials]:
        raise RunError(f"{file}: earlier: found {list(earlier)!r}, allowed: ascending integers below {trials}")
    return Extension(trials_per_arm=trials, earlier=earlier, widened=widened)


def extend(resolved: ResolvedStudy, run: Path, more: int, widenings: Sequence[Widening] = ()) -> None:
    """Give every arm of a run so many more configurations, and some wider ranges to draw them from.

    The next `tunebench run` trains them. They continue the sequence of the first ones. Trials that were stopped stay
    stopped.

    Raises:
        RunError: the folder of the run cannot be written.
    """
    before = read_extension(resolved, run)
    widened = {name: dict(ranges) for name, ranges in before.widened.items()}
    for each in widenings:
        widened.setdefault(each.optimizer, {})[each.parameter] = (each.low, each.high)
    trials = before.trials_per_arm
    after = Extension(trials_per_arm=trials + more, earlier=(*before.earlier, trials), widened=widened)
    try:
        with replacing(run / EXTENSION) as partial:
            partial.write_text(json.dumps(asdict(after)) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{run / EXTENSION}: found {error.strerror}, allowed: a file that can be written") from error


def _ranges(content: Mapping[str, Any], spaces: Mapping[str, SearchSpace]) -> Ranges:
    """Wider ranges from JSON.

    Raises:
        ValueError: a range of something that is not searched, or without room.
    """
    found: Ranges = {}
    for optimizer, ranges in content.items():
        for name, (low, high) in ranges.items():
            space = spaces.get(optimizer)
            parameter = space.parameters.get(name) if space else None
            if not isinstance(parameter, FloatParameter) or not low <= parameter.low < parameter.high <= high:
                raise ValueError(f"widened.{optimizer}.{name} from {low} to {high}")
            if parameter.log and low <= 0.0:
                raise ValueError(f"widened.{optimizer}.{name} from {low}")
            found.setdefault(optimizer, {})[name] = (float(low), float(high))
    return found


def _widened(space: SearchSpace, ranges: Mapping[str, tuple[float, float]]) -> SearchSpace:
    wider = {
        name: space.parameters[name].model_copy(update={"low": low, "high": high})
        for name, (low, high) in ranges.items()
    }
    return space.model_copy(update={"parameters": {**space.parameters, **wider}}) if wider else space
