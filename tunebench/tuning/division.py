"""What is divided among the drivers of one stage: its arms, once, and the places for its trials, again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto

from tunebench.tuning.entries import Called, Decided, Ended, Entry, Started, Waiting


def divided_arms(reports: Mapping[str, int], drivers: int) -> list[list[str]]:
    """Arms of each driver, whole, so that drivers have about equally many reports to take in.

    What a driver does, it does for reports, whatever number of steps lies between them. The largest arm goes first, to
    the driver with the fewest reports so far; arms that are equal go round, so that each driver gets some of every
    workload where there are enough.

    Args:
        reports: still to come, by arm in the order of the study; an arm without any goes to nobody.
        drivers: at most so many; fewer where there are fewer arms.
    """
    open_arms = sorted((arm for arm in reports if reports[arm]), key=lambda arm: -reports[arm])
    shares: list[list[str]] = [[] for _ in range(min(drivers, len(open_arms)))]
    loads = [0] * len(shares)
    for arm in open_arms:
        lightest = loads.index(min(loads))
        shares[lightest].append(arm)
        loads[lightest] += reports[arm]
    return shares


class _Need(Enum):
    """What an open trial needs."""

    PLACE = auto()  # and has none
    NOTHING = auto()  # it has its place, or is about to take it
    DECISION = auto()  # of its rung


class Places:
    """Divides places, the slots of a pool, among drivers that start trials on their own.

    Places go to workloads in their order, as one driver would fill them, and within a workload to drivers by the number
    of trials that have a place there or could take one. What a driver was given goes to no other before it has heard
    that it has less, and has fewer trials in places: all drivers together have no more trials there than places, unless
    places vanish.

    Args:
        shares: open trials of each driver, with their workloads.
    """

    def __init__(self, shares: Sequence[Mapping[str, str]]) -> None:
        self._workload_of = [dict(share) for share in shares]
        self._workloads = list(dict.fromkeys(name for share in shares for name in share.values()))
        self._needs = [dict.fromkeys(share, _Need.PLACE) for share in shares]
        self._active = [Counter(share.values()) for share in shares]  # trials that have a place or need one
        self._placed = [0 for _ in shares]
        self._given = [0 for _ in shares]
        self._heard = [0 for _ in shares]
        self._fair: tuple[int, list[int]] | None = None

    def take(self, driver: int, entries: Iterable[Entry]) -> None:
        """Take in what a driver tells; it has heard of the places that it was given last."""
        self._heard[driver] = self._given[driver]
        for entry in entries:
            trial = entry.key.trial_id
            before = self._needs[driver].get(trial)
            if before is not None and (after := _need_after(entry, before)) is not before:
                self._change(driver, trial, before, after)

    def give(self, driver: int, places: int) -> int:
        """How many of so many places a driver may fill from now on."""
        if self._fair is None or self._fair[0] != places:
            self._fair = places, self._fairly(places)
        others = sum(self._held(other) for other in range(len(self._given)) if other != driver)
        self._given[driver] = max(min(self._fair[1][driver], places - others), 0)
        return self._given[driver]

    def end(self, driver: int) -> None:
        """A driver has ended; it needs no place."""
        for trial, need in list(self._needs[driver].items()):
            self._change(driver, trial, need, None)
        self._given[driver] = self._heard[driver] = 0

    def _change(self, driver: int, trial: str, before: _Need, after: _Need | None) -> None:
        was, comes = (need in (_Need.PLACE, _Need.NOTHING) for need in (before, after))
        self._active[driver][self._workload_of[driver][trial]] += comes - was
        self._placed[driver] += (after is _Need.NOTHING) - (before is _Need.NOTHING)
        if after is None:
            del self._needs[driver][trial]
        else:
            self._needs[driver][trial] = after
        self._fair = None

    def _held(self, driver: int) -> int:
        return max(self._given[driver], self._heard[driver], self._placed[driver])

    def _fairly(self, places: int) -> list[int]:
        fair = [0 for _ in self._active]
        for workload in self._workloads:
            active = [of_driver[workload] for of_driver in self._active]
            for driver, part in enumerate(_shared(min(places - sum(fair), sum(active)), active)):
                fair[driver] += part
        return fair


def _need_after(entry: Entry, before: _Need) -> _Need | None:
    """What a trial needs after an entry; None at its end."""
    match entry:
        case Called() | Started():
            return _Need.NOTHING
        case Waiting(for_rung=for_rung):
            return _Need.DECISION if for_rung else _Need.PLACE
        case Decided(decision=decision) if before is _Need.DECISION and (decision["goes_on"] or decision["sentinel"]):
            return _Need.PLACE
        case Ended():
            return None
    return before


def _shared(places: int, needs: Sequence[int]) -> list[int]:
    """Places by need, in whole numbers: largest remainders, and the first driver among equals."""
    if places <= 0:
        return [0] * len(needs)
    parts = [places * need // sum(needs) for need in needs]
    by_remainder = sorted(range(len(needs)), key=lambda driver: -(places * needs[driver] % sum(needs)))
    for driver in by_remainder[: places - sum(parts)]:
        parts[driver] += 1
    return parts
