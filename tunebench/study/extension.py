"""A run that was given more configurations than its study file says, every arm alike (rules F2 and F5)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tunebench.study.errors import RunError
from tunebench.study.files import replacing

if TYPE_CHECKING:
    from tunebench.study.resolve import ResolvedStudy

EXTENSION = "extension.json"


def extended(resolved: ResolvedStudy, run: Path) -> ResolvedStudy:
    """The study with the configurations per arm that its run was extended to; its hash stays that of the frozen study.

    Raises:
        RunError: the file of the extension cannot be read.
    """
    file = run / EXTENSION
    if not file.is_file():
        return resolved
    least = resolved.study.tune.trials_per_arm
    try:
        trials = json.loads(file.read_text(encoding="utf-8"))["trials_per_arm"]
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{file}: found {error}, allowed: trials_per_arm, an integer of at least {least}") from None
    if not isinstance(trials, int) or trials < least:
        raise RunError(f"{file}: trials_per_arm: found {trials!r}, allowed: an integer of at least {least}")
    own = resolved.study.tune
    cap = own.device_seconds_per_arm
    longer = None if cap is None else cap * trials / own.trials_per_arm
    tune = own.model_copy(update={"trials_per_arm": trials, "device_seconds_per_arm": longer})
    return replace(resolved, study=resolved.study.model_copy(update={"tune": tune}))


def extend(resolved: ResolvedStudy, run: Path, more: int) -> None:
    """Give every arm of a run so many more configurations; the next `tunebench run` trains them.

    They continue the sequence of the first ones. Trials that were stopped stay stopped.

    Raises:
        RunError: the folder of the run cannot be written.
    """
    trials = extended(resolved, run).study.tune.trials_per_arm + more
    try:
        with replacing(run / EXTENSION) as partial:
            partial.write_text(json.dumps({"trials_per_arm": trials}) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunError(f"{run / EXTENSION}: found {error.strerror}, allowed: a file that can be written") from error
