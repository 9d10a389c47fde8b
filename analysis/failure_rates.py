"""How often trials fail, with exact binomial intervals."""

from __future__ import annotations

from dataclasses import dataclass

from tunebench.study.false_stops import clopper_pearson


@dataclass(frozen=True, kw_only=True)
class FailureRate:
    """Failures among ended trials, with the share and its Clopper-Pearson 95 % interval; ``None`` without a trial."""

    failed: int
    ended: int
    share: float | None
    low: float | None
    high: float | None


def failure_rate(failed: int, ended: int) -> FailureRate:
    """Share of failed trials with its exact interval (Clopper and Pearson 1934), which never under-covers.

    Raises:
        ValueError: a negative number, or more failures than trials.
    """
    if not 0 <= failed <= ended:
        raise ValueError(f"failure rate: found {failed} of {ended}, allowed: between 0 and all of them")
    if ended == 0:
        return FailureRate(failed=0, ended=0, share=None, low=None, high=None)
    low, high = clopper_pearson(failed, ended)
    return FailureRate(failed=failed, ended=ended, share=failed / ended, low=low, high=high)
