"""What a cohort's log tells of its device: how long it stepped and evaluated, how many steps it made, and why not more.

Imports neither Ray nor torch.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

log = logging.getLogger(__name__)

_EVERY_S = 10.0
_WORKED = re.compile(
    r"^(\S+ \S+) .* worked (\S+) of (\S+) s \(evaluations (\S+) s\), files (\S+) s, orders (\S+) s, (\d+) trial-steps$"
)
_GPU = re.compile(r" is on GPU (\S+)$")


def on_gpu(cohort: int, index: str) -> str:
    """The line by which `read_work` knows a cohort's GPU."""
    return f"cohort {cohort} is on GPU {index}"


class WorkLog:
    """Writes a line every few seconds while there is work, and one when there is no more.

    Args:
        say: takes the lines, where each gets the time at which it is written.
        clock: seconds.
    """

    def __init__(self, say: Callable[[str], None] = log.warning, clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._since: float | None = None
        self._clear()

    def worked(self, seconds: float, trial_steps: int, *, evaluating_s: float = 0.0, writing_s: float = 0.0) -> None:
        """A stretch of steps and what belongs to it has just ended.

        Args:
            seconds: of all of it.
            trial_steps: that were made.
            evaluating_s: of these seconds, in evaluations.
            writing_s: of these seconds, in writing files.
        """
        now, rested = self._clock(), self._since is None
        since = now - seconds if self._since is None else self._since
        self._since = since
        self._worked_s += seconds - writing_s
        self._evaluating_s += evaluating_s
        self._writing_s += writing_s
        self._steps += trial_steps
        if rested or now - since >= _EVERY_S:
            self._write(now)

    def obeyed(self, seconds: float) -> None:
        """An order was just carried out: a trial has joined or left, most often."""
        if self._since is not None:
            self._obeying_s += seconds

    def rest(self) -> None:
        """There is no work; what passes from now on until there is some is on no line."""
        if self._since is not None and self._worked_s:
            self._write(self._clock())
        self._since = None

    def _write(self, now: float) -> None:
        assert self._since is not None
        self._say(
            f"worked {self._worked_s:.3f} of {now - self._since:.3f} s (evaluations {self._evaluating_s:.3f} s), "
            f"files {self._writing_s:.3f} s, orders {self._obeying_s:.3f} s, {self._steps} trial-steps"
        )
        self._since = now
        self._clear()

    def _clear(self) -> None:
        self._worked_s = self._evaluating_s = self._writing_s = self._obeying_s = 0.0
        self._steps = 0


@dataclass(frozen=True, kw_only=True)
class WorkLine:
    """A line: what a device did in a period of time.

    Attributes:
        began, ended: local time of the node.
        worked_s: in steps and evaluations.
        evaluating_s: of these, in evaluations.
        writing_s, obeying_s: in writing files, and in letting trials in and out. What is left it waited.
    """

    began: datetime
    ended: datetime
    worked_s: float
    evaluating_s: float
    writing_s: float
    obeying_s: float
    trial_steps: int


def read_work(file: Path) -> tuple[str | None, list[WorkLine]]:
    """The GPU that a cohort's log names, as its node numbers them, and what it did, line by line; None on a CPU."""
    gpu, found = None, []
    for line in file.read_text(encoding="utf-8").splitlines():
        if match := _GPU.search(line):
            gpu = match[1]
        elif match := _WORKED.match(line):
            ended = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f")
            worked_s, of_s, evaluating_s, writing_s, obeying_s = map(float, match.groups()[1:6])
            found.append(
                WorkLine(
                    began=ended - timedelta(seconds=of_s),
                    ended=ended,
                    worked_s=worked_s,
                    evaluating_s=evaluating_s,
                    writing_s=writing_s,
                    obeying_s=obeying_s,
                    trial_steps=int(match[7]),
                )
            )
    return gpu, found
