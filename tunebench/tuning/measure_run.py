"""The properties of a run whose training is over, on any machine that has its run directory."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from tunebench.properties.models_of_run import property_progress
from tunebench.properties.registry import check_installed
from tunebench.study.errors import RunError
from tunebench.study.journal import read_trials
from tunebench.study.resolve import load_run
from tunebench.study.run_copy import RunCopy, named_storage
from tunebench.study.status import training_is_over
from tunebench.tuning.console_lines import say
from tunebench.tuning.ray_environment import leaving_ray, set_ray_environment, terminate_like_interrupt
from tunebench.tuning.run_folder import held_run
from tunebench.tuning.runner import RunOptions


def measure_run(run: Path, address: str | None, console: Console) -> dict[str, Any]:
    """Compute what the properties of a run lack; it takes the models alone, neither data nor base model.

    Args:
        run: the run directory, perhaps a copy of the one that the training wrote.
        address: Ray cluster to join, None for a cluster of this machine alone.
        console: takes lines of progress.

    Returns:
        ``run`` and the plain form of `PropertyProgress`.

    Raises:
        StudyError: the directory holds no study, or one that was edited.
        RunError: the study asks for no properties, trials have not ended, or a library is missing.
        Interrupted: that was asked; what is done is kept.
    """
    terminate_like_interrupt()
    resolved = load_run(run)
    if not resolved.study.properties:
        raise RunError(f"{run}: found a study without properties, allowed: one with, or a model with --settings")
    check_installed()
    records = read_trials(run)
    if not training_is_over(records):
        left = sum(record.reason is None for record in records)
        found = f"{left} trials that have not ended" if left else "no confirm stage"
        raise RunError(f"{run}: found {found}, allowed: a run whose training is over; `tunebench run` goes on with it")
    storage = named_storage(run, None)
    with held_run(resolved, run, storage), RunCopy(run, storage, partial(say, console)) as copy, leaving_ray():
        copy.fetch()
        set_ray_environment(address)
        from tunebench.tuning.property_tasks import run_properties  # imports Ray, which reads its environment now

        run_properties(resolved, records, RunOptions(run=run, address=address), storage, console)
    return {"run": str(run), **property_progress(resolved.study, records, run).to_plain()}
