"""Every trial of a run by columns, for the page's table: short names once, numbers to four digits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from analysis.load import Run
from analysis.wording import why
from tunebench.study.record import TrialRecord

_DIGITS = 4


def trial_table(run: Run) -> dict[str, Any]:
    """Columns of equal length, one entry per trial in the order of the journal.

    ``workload``, ``optimizer``, ``stage`` and ``ended`` are places in ``names``; the hyperparameters of a trial are
    values in the order of ``params`` of its optimizer.
    """
    names: dict[str, list[str]] = {"workload": [], "optimizer": [], "stage": [], "ended": []}
    keys = {
        "workload": [trial.key.workload for trial in run.trials],
        "optimizer": [trial.key.optimizer for trial in run.trials],
        "stage": [trial.key.stage.value for trial in run.trials],
        "ended": [trial.reason.value if trial.reason else trial.state.lower() for trial in run.trials],
    }
    coded = {column: _coded(values, names[column]) for column, values in keys.items()}
    params = {name: _parameter_names(run, name) for name in names["optimizer"]}
    return {
        "names": names,
        "params": params,
        **coded,
        "config": [trial.key.config_index for trial in run.trials],
        "seed": [trial.key.seed_index for trial in run.trials],
        "steps": [_short(trial.ledger.get("steps")) for trial in run.trials],
        "device_s": [_short(trial.ledger.get("device_s")) for trial in run.trials],
        "objective": [_short(trial.value) for trial in run.trials],
        "values": [[_short(trial.params.get(name)) for name in params[trial.key.optimizer]] for trial in run.trials],
        "why": [why(trial) for trial in run.trials],
    }


def _coded(values: Sequence[str], names: list[str]) -> list[int]:
    places: dict[str, int] = {}
    for value in values:
        places.setdefault(value, len(places))
    names.extend(places)
    return [places[value] for value in values]


def _parameter_names(run: Run, optimizer: str) -> list[str]:
    own: dict[str, None] = {}
    for trial in _of(run, optimizer):
        own.update(dict.fromkeys(trial.params))
    return list(own)


def _of(run: Run, optimizer: str) -> Sequence[TrialRecord]:
    return [trial for trial in run.trials if trial.key.optimizer == optimizer]


def _short(value: Any) -> Any:
    """A number to four digits, infinite ones as words; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0.0 else "-inf"
    rounded = float(f"{value:.{_DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
