"""Training that was paid for, and a note of it beside the checkpoint, so that what a kill takes is counted.

A checkpoint is kept at evaluations only. Between them a trial notes every few seconds how far it has come; who goes on
from the checkpoint finds there what was lost.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tunebench.study.files import check_room

NOTE = "work.json"
NOTE_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """Training that was paid for.

    Attributes:
        steps: training steps.
        wall_s: seconds by the clock on the wall. device_s: those spent in training steps.
    """

    steps: int = 0
    wall_s: float = 0.0
    device_s: float = 0.0

    def __add__(self, other: Work) -> Work:
        """Both together."""
        return Work(
            steps=self.steps + other.steps,
            wall_s=self.wall_s + other.wall_s,
            device_s=self.device_s + other.device_s,
        )

    def beyond(self, other: Work) -> Work:
        """What was done after `other`; nothing where that went further."""
        if self.steps <= other.steps:
            return Work()
        return Work(
            steps=self.steps - other.steps,
            wall_s=self.wall_s - other.wall_s,
            device_s=self.device_s - other.device_s,
        )


@dataclass(frozen=True, kw_only=True)
class Note:
    """How far a trial had come.

    Attributes:
        horizon: the one it was at. done: its work there.
        lost: what had been lost before, at any horizon.
    """

    horizon: int
    done: Work
    lost: Work

    def lost_after(self, horizon: int, done: Work, lost: Work) -> Work:
        """All that is lost for a trial that goes on from a checkpoint.

        Args:
            horizon: of the checkpoint.
            done: work at that horizon up to the checkpoint.
            lost: what had been lost when it was written.
        """
        if self.horizon < horizon or lost.steps > self.lost.steps:  # the note is older than the checkpoint
            return lost
        known = max(lost, self.lost, key=lambda work: work.steps)
        return known + self.done.beyond(done if self.horizon == horizon else Work())


def write_note(folder: Path, note: Note) -> None:
    """Replace the note; a power cut may take it, for it is not worth waiting for the disk."""
    folder.mkdir(parents=True, exist_ok=True)
    check_room(folder / NOTE)
    partial = folder / f"{NOTE}.partial"
    partial.write_text(json.dumps(asdict(note)), encoding="utf-8")
    partial.replace(folder / NOTE)


def read_note(folder: Path) -> Note | None:
    """The last note; None where there is none that can be read."""
    try:
        content = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return Note(horizon=content["horizon"], done=Work(**content["done"]), lost=Work(**content["lost"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
