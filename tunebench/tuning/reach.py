"""Calls of actors across a network that may be cut for a while.

Ray (2.60) fails a call when the connection breaks, with `ActorUnavailableError` as long as nobody knows whether the
actor is dead. Whoever is called here may therefore be called twice with the same arguments, and must not mind.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray.exceptions import ActorUnavailableError, OutOfMemoryError

from tunebench.tuning.failures import as_death

_PAUSE_S = 1.0


async def reached(call: Callable[[], Any]) -> Any:
    """Await what a call returns, and call again while its actor cannot be reached.

    Raises:
        RayActorError: the actor is dead, be it ended for lack of its node's memory.
        RayTaskError: the call failed there.
    """
    while True:
        try:
            return await call()
        except ActorUnavailableError:
            await asyncio.sleep(_PAUSE_S)
        except OutOfMemoryError as error:
            raise as_death(error) from error
