"""What a rung says of a trial, as the journal keeps it."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict


class Fate(StrEnum):
    """What a trial at a rung does."""

    GO_ON = "go_on"
    WAIT = "wait"
    STOP = "stop"


class Decision(BaseModel):
    """What a rung says of a trial; checked, not converted, and further keys may come with later versions.

    Attributes:
        trial: its id.
        rung: step.
        value: its objective there; infinite where it was not finite.
        cutoff: the largest objective that goes on; infinite where no objective was finite.
        competitors: trials it was compared with, itself included, those that ended before the rung among them.
        goes_on: whether it is among the best.
        sentinel: whether it goes on all the same.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    trial: str
    rung: int
    value: float
    cutoff: float
    competitors: int
    goes_on: bool
    sentinel: bool = False

    @property
    def fate(self) -> Fate:
        """What the trial does."""
        return Fate.GO_ON if self.goes_on or self.sentinel else Fate.STOP

    def to_plain(self) -> dict[str, Any]:
        """Numbers, strings and truth values only."""
        return self.model_dump()
