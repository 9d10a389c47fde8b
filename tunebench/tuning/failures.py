"""Why Tune lost a trial, told by the error it keeps: a crash of its own, a stall, lack of memory, or a lost node."""

from __future__ import annotations

from ray.exceptions import OutOfMemoryError, RayActorError

from tunebench.engine.watchdog import STALLED
from tunebench.study.record import Reason

# Ray 2.60 says so in the text of the error alone, which is also what comes back through Tune's files.
_LOW_MEMORY = "node running low on memory"
_NODE_GONE = "its node has died"


def reason_of(error: object) -> Reason:
    """OOM, PREEMPTED, TIMED_OUT for a process that its watchdog has ended, or CRASHED.

    Args:
        error: Tune's error, its text, or None where the process died without one.
    """
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, OutOfMemoryError | MemoryError) or _LOW_MEMORY in str(cause):
        return Reason.OOM
    if STALLED in str(cause):
        return Reason.TIMED_OUT
    return Reason.PREEMPTED if node_is_gone(cause) else Reason.CRASHED


def node_is_gone(error: object) -> bool:
    """Whether a process died with its node, which says nothing of what it did."""
    return (isinstance(error, RayActorError) and error.preempted) or _NODE_GONE in str(error)


def as_death(error: Exception) -> Exception:
    """The error of a dead process in place of that of one that Ray has ended for lack of memory; any other as it is.

    What calls such a process gets an `OutOfMemoryError`, which is no `RayActorError` (Ray 2.60).
    """
    return RayActorError(error_msg=str(error)) if isinstance(error, OutOfMemoryError) else error


def one_line(error: BaseException) -> str:
    """What went wrong in a process of Ray's, at most 500 characters; of a traceback its last line."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return " ".join((lines[0] if isinstance(error, RayActorError) else lines[-1]).split())[:500]
