"""What was asked of a run (`tunebench.study.control`), as its driver obeys it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tunebench.study.control import Control, Wish
from tunebench.study.errors import Interrupted

_LOOK_EVERY_S = 1.0


class Orders:
    """The orders of one run.

    Attributes:
        wish: what is asked now, read again at most once a second.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._active: Callable[[], int] = int  # none, before the first step
        self.wish: Callable[[], Wish] = Control(run).wish

    def closed(self) -> bool:
        """Whether no further trial may begin; Tune asks in a loop of its own where it has none at all.

        Raises:
            Interrupted: as `obey`.
        """
        self.obey(self._active)
        return self.wish() is not Wish.RESUME

    def wait_for_resume(self) -> None:
        """Return once the run is not paused.

        Raises:
            Interrupted: as `obey`.
        """
        while self.wish() is Wish.PAUSE:
            time.sleep(_LOOK_EVERY_S)
        self.obey()

    def obey(self, active: Callable[[], int] = int) -> None:
        """End the run where that is asked: at once, or with the last of its active trials, which `active` counts.

        Raises:
            Interrupted: it ends; its state is kept.
        """
        self._active = active
        if self.wish() is Wish.CANCEL:
            raise Interrupted(f"{self._run}: cancelled; `tunebench resume` lets `tunebench run` go on")
        if self.wish() is Wish.DRAIN and not active():
            raise Interrupted(f"{self._run}: drained; `tunebench run` goes on")
