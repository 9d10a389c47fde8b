"""Which trial goes to which cohort, and which workload an empty cohort trains next: decisions only, nothing is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Admit:
    """Put a waiting trial into a slot of a cohort."""

    trial: str
    cohort: int


@dataclass(frozen=True, kw_only=True)
class Open:
    """Let an empty cohort train a workload from now on."""

    cohort: int
    workload: str


@dataclass
class _Cohort:
    """A cohort as far as places go.

    Attributes:
        kind: of its device.
        workload: what it trains or is being made ready for.
        slots: 0 while it is not ready.
        trials: who is in.
        closed: its only trial is to stay alone.
        retired: nobody gets in any more.
    """

    kind: str = ""
    workload: str | None = None
    slots: int = 0
    trials: set[str] = field(default_factory=set)
    closed: bool = False
    retired: bool = False

    def room_for(self, applicant: _Applicant) -> int:
        """Free slots for a trial."""
        if self.retired or self.closed or (applicant.alone and self.trials):
            return 0
        return self.slots - len(self.trials)

    def leave(self, trial: str) -> None:
        self.trials.discard(trial)
        self.closed = self.closed and bool(self.trials)


@dataclass(frozen=True)
class _Applicant:
    """A trial that waits for a place; one that may break a cohort gets one to itself."""

    workload: str
    alone: bool


class Placement:
    """Slots, and who has them or waits for one. Equal histories give equal decisions.

    A trial goes to the cohort of its workload with the most free slots. An empty cohort goes to the workload with the
    most waiting trials for each cohort that it has; ties go to the workload that was planned first. A cohort that has
    trained nothing yet is taken before one that would have to change its workload. A trial that is to be alone gets an
    empty cohort to itself. Trials of a workload that is bound to a kind of device go to no other.
    """

    def __init__(self) -> None:
        self._cohorts: dict[int, _Cohort] = {}
        self._waiting: dict[str, _Applicant] = {}
        self._planned: dict[str, str] = {}
        self._planned_of: Counter[str] = Counter()
        self._workloads: list[str] = []
        self._kinds: dict[str, str] = {}

    # --- what happens ----------------------------------------------------------------------------------------------

    def plan(self, trials: Iterable[tuple[str, str]]) -> None:
        """Trials, with their workloads, that will ask for a place in this order; replaces those of before."""
        self._planned = dict(trials)
        self._planned_of = Counter(self._planned.values())
        self._workloads += [name for name in dict.fromkeys(self._planned.values()) if name not in self._workloads]

    def bind(self, kinds: Mapping[str, str]) -> None:
        """From now on, kinds of device by workload whose trials go to no other; replaces those of before."""
        self._kinds = dict(kinds)

    def wait(self, trial: str, workload: str, *, alone: bool = False) -> None:
        """A trial asks for a place, or for a cohort without any other trial."""
        if trial in self._planned:
            self._planned_of[self._planned.pop(trial)] -= 1
        self._waiting[trial] = _Applicant(workload, alone)

    def leave(self, trial: str) -> None:
        """A trial needs no place any more, wherever it is."""
        self._waiting.pop(trial, None)
        for cohort in self._cohorts.values():
            cohort.leave(trial)

    def add(self, cohort: int, kind: str = "") -> None:
        """There is a new cohort, on a device of some kind, which trains nothing yet."""
        self._cohorts[cohort] = _Cohort(kind=kind)

    def ready(self, cohort: int, slots: int) -> None:
        """A cohort can take trials of the workload it was opened for."""
        self._cohorts[cohort].slots = slots

    def retire(self, cohort: int) -> None:
        """A cohort is about to go: its trials are still in, nobody else gets in."""
        if cohort in self._cohorts:
            self._cohorts[cohort].retired = True

    def remove(self, cohort: int) -> set[str]:
        """A cohort is gone; returns the trials that were in."""
        return self._cohorts.pop(cohort, _Cohort()).trials

    # --- what follows ----------------------------------------------------------------------------------------------

    def moves(self) -> list[Admit | Open]:
        """Decide all that can be decided now; what is returned counts as done."""
        found: list[Admit | Open] = []
        without_room: set[_Applicant] = set()  # who is like one of them need not be looked at
        for trial, applicant in list(self._waiting.items()):
            number = None if applicant in without_room else self._roomiest(applicant)
            if number is None:
                without_room.add(applicant)
            else:
                del self._waiting[trial]
                self._cohorts[number].trials.add(trial)
                self._cohorts[number].closed = applicant.alone
                found.append(Admit(trial=trial, cohort=number))
        for number, cohort in sorted(self._cohorts.items(), key=lambda item: (item[1].workload is not None, item[0])):
            following = self._next_workload(cohort)
            if following is not None:
                self._cohorts[number] = _Cohort(kind=cohort.kind, workload=following)
                found.append(Open(cohort=number, workload=following))
        return found

    def coming(self) -> int:
        """Trials that wait for a place or have not asked yet."""
        return len(self._waiting) + len(self._planned)

    def company(self, workload: str) -> int:
        """Trials of a workload that are still to come and may share a cohort."""
        waiting = sum(applicant == _Applicant(workload, alone=False) for applicant in self._waiting.values())
        return waiting + self._planned_of[workload]

    def of(self, workload: str) -> list[int]:
        """Cohorts that train a workload or are being made ready for it."""
        return [number for number, cohort in self._cohorts.items() if cohort.workload == workload]

    def waiting(self) -> list[str]:
        """Trials that wait for a place, in the order they came."""
        return list(self._waiting)

    def asleep(self) -> list[int]:
        """Cohorts without trials that are not being made ready."""
        return [n for n, cohort in self._cohorts.items() if not cohort.trials and (cohort.slots or not cohort.workload)]

    def trials_of(self, cohort: int) -> frozenset[str]:
        """Who is in a cohort; nobody where there is none of that number."""
        return frozenset(self._cohorts[cohort].trials) if cohort in self._cohorts else frozenset()

    def workload_of(self, cohort: int) -> str | None:
        """What a cohort trains or is being made ready for."""
        return self._cohorts[cohort].workload if cohort in self._cohorts else None

    def place_of(self, trial: str) -> int | None:
        """The cohort that a trial is in."""
        return next((number for number, cohort in self._cohorts.items() if trial in cohort.trials), None)

    def _roomiest(self, applicant: _Applicant) -> int | None:
        fit = [n for n in self.of(applicant.workload) if self._fits(applicant.workload, self._cohorts[n])]
        room = {number: self._cohorts[number].room_for(applicant) for number in fit}
        best = max(room, key=lambda number: (room[number], -number), default=None)
        return best if best is not None and room[best] > 0 else None

    def _next_workload(self, cohort: _Cohort) -> str | None:
        if cohort.retired or cohort.trials or (cohort.workload and not cohort.slots):
            return None
        others = [name for name in self._workloads if name != cohort.workload and self._fits(name, cohort)]
        candidates = [name for name in others if self._unserved(name) > 0]
        return max(candidates, key=self._pressure, default=None)

    def _fits(self, workload: str, cohort: _Cohort) -> bool:
        return self._kinds.get(workload, cohort.kind) == cohort.kind

    def _unserved(self, workload: str) -> int:
        """Waiting trials beyond one for each cohort that is being made ready for them."""
        opening = sum(not self._cohorts[number].slots for number in self.of(workload))
        return self._demand(workload) - opening

    def _pressure(self, workload: str) -> float:
        return self._demand(workload) / (len(self.of(workload)) + 1)

    def _demand(self, workload: str) -> int:
        return sum(applicant.workload == workload for applicant in self._waiting.values())
