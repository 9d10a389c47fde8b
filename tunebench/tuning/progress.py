"""The quiet live view of a running stage: one line per arm, or plain lines where no terminal is attached."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from tunebench.study.record import Reason, Stage, TrialKey, TrialRecord

_LINE_EVERY_S = 10.0


@dataclass
class _ArmCount:
    planned: int = 0
    best: float | None = None
    running: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)
    ended: dict[str, Reason] = field(default_factory=dict)

    @property
    def finished(self) -> int:
        return sum(reason is Reason.FINISHED for reason in self.ended.values())

    @property
    def stopped(self) -> int:
        return sum(reason is Reason.STOPPED_ASHA for reason in self.ended.values())

    @property
    def failed(self) -> int:
        return len(self.ended) - self.finished - self.stopped


class Progress:
    """Counts trials of one stage and shows them; use it as a context manager around Tune's loop."""

    def __init__(self, run: Path, stage: Stage, console: Console) -> None:
        self.run, self._stage, self._console = run, stage, console
        self._arms: dict[str, _ArmCount] = {}
        self._began = self._printed = time.monotonic()
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=2, transient=True)

    @classmethod
    def of(cls, run: Path, stage: Stage, console: Console, records: Iterable[TrialRecord]) -> Progress:
        """With the trials of the stage as they stand."""
        progress = cls(run, stage, console)
        for record in records:
            progress.planned(record.key, record.reason, record.value)
        return progress

    def __enter__(self) -> Progress:
        """Start the live view on a terminal."""
        if self._console.is_terminal:
            self._live.start()
        else:
            self._line()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the last state on the screen."""
        if self._console.is_terminal:
            self._live.stop()
            self._console.print(self._table())
        else:
            self._line()

    def planned(self, key: TrialKey, reason: Reason | None, value: float | None) -> None:
        """Count a trial of this stage, ended earlier or still to run."""
        arm = self._arms.setdefault(key.arm, _ArmCount())
        arm.planned += 1
        if reason is not None:
            arm.ended[key.trial_id] = reason
            self._better(arm, value)

    def started(self, key: TrialKey) -> None:
        """Count a running trial; one that is started again after a failure counts once."""
        arm = self._arms[key.arm]
        arm.waiting.discard(key.trial_id)
        arm.running.add(key.trial_id)
        self._show()

    def waits(self, key: TrialKey) -> None:
        """Count a trial that waits at its rung."""
        arm = self._arms[key.arm]
        arm.running.discard(key.trial_id)
        arm.waiting.add(key.trial_id)
        self._show()

    def evaluated(self, key: TrialKey, objective: float) -> None:
        """Take notice of an objective that was measured."""
        self._better(self._arms[key.arm], objective)
        self._show()

    def finished(self, key: TrialKey, reason: Reason) -> None:
        """Count a trial that ended; it ends once, though its process may fail after that."""
        arm = self._arms[key.arm]
        arm.running.discard(key.trial_id)
        arm.waiting.discard(key.trial_id)
        arm.ended.setdefault(key.trial_id, reason)
        self._show()

    def _better(self, arm: _ArmCount, value: float | None) -> None:
        if value is not None and math.isfinite(value) and (arm.best is None or value < arm.best):
            arm.best = value

    def _show(self) -> None:
        if not self._console.is_terminal and time.monotonic() - self._printed > _LINE_EVERY_S:
            self._line()

    def _line(self) -> None:
        arms = self._arms.values()
        done = sum(len(a.ended) for a in arms)
        self._printed = time.monotonic()
        self._console.print(
            f"{self._stage} stage: {done} of {sum(a.planned for a in arms)} trials ended "
            f"({sum(a.stopped for a in arms)} stopped early, {sum(a.failed for a in arms)} failed), "
            f"{sum(len(a.running) for a in arms)} running, {sum(len(a.waiting) for a in arms)} waiting at a rung, "
            f"{self._printed - self._began:.0f} s",
            highlight=False,
            soft_wrap=True,
        )

    def _table(self) -> Table:
        table = Table(title=f"{self._stage} stage, {time.monotonic() - self._began:.0f} s", title_justify="left")
        counted = ("trials", "running", "at a rung", "finished", "stopped early", "failed", "best objective")
        for column in ("arm", *counted):
            table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=column == "arm")
        for name, arm in self._arms.items():
            best = "" if arm.best is None else f"{arm.best:.4g}"
            cells = (arm.planned, len(arm.running), len(arm.waiting), arm.finished, arm.stopped, arm.failed)
            table.add_row(name, *map(str, cells), best)
        return table
