"""Successive halving as a Tune scheduler: one ladder of rungs per arm, in one Tuner.

Ray's own ASHA pools all trials, has no promotion form, keeps no reason, loses its rungs on a restart and never stops
NaN (Ray 2.60, ray-project/ray issues 30838 and 44256). Here `Ladder` decides; this module carries its decisions out
through Tune's PAUSE and stop, and the rungs of a resumed study are those of its journal.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, KeysView, Mapping, Sequence
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tunebench.study.control import Wish
from tunebench.study.decision import Decision, Fate
from tunebench.study.record import TrialKey, TrialRecord
from tunebench.study.spec import Asha
from tunebench.tuning.ladder import Ladder

_PAUSED_STEP_S = 0.2

_ACTIONS = {
    Fate.GO_ON: TrialScheduler.CONTINUE,
    Fate.WAIT: TrialScheduler.PAUSE,
    Fate.STOP: TrialScheduler.STOP,
}


def arm_ladders(
    asha: Asha | None, rungs: Mapping[str, tuple[int, ...]], records: Iterable[TrialRecord], fewest: int = 1
) -> dict[str, Ladder]:
    """A ladder for every arm with rungs, rebuilt from the journal's records of one stage.

    Args:
        asha: how the study stops; None stops nothing.
        rungs: steps by arm.
        records: all trials of the stage.
        fewest: trials that a rung lets go on at least.
    """
    of_arm: dict[str, list[TrialRecord]] = {arm: [] for arm, steps in rungs.items() if asha is not None and steps}
    for record in records:
        of_arm.get(record.key.arm, []).append(record)
    ladders = {}
    for arm, planned in of_arm.items():
        names = [record.key.trial_id for record in planned]
        assert asha is not None
        ladder = Ladder(asha, rungs[arm], names, [r.key.trial_id for r in planned if r.sentinel], fewest)
        for record in planned:
            ended = record.reason is not None
            ladder.rebuild(record.key.trial_id, record.rungs, record.decisions, ended=ended)
        ladders[arm] = ladder
    return ladders


class PerArmAsha(FIFOScheduler):
    """Tune scheduler that pauses, promotes and stops trials by their own arm's ladder and never by another arm's.

    Trials are started in the order of the list given to Tune, which interleaves the arms; one that was promoted comes
    before one that has not begun.

    Args:
        ladders: by arm; an arm without one is never stopped.
        key_of: trial keys by trial id.
        first_with_room: the first of promoted trials that may start now, given the ids of those that are active.
        wish: what was asked of the run.
    """

    def __init__(
        self,
        ladders: Mapping[str, Ladder],
        key_of: Callable[[str], TrialKey],
        first_with_room: Callable[[Sequence[str], Collection[str]], str | None] = lambda trials, active: trials[0],
        wish: Callable[[], Wish] = lambda: Wish.RESUME,
    ):
        super().__init__()  # type: ignore[no-untyped-call]
        self._ladders, self._key_of, self._first_with_room, self._wish = ladders, key_of, first_with_room, wish
        self._trials: dict[str, Trial] = {}
        self._places: dict[str, int] = {}  # in Tune's list
        self._new: deque[Trial] = deque()
        self._waits: dict[str, int | None] = {}  # at this rung, or in a pause of the run
        self._held: set[str] = set()  # who waits in a pause
        self._decided: set[str] = set()  # who waits at a rung, and may go on or is to stop
        self._undelivered = [decision for ladder in ladders.values() for decision in ladder.settle()]

    def new_decisions(self) -> list[Decision]:
        """Decisions that were made since the last call, for the journal."""
        new, self._undelivered = self._undelivered, []
        return new

    def decision(self, trial_id: str) -> Decision | None:
        """The last decision about a trial."""
        ladder = self._ladders.get(self._key_of(trial_id).arm)
        return ladder.decision(trial_id) if ladder else None

    @property
    def waiting(self) -> KeysView[str]:
        """Trials that wait at a rung or in a pause of the run, as they are at any time; they need no place."""
        return self._waits.keys()

    def waits_for_rung(self, trial_id: str) -> bool:
        """Whether a trial waits until its rung decides; one in a pause of the run, or decided by now, does not."""
        return self._waits.get(trial_id) is not None and self._fate(trial_id) is Fate.WAIT

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """A trial is at the end of Tune's list; one that is to begin anew comes there again."""
        name = trial.config["trial"]
        self._trials[name], self._places[name] = trial, len(self._places)
        self._new.append(trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Let a trial wait, go on or stop at a rung; let it go on anywhere else, unless the run is paused."""
        action = self._at_evaluation(self._key_of(trial.config["trial"]), result)
        if action == TrialScheduler.CONTINUE and result["outcome"] is None and self._wish() is Wish.PAUSE:
            self._waits[trial.config["trial"]] = None
            self._held.add(trial.config["trial"])
            return str(TrialScheduler.PAUSE)
        return action

    def _at_evaluation(self, key: TrialKey, result: dict[str, Any]) -> str:
        ladder = self._ladders.get(key.arm)
        if ladder is None:
            return str(TrialScheduler.CONTINUE)
        if result["outcome"] is not None:
            self._take_in(ladder.end(key.trial_id))
            return str(TrialScheduler.CONTINUE)
        if not result["at_rung"]:
            return str(TrialScheduler.CONTINUE)
        self._take_in(ladder.arrive(key.trial_id, result["step"], result["objective"]))
        fate = ladder.fate(key.trial_id, result["step"])
        if fate is Fate.WAIT:
            self._waits[key.trial_id] = result["step"]
        return str(_ACTIONS[fate])

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """A trial has failed, but Tune (2.60) says so of those that it starts again as well: see `gave_up`."""
        self._forget(trial)

    def gave_up(self, trial_id: str) -> None:
        """A trial failed for good and will reach no further rung."""
        ladder = self._ladders.get(self._key_of(trial_id).arm)
        if ladder is not None:
            self._take_in(ladder.end(trial_id))

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """A trial has ended."""
        self._forget(trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """A waiting trial has been stopped."""
        self._forget(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Stop who waits in vain; then name a promoted trial, if there is room for it, or else the next new one."""
        if self._wish() is Wish.PAUSE:
            time.sleep(_PAUSED_STEP_S)  # Tune (2.60) steps again at once where nothing runs
        promoted = self._promoted(tune_controller)
        if promoted is not None:
            self._new.appendleft(promoted)  # Tune may find no process for it at once
            return promoted
        while self._new and self._new[0].status != Trial.PENDING:
            self._new.popleft()
        return self._new[0] if self._new else None

    def _promoted(self, tune_controller: Any) -> Trial | None:
        """Tune asks at every event, so this looks only at those of whom something is known."""
        known = sorted(self._decided | self._held, key=self._places.__getitem__)
        paused = [trial for trial in map(self._trials.__getitem__, known) if trial.status == Trial.PAUSED]
        for trial in paused:
            if self._fate(trial.config["trial"]) is Fate.STOP:
                tune_controller.stop_trial(trial)
        promoted = [trial for trial in paused if self._may_go_on(trial)]
        if promoted:
            live = tune_controller.get_live_trials()
            busy = (trial for trial in live if trial.status in (Trial.RUNNING, Trial.PENDING))
            active = {trial.config["trial"] for trial in busy} - self.waiting
            found = self._first_with_room([trial.config["trial"] for trial in promoted], active)
            if found is not None:
                self._forget(self._trials[found])
                return self._trials[found]
        return None

    def debug_string(self) -> str:
        """One line per arm: rung and number of trials seen there."""
        return "; ".join(
            f"{arm}: " + ", ".join(f"{step} ({count})" for step, count in ladder.seen().items() if count)
            for arm, ladder in self._ladders.items()
        )

    def _take_in(self, decisions: list[Decision]) -> None:
        self._undelivered += decisions
        self._decided |= {each.trial for each in decisions if self._waits.get(each.trial) == each.rung}

    def _fate(self, name: str) -> Fate:
        rung = self._waits.get(name)
        return Fate.WAIT if rung is None else self._ladders[self._key_of(name).arm].fate(name, rung)

    def _may_go_on(self, trial: Trial) -> bool:
        name = trial.config["trial"]
        if self._wish() is not Wish.RESUME or name not in self._waits:
            return False
        return self._waits[name] is None or self._fate(name) is Fate.GO_ON

    def _forget(self, trial: Trial) -> None:
        self._waits.pop(trial.config["trial"], None)
        self._held.discard(trial.config["trial"])
        self._decided.discard(trial.config["trial"])
