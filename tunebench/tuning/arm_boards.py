"""TensorBoard for those who watch a study: one run per arm, charts that overlay arms, pictures of the ranking.

All of it follows from the journal alone and is written anew each time, so that a resumed study shows what an
uninterrupted one would. It never stands in the way of the study.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from tunebench.engine.board import whole_events
from tunebench.study.arm_history import ArmState, arm_history, rung_survivors, standings
from tunebench.study.journal import read_passages, read_trials
from tunebench.study.plan import ArmPlan
from tunebench.study.record import JOURNAL, TENSORBOARD, Stage, TrialRecord
from tunebench.tuning.ranking_picture import ranking_picture

ARMS = "arms"
"""TensorBoard's run with the pictures and the layout, and the folder of one run per arm."""

_CHARTS = {
    "best objective over optimizer steps of all trials": "best_objective_by_steps_spent",
    "best objective over trials that have ended": "best_objective_by_trials_ended",
    "trials that train beyond a step, over steps": "survivors_by_step",
    "device-seconds over trials that have ended": "device_seconds_by_trials_ended",
    "optimizer steps of all trials over trials that have ended": "steps_spent_by_trials_ended",
}
_POINTS = 300  # of a curve; TensorBoard draws 1000 at most
_EVERY_S = 20.0
_REST_PER_WORK = 20.0  # the driver spends a twentieth of its time here at most


class ArmBoards:
    """Keeps the boards of a run's arms up to date, at a bounded rate.

    Args:
        run: the run directory.
        arms: all arms of the study.
        console: gets one line where the boards cannot be written.
    """

    def __init__(self, run: Path, arms: Sequence[ArmPlan], console: Console) -> None:
        self._run, self._arms, self._console = run, arms, console
        self._due_at = 0.0
        self._shown_bytes = 0
        self._warned = False

    def show_when_due(self) -> None:
        """Show what is new, where the last time is long enough ago."""
        if time.monotonic() >= self._due_at:
            self.show()

    def show(self) -> None:
        """Write the boards where the journal has grown; what fails is said once and never stops the study."""
        began = time.monotonic()
        try:
            journal_bytes = (self._run / JOURNAL).stat().st_size
            if journal_bytes != self._shown_bytes:
                write_arm_boards(self._run, self._arms)
                self._shown_bytes = journal_bytes
        except Exception as error:  # a picture is worth no trial, whatever is wrong with it
            self._warn(error)
        now = time.monotonic()
        self._due_at = now + max(_EVERY_S, _REST_PER_WORK * (now - began))

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            what = " ".join(str(error).split())[:300] or type(error).__name__
            line = f"warning: the arms' TensorBoard is not up to date: {what}"
            self._console.print(line, style="yellow", highlight=False, soft_wrap=True, markup=False)


def write_arm_boards(run: Path, arms: Sequence[ArmPlan]) -> None:
    """Write the run of every arm, the layout of the charts and the pictures of the ranking from the run's journal.

    Raises:
        FileNotFoundError: the run has no journal.
        OSError: they cannot be written.
    """
    passages = read_passages(run)  # before the records, which then know of every passage
    trials = read_trials(run)
    for arm in arms:
        own = {trial.key.trial_id: trial for trial in trials if trial.key.arm == arm.name}
        with whole_events(run, run / TENSORBOARD / ARMS / f"{arm.workload.name}.{arm.optimizer}") as writer:
            _add_history(writer, arm.workload.name, arm_history(own, passages, arm.fidelity))
            survivors = rung_survivors(own.values(), arm.rungs, arm.workload.max_steps)
            _add_curve(writer, f"{arm.workload.name}/survivors_by_step", survivors)
    workloads = list(dict.fromkeys(arm.workload.name for arm in arms))
    with whole_events(run, run / TENSORBOARD / ARMS) as writer:
        writer.add_custom_scalars(_layout(workloads))
        for workload in workloads:
            if of_workload := [trial for trial in trials if trial.key.workload == workload]:
                _add_picture(writer, workload, of_workload)


def _add_history(writer: SummaryWriter, workload: str, history: Sequence[ArmState]) -> None:
    best = [state for state in history if math.isfinite(state.best_objective)]
    by_spent = {state.steps_spent: state.best_objective for state in best}
    by_ended = {state.trials_ended: state.best_objective for state in best if state.trials_ended}
    _add_curve(writer, f"{workload}/best_objective_by_steps_spent", by_spent)
    _add_curve(writer, f"{workload}/best_objective_by_trials_ended", by_ended)
    device_s = {state.trials_ended: state.device_s for state in history}
    _add_curve(writer, f"{workload}/device_seconds_by_trials_ended", device_s)
    _add_curve(writer, f"{workload}/steps_spent_by_trials_ended", {s.trials_ended: s.steps_spent for s in history})


def _add_curve(writer: SummaryWriter, tag: str, curve: Mapping[int, float]) -> None:
    for step in _thinned(list(curve)):
        writer.add_scalar(tag, curve[step], step)


def _thinned(steps: Sequence[int]) -> list[int]:
    """At most `_POINTS` of them, evenly chosen; the first and the last are always there."""
    if len(steps) <= _POINTS:
        return list(steps)
    return [steps[index * (len(steps) - 1) // (_POINTS - 1)] for index in range(_POINTS)]


def _layout(workloads: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    return {
        workload: {title: ["Multiline", [f"^{re.escape(f'{workload}/{tag}')}$"]] for title, tag in _CHARTS.items()}
        for workload in workloads
    }


def _add_picture(writer: SummaryWriter, workload: str, trials: Sequence[TrialRecord]) -> None:
    ended = {stage: sum(t.reason is not None and t.key.stage is stage for t in trials) for stage in Stage}
    planned = {stage: sum(t.key.stage is stage for t in trials) for stage in Stage}
    progress = ", ".join(f"{ended[s]} of {planned[s]} {s} trials ended" for s in Stage if planned[s])
    figure = ranking_picture(standings(trials, workload), f"{workload}: {progress}")
    writer.add_figure(f"ranking/{workload}", figure, sum(ended.values()), close=False)
