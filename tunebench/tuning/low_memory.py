"""Tune goes on where Ray ends the process of a trial because its node runs out of memory.

Ray (2.60) answers calls of such a process with an error that Tune's manager of actors does not know, and for which it
stops the whole run.
"""

from __future__ import annotations

from typing import Any

from ray.air.execution._internal import RayActorManager
from ray.tune.execution import tune_controller

from tunebench.tuning.failures import as_death


class _Manager(RayActorManager):
    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        super()._actor_task_failed(tracked_actor_task, as_death(exception))


def survive_low_memory() -> None:
    """Have every later Tune run of this process take such an end as the death of a process."""
    tune_controller.RayActorManager = _Manager  # type: ignore[attr-defined]
