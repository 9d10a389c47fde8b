"""The driver's side of the pool of cohorts: what is planned, and how many tenants may come at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError
from ray.tune.search import BasicVariantGenerator
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tunebench.engine.task import TrialTask
from tunebench.study.errors import RunStopped
from tunebench.study.spec import Resources
from tunebench.study.storage import Storage
from tunebench.tuning.handle import Handle
from tunebench.tuning.node_checks import Standard
from tunebench.tuning.pool import Pool

_ASK_EVERY_S = 2.0
_CALLS_AT_ONCE = 65536  # every trial in a slot waits in one


class PoolClient:
    """The pool of one run; its actor starts with the first trials for it and ends with the driver.

    It looks after the nodes as well: on a cluster that was joined, and where trials without a cohort wait for a kind of
    device, it starts with the first trials of any engine.

    Args:
        resources: what the study says of devices, slots and failures.
        run: the run directory.
        joined: whether the cluster is another one than this machine alone.
        storage: of the run, or None.
        say: takes lines for the user.

    Attributes:
        actor: the pool; None before there is work for it.
    """

    def __init__(
        self,
        resources: Resources,
        run: Path,
        *,
        joined: bool = False,
        storage: Storage | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.actor: Handle | None = None
        self._storage = storage
        self._resources, self._run, self._joined, self._say = resources, run.resolve(), joined, say
        self._capacity, self._heard = 1, 0
        self._asked_at = -_ASK_EVERY_S

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles the queue that asks it, and a resumed run makes its own."""
        return {}

    def plan(
        self,
        tasks: Mapping[str, TrialTask],
        *,
        others_wait: bool,
        kinds: Mapping[str, str] | None = None,
        bound: Mapping[str, str] | None = None,
    ) -> None:
        """A stage begins with these trials of the cohort engine; arguments are those of `Pool.plan`."""
        if self.actor is None and not (tasks or bound or self._joined):
            return
        if self.actor is None:
            self.actor = self._started()
        ray.get(self.actor.plan.remote(dict(tasks), others_wait, kinds, bound))
        self._asked_at = -_ASK_EVERY_S

    def look(self) -> None:
        """Ask the pool, every few seconds, how much room there is, and tell the user what became of nodes.

        Raises:
            RunStopped: the pool has died; no trial could go on.
        """
        now = time.monotonic()
        if self.actor is None or now - self._asked_at < _ASK_EVERY_S:
            return
        self._asked_at = now
        try:
            self._capacity, events = ray.get(self.actor.look.remote(self._heard))
        except RayActorError as error:
            raise RunStopped(f"{self._run}: the pool of cohorts has died; run again to go on") from error
        self._heard += len(events)
        for event in events:
            self._say(event)

    def capacity(self) -> int:
        """Trials that can be in slots at once.

        Raises:
            RunStopped: as `look`.
        """
        self.look()
        return min(self._capacity, self._resources.concurrent_trials or self._capacity)

    def others(self) -> int | None:
        """Trials of other engines that can train at once; None where Ray's resources alone bound them."""
        return self._resources.concurrent_trials

    def vacate(self, trial: str, visit: str) -> None:
        """Free the slot of a trial that waits at a rung or was stopped, without waiting for its process to notice."""
        if self.actor is not None:
            self.actor.vacate.remote(trial, visit)

    def close(self) -> None:
        """End the pool and its cohorts, whose devices are free then; the next trials for it start another."""
        if self.actor is not None:
            ray.kill(self.actor)  # its cohorts belong to it, and end with it
            self.actor = None

    def _started(self) -> Handle:
        standard = Standard.of_driver(self._resources.device, self._run, self._storage) if self._joined else None
        return start_here(Pool, self._resources, self._run, self._storage, standard)


def start_here(actor_class: type, *arguments: Any) -> Handle:
    """Start an actor on this process's node that takes no share of it and ends with this process."""
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": _CALLS_AT_ONCE, "scheduling_strategy": here}
    remote: Any = ray.remote(actor_class)
    return remote.options(**options).remote(*arguments)


class Room(Protocol):
    """What a driver knows of the room for its trials."""

    @property
    def actor(self) -> Handle | None:
        """The pool; None where no trial needs one."""

    def capacity(self) -> int:
        """Trials that can be in slots at once."""

    def others(self) -> int | None:
        """Trials of other engines that can train at once; None where Ray's resources alone bound them."""

    def vacate(self, trial: str, visit: str) -> None:
        """Free the slot of a trial."""


class TrialQueue(BasicVariantGenerator):
    """Hands trials to Tune in their order: first as many tenants as there are slots, then the others.

    The number of slots changes with the cluster. Without a bound on the others Ray's resources are theirs. Trials that
    wait at a rung have no place and do not count.

    Tune's own grid (Ray 2.60) copies all names for each trial. So each is a point that is given beforehand,
    and what Tune is given is `param_space` and `num_samples`.

    Args:
        trials: names of all trials.
        tenants: those of the cohort engine, which come first.
        room: knows how many slots there are, and how many other trials may train at once.
        waiting: trials at a rung.
        closed: whether nothing new may start; it may end the run where nothing is left to wait for.
        called: takes each trial as it is handed over, or is given a place again.
    """

    def __init__(
        self,
        trials: Sequence[str],
        tenants: Collection[str],
        room: Room,
        waiting: Callable[[], Collection[str]] = tuple,
        closed: Callable[[], bool] = lambda: False,
        called: Callable[[str], None] = lambda trial: None,
    ) -> None:
        super().__init__(points_to_evaluate=[{"trial": name} for name in trials])
        self.param_space, self.num_samples = {"trial": None}, len(trials)
        self._tenants, self._tenants_left, self._left = frozenset(tenants), len(tenants), len(trials)
        self._room, self._waiting, self._closed, self._called = room, waiting, closed, called

    def next_trial(self) -> Any:
        """The next trial, or None while its kind has no room or nothing may start."""
        if self._closed():
            return None
        bound = self._bound(tenant=self._tenants_left > 0) if self._left else None
        if bound == 0:
            return None
        self.max_concurrent = bound + len(self._waiting()) if bound else 0  # for Tune's queue, 0 is no bound
        trial = super().next_trial()  # type: ignore[no-untyped-call]
        if trial is not None:
            self._left -= 1
            self._tenants_left -= self._tenants_left > 0
            self._called(trial.config["trial"])
        return trial

    def first_with_room(self, trials: Iterable[str], active: Collection[str]) -> str | None:
        """The first of trials that were promoted that may take a place while others have one or wait for one; it does.

        Args:
            trials: in their order.
            active: names of those that have a place or wait for one.
        """
        tenants = sum(name in self._tenants for name in active)
        room = {True: self._has_room(tenants, tenant=True), False: self._has_room(len(active) - tenants, tenant=False)}
        found = next((trial for trial in trials if room[trial in self._tenants]), None)
        if found is not None:
            self._called(found)
        return found

    def _has_room(self, taken: int, *, tenant: bool) -> bool:
        bound = self._bound(tenant=tenant)
        return bound is None or taken < bound

    def _bound(self, *, tenant: bool) -> int | None:
        return self._room.capacity() if tenant else self._room.others()

    def save_to_dir(self, dirpath: str, session_str: str) -> None:  # type: ignore[override]
        """Nothing: a resumed run plans from the journal."""
