"""How often an arm's rungs would have stopped a trial that was good: told by its sentinels (rule F13).

Imports neither Ray nor torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from scipy import stats

from tunebench.study.record import Reason, Stage, TrialRecord


@dataclass(frozen=True, kw_only=True)
class FalseStops:
    """What the sentinels of one arm tell.

    Attributes:
        sentinels: those that reached the horizon.
        would_stop: those of them that a rung would have stopped.
        wrongly: those of them that ended better than every trial of the arm whose rungs let it go on to the horizon.
        rate: `wrongly` / `sentinels`, None without sentinels.
        low, high: 95 % Clopper-Pearson interval of the rate; 0 to 1 without sentinels.
    """

    arm: str
    sentinels: int
    would_stop: int
    wrongly: int
    rate: float | None
    low: float
    high: float

    def to_plain(self) -> dict[str, Any]:
        """Numbers and strings only."""
        return asdict(self)


def false_stops(records: Iterable[TrialRecord]) -> list[FalseStops]:
    """By arm, in the order of the records, from the tune stage of a run."""
    of_arm: dict[str, list[TrialRecord]] = {}
    for record in records:
        if record.key.stage is Stage.TUNE:
            of_arm.setdefault(record.key.arm, []).append(record)
    return [_of_arm(arm, trials) for arm, trials in of_arm.items()]


def _of_arm(arm: str, trials: list[TrialRecord]) -> FalseStops:
    ended = [(t, t.value) for t in trials if t.reason is Reason.FINISHED and t.value is not None]
    kept = [value for trial, value in ended if _goes_on(trial)]
    sentinels = [(trial, value) for trial, value in ended if trial.sentinel]
    stopped = [value for trial, value in sentinels if not _goes_on(trial)]
    wrongly = sum(value < min(kept, default=float("inf")) for value in stopped)
    low, high = clopper_pearson(wrongly, len(sentinels))
    return FalseStops(
        arm=arm,
        sentinels=len(sentinels),
        would_stop=len(stopped),
        wrongly=wrongly,
        rate=wrongly / len(sentinels) if sentinels else None,
        low=low,
        high=high,
    )


def _goes_on(trial: TrialRecord) -> bool:
    return all(decision["goes_on"] for decision in trial.decisions)


def clopper_pearson(count: int, of: int) -> tuple[float, float]:
    """95 % interval of a probability from `count` events in `of` trials; 0 to 1 without trials."""
    if of == 0:
        return 0.0, 1.0
    interval = stats.binomtest(count, of).proportion_ci(confidence_level=0.95, method="exact")
    return float(interval.low), float(interval.high)
