"""Numbers and records in words, for the page, the figures and the tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from analysis.statistics import Interval
from tunebench.study.record import Reason, TrialRecord

NOT_AVAILABLE = "not available"
NO_INTERVAL = "no interval"
ABSENT = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"


def number(value: object, digits: int = 4) -> str:
    """A value to some significant digits; a dash where there is none."""
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return f"{value:.{digits}g}".replace("inf", "∞").replace("-∞", f"{MINUS}∞")
    return str(value)


def milli(value: float) -> str:
    """A number times 1000 (eV to meV) with three or so significant digits; ``∞`` for a failure."""
    if math.isinf(value):
        return "∞" if value > 0.0 else f"{MINUS}∞"
    magnitude = float(f"{abs(1000.0 * value):.3g}")
    digits = 0 if magnitude >= 100.0 else 1 if magnitude >= 10.0 else 2 if magnitude >= 1.0 else 3
    return f"{1000.0 * value:.{digits}f}".replace("-", MINUS)


def milli_interval(interval: Interval | None) -> str:
    """An interval times 1000, or a plain statement that there is none."""
    return NO_INTERVAL if interval is None else f"[{milli(interval.low)}, {milli(interval.high)}]"


def percent(share: float | None) -> str:
    """A share of one in whole percent."""
    return NOT_AVAILABLE if share is None else f"{100.0 * share:.0f}\N{NO-BREAK SPACE}%"


def counted(count: int, noun: str) -> str:
    """A number of things, the noun in the plural unless there is one."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(names: Iterable[str]) -> str:
    """Names with commas between them."""
    return ", ".join(names)


def params(values: Mapping[str, Any]) -> str:
    """Hyperparameters in one line, three significant digits each."""
    return listed(f"{name} {number(value, 3)}" for name, value in values.items())


def why(trial: TrialRecord) -> str:
    """The detail of a trial's end: for a stop the rung, the value and the cutoff; else the message."""
    detail = trial.detail
    if trial.reason is Reason.STOPPED_ASHA and "rung" in detail:
        value, cutoff = number(detail.get("value")), number(detail.get("cutoff"))
        return f"rung {detail['rung']}: {value} above cutoff {cutoff}"
    return " ".join(str(detail.get("message", "")).split())
