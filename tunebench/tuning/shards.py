"""Several drivers of one stage: the arms are divided among them, all else stays in the main process.

Where one Tune cannot take in the reports of all trials at once, several do, each in a process of its own
(`tunebench.tuning.shard`). The main process remains the one that plans, holds the run, writes the journal, watches the
pool of cohorts and shows what happens. Arms share no decision, so each driver decides about its arms as one would.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tunebench.study.errors import Interrupted, RunStopped
from tunebench.tuning.division import Places, divided_arms
from tunebench.tuning.driver import DriverWork
from tunebench.tuning.entries import Write
from tunebench.tuning.handle import Handle
from tunebench.tuning.pool_client import PoolClient
from tunebench.tuning.ray_environment import TUNE_ENVIRONMENT
from tunebench.tuning.shard import Lease, Shard, Told

_WAIT_S = 1.0


class Shards:
    """The drivers of one run beside its main process; they start with the first stage and end with `close`.

    Args:
        run: the run directory.
        most: drivers at once.
    """

    def __init__(self, run: Path, most: int) -> None:
        self._run, self._most = run, most
        self._actors: list[Handle] = []

    def divided(self, work: DriverWork) -> list[DriverWork]:
        """A stage's work as that of each driver: as many as there may be, or one for each arm with open trials."""
        if self._most == 1:
            return [work]
        reports = Counter(dict.fromkeys((record.key.arm for record in work.records), 0))
        for task in (*work.tenants.values(), *work.alone.values()):
            reports[task.key.arm] += len(task.evaluation_steps)
        arms = divided_arms(reports, self._most)
        return [work.of_arms(of_one, f"{work.name}-{number}") for number, of_one in enumerate(arms, 1)]

    def run(self, works: Sequence[DriverWork], pool: PoolClient, write: Write, tick: Callable[[], None]) -> None:
        """Let a driver work on each part until all have ended; an interrupt returns early with trials left open.

        Args:
            works: parts of a stage's work.
            pool: that all of them share.
            write: takes the entries of all; those that bind are on the disk when it returns.
            tick: called whenever something was told, and once a second.

        Raises:
            Interrupted: the run was asked to end, and every driver has.
            RunStopped: a driver's process has died, the disk is full, the storage failed or the pool has died.
        """
        desk = _Desk(works, pool)
        try:
            self._begin(works, pool)
            with _interrupts() as interrupted:
                ended = self._serve(desk, write, tick, interrupted)
        except BaseException:
            self.close()
            raise
        if not ended:
            self.close()

    def close(self) -> None:
        """End the drivers; their trials' processes end with them."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()

    def _begin(self, works: Sequence[DriverWork], pool: PoolClient) -> None:
        self._actors += [_started(number) for number in range(len(self._actors) + 1, len(works) + 1)]
        begun = [actor.begin.remote(work, pool.actor) for actor, work in zip(self._actors, works, strict=False)]
        for number, call in enumerate(begun):
            self._answer(number, len(works), call)

    def _serve(self, desk: _Desk, write: Write, tick: Callable[[], None], interrupted: threading.Event) -> bool:
        """Take in what drivers tell until all have ended, or an interrupt comes: whether they have."""
        error: Exception | None = None
        calls = {actor.take.remote(desk.lease(n)): n for n, actor in enumerate(self._actors[: len(desk.works)])}
        while calls:
            told = self._told(calls, len(desk.works))
            write([entry for each in told.values() for entry in each.entries])
            for number, each in told.items():
                desk.take(number, each)
                if isinstance(each.error, Interrupted):
                    error = each.error  # the others have been asked the same
                elif each.error is not None:
                    raise each.error
            if interrupted.is_set():
                return False
            calls |= {self._actors[n].take.remote(desk.lease(n)): n for n, each in told.items() if not each.ended}
            tick()
        if error is not None:
            raise error
        return True

    def _told(self, calls: dict[Any, int], drivers: int) -> dict[int, Told]:
        """What drivers tell now, by their numbers: of all that do, because one wait for the disk is enough for all."""
        first, rest = ray.wait(list(calls), num_returns=1, timeout=_WAIT_S)
        more = ray.wait(rest, num_returns=len(rest), timeout=0)[0] if first and rest else []
        numbers = {calls.pop(call): call for call in (*first, *more)}
        return {number: self._answer(number, drivers, call) for number, call in numbers.items()}

    def _answer(self, number: int, drivers: int, call: Any) -> Any:
        try:
            return ray.get(call)
        except RayActorError as error:
            line = f"{self._run}: the process of driver {number + 1} of {drivers} has died; run again to go on"
            raise RunStopped(line) from error


class _Desk:
    """Who works on what, and how many places each has."""

    def __init__(self, works: Sequence[DriverWork], pool: PoolClient) -> None:
        self.works, self._pool = works, pool
        self._tenants = Places([{name: task.workload.name for name, task in work.tenants.items()} for work in works])
        self._others = Places([{name: task.workload.name for name, task in work.alone.items()} for work in works])

    def take(self, number: int, told: Told) -> None:
        for places in (self._tenants, self._others):
            places.take(number, told.entries)
            if told.ended:
                places.end(number)

    def lease(self, number: int) -> Lease:
        tenants, others = self._pool.capacity(), self._pool.others()
        return Lease(
            tenants=self._tenants.give(number, tenants),
            others=None if others is None else self._others.give(number, others),
        )


def _started(number: int) -> Handle:
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
    options: dict[str, Any] = {
        "num_cpus": 0,
        "scheduling_strategy": here,
        "runtime_env": {"env_vars": TUNE_ENVIRONMENT},
    }
    actor_class: Any = ray.remote(Shard)
    return actor_class.options(**options).remote(number)


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """The first interrupt is kept for a moment when it breaks nothing; a second one is as ever."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.getsignal(signal.SIGINT)

    def keep(number: int, frame: FrameType | None) -> None:
        came.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, keep)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)
