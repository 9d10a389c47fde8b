"""The rungs of one arm and what they decide, apart from Tune, clocks and files.

Successive halving after Li et al., arXiv:1810.05934. In the promotion form a trial waits at its rung and goes on when
it is among the best ``1 / reduction_factor`` of its arm's trials there, or among so many as the confirm stage takes: a
search that leaves fewer would select by errors of different ages. In the deterministic order a rung is decided once,
when every trial that can still come has come or ended, so nothing but the results counts; in the asynchronous order a
trial goes on as soon as it is among the best of those seen so far. In the stopping form nobody waits: a trial is
judged when it arrives, by those who came before.

Sentinels are chosen before the start and never stopped; what the rung would have done with them is recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from tunebench.study.decision import Decision, Fate
from tunebench.study.spec import Asha, AshaForm, AshaOrder


class Ladder:
    """The rungs of one arm; equal results give equal decisions, and in the deterministic order in any sequence.

    A trial competes at a rung if it went on from all rungs before. One that ended before a rung counts there as one
    that is not among the best. Of equal objectives the trial whose id sorts first is better.

    Args:
        asha: form, order and reduction factor.
        rungs: ascending steps.
        trials: ids of all trials of the arm.
        sentinels: ids of those that are never stopped.
        fewest: trials that a rung lets go on at least, once it is decided; the stopping form knows 1 only.
    """

    def __init__(
        self,
        asha: Asha,
        rungs: tuple[int, ...],
        trials: Iterable[str],
        sentinels: Iterable[str] = (),
        fewest: int = 1,
    ) -> None:
        self._asha, self.rungs, self._fewest = asha, rungs, fewest
        self._trials, self._sentinels = frozenset(trials), frozenset(sentinels)
        self._values: dict[int, dict[str, float]] = {rung: {} for rung in rungs}
        self._decisions: dict[int, dict[str, Decision]] = {rung: {} for rung in rungs}
        self._closed: set[int] = set()
        self._ended: set[str] = set()

    # --- what happens ------------------------------------------------------------------------------------------------

    def arrive(self, trial: str, rung: int, value: float) -> list[Decision]:
        """A trial has reached a rung; a repeated arrival changes nothing.

        Returns:
            Everything that is now decided and was not before, also about others.
        """
        self._values[rung].setdefault(trial, float(value) if math.isfinite(value) else math.inf)
        if self._asha.form is AshaForm.STOPPING:
            return self._judged(trial, rung)
        return self._settled()

    def end(self, trial: str) -> list[Decision]:
        """A trial has ended by itself and will reach no further rung; returns what is now decided."""
        self._ended.add(trial)
        return self._settled() if self._asha.form is AshaForm.PROMOTION else []

    def rebuild(
        self, trial: str, values: Mapping[int, float], decisions: Iterable[Mapping[str, Any]], *, ended: bool
    ) -> None:
        """Take in what a journal says of a trial; `settle` then completes what a kill has left out."""
        for rung, value in values.items():
            if rung in self._values:
                self._values[rung][trial] = value
        for plain in decisions:
            decision = Decision.model_validate(plain)
            if decision.rung in self._decisions:
                self._values[decision.rung][trial] = decision.value
                self._decisions[decision.rung][trial] = decision
        if ended:
            self._ended.add(trial)

    def settle(self) -> list[Decision]:
        """Decide what can be decided; returns what is new."""
        return self._settled() if self._asha.form is AshaForm.PROMOTION else []

    # --- what follows ------------------------------------------------------------------------------------------------

    def fate(self, trial: str, rung: int) -> Fate:
        """What a trial that has reached a rung does now; sentinels never wait."""
        if trial in self._sentinels:
            return Fate.GO_ON
        decision = self._decisions[rung].get(trial)
        return Fate.WAIT if decision is None else decision.fate

    def decision(self, trial: str) -> Decision | None:
        """The last decision about a trial."""
        found = [decisions[trial] for decisions in self._decisions.values() if trial in decisions]
        return found[-1] if found else None

    def seen(self) -> dict[int, int]:
        """Trials seen at each rung."""
        return {rung: len(values) for rung, values in self._values.items()}

    # --- how it is decided -------------------------------------------------------------------------------------------

    def _settled(self) -> list[Decision]:
        new: list[Decision] = []
        for index, rung in enumerate(self.rungs):
            entrants = self._entrants(index)
            if self._is_complete(index, entrants):
                self._closed.add(rung)
                best = max(len(entrants) // self._asha.reduction_factor, self._fewest)
                new += self._decide(rung, entrants, best, close=True)
            elif self._asha.order is AshaOrder.ASYNCHRONOUS:
                arrived = entrants & self._values[rung].keys()
                new += self._decide(rung, arrived, len(arrived) // self._asha.reduction_factor, close=False)
        return new

    def _entrants(self, index: int) -> frozenset[str]:
        """Trials that compete at a rung, or will as far as is decided."""
        if index == 0:
            return self._trials
        before = self._decisions[self.rungs[index - 1]].values()
        return frozenset(decision.trial for decision in before if decision.goes_on)

    def _is_complete(self, index: int, entrants: frozenset[str]) -> bool:
        """Whether nobody can come any more."""
        if index > 0 and self.rungs[index - 1] not in self._closed:
            return False
        return entrants <= self._values[self.rungs[index]].keys() | self._ended

    def _decide(self, rung: int, entrants: frozenset[str], best: int, *, close: bool) -> list[Decision]:
        """Let the `best` first go on, and where the rung closes stop the others."""
        values = {trial: value for trial, value in self._values[rung].items() if trial in entrants}
        ranked = sorted((value, trial) for trial, value in values.items() if math.isfinite(value))[:best]
        cutoff = ranked[-1][0] if ranked else math.inf
        going = {trial for _, trial in ranked}
        judged = values if close else going
        return [
            self._booked(trial, rung, cutoff=cutoff, competitors=len(entrants), goes_on=trial in going)
            for trial in sorted(judged)
            if trial not in self._decisions[rung]
        ]

    def _judged(self, trial: str, rung: int) -> list[Decision]:
        """The stopping form: compared with those seen so far, the best of whom always goes on."""
        out = any(not d[trial].goes_on for r, d in self._decisions.items() if r < rung and trial in d)
        if out or trial in self._decisions[rung]:
            return []
        gone = {d.trial for r, ds in self._decisions.items() if r < rung for d in ds.values() if not d.goes_on}
        values = {name: value for name, value in self._values[rung].items() if name not in gone}
        seen = sorted(value for value in values.values() if math.isfinite(value))
        cutoff = seen[max(len(seen) // self._asha.reduction_factor, 1) - 1] if seen else math.inf
        value = values[trial]
        goes_on = math.isfinite(value) and value <= cutoff
        return [self._booked(trial, rung, cutoff=cutoff, competitors=len(values), goes_on=goes_on)]

    def _booked(self, trial: str, rung: int, *, cutoff: float, competitors: int, goes_on: bool) -> Decision:
        decision = Decision(
            trial=trial,
            rung=rung,
            value=self._values[rung][trial],
            cutoff=cutoff,
            competitors=competitors,
            goes_on=goes_on,
            sentinel=trial in self._sentinels,
        )
        self._decisions[rung][trial] = decision
        return decision
