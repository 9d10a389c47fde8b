"""Asynchronous successive halving, one independent ladder of rungs per arm, as a Tune scheduler.

Ray's own ASHA pools all trials, keeps no reason, loses its rungs on a restart and never stops NaN (Ray 2.60,
ray-project/ray issue 30838). Here a rung is hit exactly, every decision can be read back from the journal, and the
rungs of a resumed study are the journal's. The rule is the stopping form of Li et al., arXiv:1810.05934.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tunebench.study.record import TrialKey, TrialRecord


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What happened to a trial at a rung, with what it was compared.

    Attributes:
        cutoff: the largest objective that goes on. recorded: trials seen at this rung so far, this one included if its
            value is finite.
    """

    rung: int
    value: float
    cutoff: float
    recorded: int
    stop: bool


@dataclass
class Ladder:
    """The rungs of one arm: objectives by rung and trial, those of stopped trials included."""

    reduction_factor: int
    values: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))

    def decide(self, trial_id: str, rung: int, value: float) -> Decision:
        """Let the best 1 / `reduction_factor` of the trials seen at this rung go on, and always the best one.

        A value that is not finite is stopped and not counted. A trial that went on and reports the rung again, as it
        does after a restart, goes on again, whoever has come since.
        """
        values = self.values[rung]
        went_on = trial_id in values
        if math.isfinite(value):
            values.setdefault(trial_id, value)
        seen = sorted(values.values())
        cutoff = seen[max(len(seen) // self.reduction_factor, 1) - 1] if seen else math.inf
        stop = not math.isfinite(value) or (not went_on and value > cutoff)
        return Decision(rung=rung, value=value, cutoff=cutoff, recorded=len(seen), stop=stop)


class PerArmAsha(FIFOScheduler):
    """Tune scheduler that stops trials by their own arm's ladder and never by another arm's.

    Trials are started in the order of the list given to Tune, which interleaves the arms.
    """

    def __init__(self, rungs: dict[str, tuple[int, ...]], reduction_factor: int, key_of: Callable[[str], TrialKey]):
        super().__init__()  # type: ignore[no-untyped-call]
        self._rungs, self._key_of = rungs, key_of
        self._ladders = {arm: Ladder(reduction_factor) for arm in rungs}
        self.decisions: dict[str, Decision] = {}

    def rebuild(self, records: Iterable[TrialRecord]) -> None:
        """Rebuild the rungs from what the journal holds."""
        for record in records:
            if record.key.arm not in self._ladders:
                continue
            for step, value in record.rungs.items():
                # a driver killed while it closed a stopped trial: the trial reports this rung again and is judged anew
                if record.reason is None and record.detail.get("rung") == step:
                    continue
                self._ladders[record.key.arm].values[step][record.key.trial_id] = value

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide at a rung, go on anywhere else."""
        key = self._key_of(trial.config["trial"])
        if result["step"] not in self._rungs.get(key.arm, ()) or result["outcome"] is not None:
            return str(TrialScheduler.CONTINUE)
        decision = self._ladders[key.arm].decide(key.trial_id, result["step"], result["objective"])
        if not decision.stop:
            return str(TrialScheduler.CONTINUE)
        self.decisions[key.trial_id] = decision
        return str(TrialScheduler.STOP)

    def debug_string(self) -> str:
        """One line per arm: rung and number of trials seen there."""
        return "; ".join(
            f"{arm}: " + ", ".join(f"{step} ({len(seen)})" for step, seen in sorted(ladder.values.items()))
            for arm, ladder in self._ladders.items()
        )
