"""All tenants of one driver in one process, which knows nothing of Tune.

A process for each tenant would take two seconds of a core to start and 100 MB, and a study needs as many as there are
slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray

from tunebench.study.storage import Storage
from tunebench.tuning.handle import Handle
from tunebench.tuning.node_copy import run_here
from tunebench.tuning.tenancy import Tenant


class Reception:
    """Where Tune's calls of tenants arrive. Its methods run in one event loop, side by side.

    Args:
        pool: gives places to tenants.
        run: the run directory. storage: of the run, or None.
        after_last: what a tenant reports when it is asked for more than it has.
    """

    def __init__(self, pool: Handle, run: Path, storage: Storage | None, after_last: Mapping[str, Any]) -> None:
        self._pool, self._run, self._after_last = pool, run_here(run, storage), dict(after_last)
        self._tenants: dict[str, Tenant] = {}
        self._asked: dict[str, asyncio.Task[dict[str, Any]]] = {}

    async def train(self, stay: str, trial: str) -> dict[str, Any]:
        """The next report of a trial, which begins to look for a place with the first call of its stay.

        Raises:
            CohortLost: the cohort or its node died, or the trial cannot be trained.
        """
        if stay not in self._tenants:
            this = ray.get_runtime_context().current_actor
            self._tenants[stay] = Tenant(trial, self._pool, this, self._run)
        if self._tenants[stay].over:
            return self._after_last
        asked = self._asked[stay] = asyncio.create_task(self._tenants[stay].next_report())
        try:
            return await asked
        except asyncio.CancelledError:  # it was sent away, and nobody listens
            return self._after_last
        finally:
            self._asked.pop(stay, None)

    async def leave(self, stay: str) -> None:
        """A stay is over, whatever its tenant waits for; a second call does nothing."""
        tenant, asked = self._tenants.pop(stay, None), self._asked.get(stay)
        if asked is not None:
            asked.cancel()
        if tenant is not None and not tenant.over:
            tenant.leave()

    async def lives(self) -> None:
        """Never returns: who waits for it learns of the actor's death."""
        await asyncio.Event().wait()
