"""The form of what a journal holds of a trial: whatever damaged it, no reader goes on with half of the truth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from optuna.storages.journal._storage import JournalOperation  # no public name for the entries of a journal
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tunebench.study.decision import Decision
from tunebench.study.record import Reason, Stage


class _Form(BaseModel):
    """Checked, not converted; further keys may come with later versions."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Key(_Form):
    model_config = ConfigDict(extra="forbid")

    workload: str
    optimizer: str
    stage: Annotated[Stage, Field(strict=False)]
    config_index: int
    seed_index: int


class _Detail(_Form):
    message: str = ""
    rung: int = 0
    cutoff: float = 0.0
    value: float = 0.0
    recorded: int = 0


class _Ledger(_Form):
    steps: int
    wall_s: float
    device_s: float
    attempts: int


class _Group(_Form):
    rule: str
    share: float
    view: str = "vector"


class _Trial(_Form):
    trial_id: str
    key: _Key
    seeds: dict[str, int]
    data_hash: str | None = None
    sentinel: bool = False
    engine: str | None = None
    device: str | None = None
    reason: Annotated[Reason, Field(strict=False)] | None = None
    detail: _Detail = _Detail()
    ledger: _Ledger = _Ledger(steps=0, wall_s=0.0, device_s=0.0, attempts=0)
    groups: list[_Group] = Field(default_factory=list)
    decisions: list[Decision] = Field(default_factory=list)
    result: dict[str, dict[str, dict[str, float]]] = Field(default_factory=dict)


class _Measured(_Form):
    values: list[float] | None
    rungs: dict[int, float]


def check_trial(
    attributes: dict[str, Any], late: list[dict[str, Any]], values: list[float] | None, rungs: dict[int, float]
) -> None:
    """Refuse a trial that no driver could have written.

    Args:
        attributes: its user attributes.
        late: decisions that are kept with its arm.
        values: objectives at its end.
        rungs: objective by step.

    Raises:
        ValueError: one line with the first key that is wrong.
    """
    given = {name: value for name, value in attributes.items() if (name, value) != ("ledger", {})}
    try:
        _Trial.model_validate(given | {"decisions": [*given.get("decisions", []), *late]})
        _Measured.model_validate({"values": values, "rungs": rungs})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{attributes.get('trial_id')!r}: {place}: {first['msg']}") from None


def damaged_line(path: Path) -> int | None:
    """The first line of a journal, counted from 1, that is whole and no entry; None where there is none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n") and not _is_entry(line):
                return number
    return None


def planned_trials(path: Path) -> int:
    """Entries of a journal that plan a trial.

    Raises:
        ValueError: its last line ends and is no entry, which Optuna would leave out without a word. What stands behind
            the last line that ends is being written and does not count.
    """
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    if whole and not _is_entry(whole.rpartition(b"\n")[2]):
        raise ValueError("its last entry is damaged")
    return whole.count(b'{"op_code":%d,' % JournalOperation.CREATE_TRIAL)


def _is_entry(line: bytes) -> bool:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(entry, dict) and isinstance(entry.get("op_code"), int)
