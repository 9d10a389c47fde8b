"""What Tune runs its trials in: processes for trials that train themselves, seats at the reception for tenants.

Tune (2.60) starts an actor, which is a process, for every trial. A tenant needs none: what Tune takes for its actor is
a `Seat`, whose methods are calls of the one `Reception`. Tune's own manager of actors keeps both.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import ray
from ray.air.execution import ResourceManager, ResourceRequest
from ray.air.execution._internal import RayActorManager
from ray.air.execution.resources.request import AcquiredResources
from ray.exceptions import RayActorError, RayTaskError
from ray.train._internal.session import _TrainingResult
from ray.tune.execution import tune_controller
from ray.tune.result import DONE, RESULT_DUPLICATE

from tunebench.tuning.failures import as_death
from tunebench.tuning.handle import Handle

SEAT: Mapping[str, float] = {"memory": 1.0}
"""The share of a tenant. Ray is never asked for it; Tune takes none that is empty."""

AFTER_LAST = {RESULT_DUPLICATE: True, DONE: True}
"""What Tune takes for the return of a trial that has reported all."""

_FREE_DEATHS = 3


class _called_remotely:
    """A method that is called as those of Ray's actors are, by `.remote`."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def __get__(self, seat: Seat, owner: type[Seat]) -> Any:
        return SimpleNamespace(remote=partial(self._method, seat))


class Seat:
    """What Tune takes for the actor of a tenant.

    Args:
        reception: where the tenant lives.
        config: Tune's configuration, which names the trial.
    """

    def __init__(self, reception: Handle, config: Mapping[str, Any], **of_actors: Any) -> None:
        self.reception = reception
        self._begin(config)

    def _begin(self, config: Mapping[str, Any]) -> None:
        self._trial, self._stay = config["trial"], uuid.uuid4().hex

    @_called_remotely
    def train(self) -> Any:
        """The next report."""
        return self.reception.train.remote(self._stay, self._trial)

    @_called_remotely
    def stop(self) -> Any:
        """The trial is over, or waits at a rung."""
        return self.reception.leave.remote(self._stay)

    __ray_terminate__ = stop

    @_called_remotely
    def reset(self, config: Mapping[str, Any], **of_actors: Any) -> Any:
        """Another trial takes the seat."""
        self.reception.leave.remote(self._stay)
        self._begin(config)
        return ray.put(True)

    @_called_remotely
    def save(self) -> Any:
        """Nothing: checkpoints are the cohort's."""
        return ray.put(_TrainingResult(checkpoint=None, metrics={}))

    @_called_remotely
    def get_auto_filled_metrics(self, **wishes: Any) -> Any:
        """None."""
        return ray.put({})

    @_called_remotely
    def __ray_ready__(self) -> Any:
        """At once."""
        return ray.put(None)


@dataclass
class _SeatTaken(AcquiredResources):
    reception: Handle

    def annotate_remote_entities(self, entities: Any) -> Any:
        return [SimpleNamespace(remote=partial(Seat, self.reception)) for _ in entities]

    def _annotate_remote_entity(self, entity: Any, bundle: Any, bundle_index: int) -> Any:
        raise NotImplementedError  # Ray's own `annotate_remote_entities`, replaced above, is its only caller


class Seats(ResourceManager):
    """A seat for every tenant at once, and Ray's resources for all others.

    Args:
        others: Ray's.
        open_reception: starts the process of the tenants, with the first of them.
    """

    def __init__(self, others: ResourceManager, open_reception: Callable[[], Handle]) -> None:
        self._others, self._open = others, open_reception
        self._reception: Handle | None = None
        self._deaths = 0

    def lost(self, reception: Handle, error: RayActorError) -> RayActorError:
        """The error by which Tune is told that a tenant's process has died: the first times it is no trial's fault."""
        if reception is self._reception:
            self._reception = None
            self._deaths += 1
        return RayActorError(error_msg=str(error), preempted=self._deaths <= _FREE_DEATHS)

    def close(self) -> None:
        """End the process of the tenants."""
        if self._reception is not None:
            ray.kill(self._reception)
            self._reception = None

    def request_resources(self, resource_request: ResourceRequest) -> None:
        """Ask Ray, except for a seat."""
        if not _is_seat(resource_request):
            self._others.request_resources(resource_request)

    def cancel_resource_request(self, resource_request: ResourceRequest) -> None:
        """Ask no longer."""
        if not _is_seat(resource_request):
            self._others.cancel_resource_request(resource_request)

    def has_resources_ready(self, resource_request: ResourceRequest) -> bool:
        """Whether there is room."""
        return _is_seat(resource_request) or self._others.has_resources_ready(resource_request)

    def acquire_resources(self, resource_request: ResourceRequest) -> AcquiredResources | None:
        """Room for one trial."""
        if not _is_seat(resource_request):
            return self._others.acquire_resources(resource_request)
        if self._reception is None:
            self._reception = self._open()
        return _SeatTaken(resource_request, self._reception)

    def free_resources(self, acquired_resource: AcquiredResources) -> None:
        """Give the room of one trial back."""
        if not isinstance(acquired_resource, _SeatTaken):
            self._others.free_resources(acquired_resource)

    def get_resource_futures(self) -> list[ray.ObjectRef[Any]]:
        """What Ray was asked for and has not given yet."""
        return self._others.get_resource_futures()

    def update_state(self) -> None:
        """Take in what Ray has given."""
        self._others.update_state()  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Give everything back."""
        self._others.clear()  # type: ignore[no-untyped-call]


def _is_seat(request: ResourceRequest) -> bool:
    return bool(request.bundles == [SEAT])


class TrialActors(RayActorManager):
    """Tune's manager of actors; goes on where Ray ends the process of a trial because its node runs out of memory.

    Ray (2.60) answers calls of such a process with an error that Tune's manager does not know, and for which it stops
    the whole run.

    Args:
        resource_manager: gives seats and Ray's resources.
    """

    _resource_manager: Seats

    def remove_actor(self, tracked_actor: Any, kill: bool = False, stop_future: Any = None) -> bool:
        """Take a trial's actor away; whoever has a seat is never killed, only asked to leave."""
        kill = kill and self._seat_of(tracked_actor) is None
        return bool(super().remove_actor(tracked_actor, kill=kill, stop_future=stop_future))

    def cleanup(self) -> None:
        """Take away all that is left."""
        for tracked_actor in list(self._live_actors_to_ray_actors_resources):
            if self._seat_of(tracked_actor) is not None:
                self._cleanup_actor(tracked_actor)
        self._resource_manager.close()
        super().cleanup()  # type: ignore[no-untyped-call]

    def _actor_task_failed(self, tracked_actor_task: Any, exception: Exception) -> None:
        exception = as_death(exception)
        seat = self._seat_of(tracked_actor_task._tracked_actor)
        if seat is not None and isinstance(exception, RayActorError) and not isinstance(exception, RayTaskError):
            exception = self._resource_manager.lost(seat.reception, exception)
        super()._actor_task_failed(tracked_actor_task, exception)

    def _seat_of(self, tracked_actor: Any) -> Seat | None:
        actor, _ = self._live_actors_to_ray_actors_resources.get(tracked_actor, (None, None))
        return actor if isinstance(actor, Seat) else None


def use_trial_actors(open_reception: Callable[[], Handle]) -> None:
    """Have the next Tune run of this process keep its trials so."""

    def manager(resource_manager: ResourceManager) -> TrialActors:
        return TrialActors(Seats(resource_manager, open_reception))

    tune_controller.RayActorManager = manager  # type: ignore[attr-defined, assignment]
