"""Which checkpoints a run keeps."""

from __future__ import annotations

from collections.abc import Callable

from tunebench.study.record import Stage, TrialKey


def retention(keep: str) -> Callable[[TrialKey], bool]:
    """Which finished trials lose their checkpoints under the study's `keep_checkpoints`."""
    return lambda key: keep == "none" or (keep == "confirm" and key.stage is not Stage.CONFIRM)
