"""What has to be known of Ray before it is imported: it reads its environment once, then."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TUNE_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "inf",  # its own state is of no use: a study resumes from its journal
}


def set_ray_environment(address: str | None) -> None:
    """Prepare a process that has not imported Ray yet.

    A cluster of this machine alone gets a token of its own, kept in this process and its children: Ray would
    otherwise leave one in the user's home folder, which then locks the next `ray start` (Ray 2.59 and later). A
    cluster that is joined keeps its own authentication.
    """
    for name, value in TUNE_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # with one start at a time for each core Ray warns on the screen where several processes start at once
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "16")
    # workers that Ray starts beforehand have no `runtime_env`; none of this program's actors could take them
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    if address is None and "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def terminate_like_interrupt() -> None:
    """Let SIGTERM, as schedulers of clusters send it, end the process as Ctrl-C does: state kept, exit code 130."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    on_interrupt = signal.getsignal(signal.SIGINT)  # Tune has its own while it runs
    if not callable(on_interrupt):  # ignored, as in a background job of a shell
        raise KeyboardInterrupt
    on_interrupt(signal.SIGINT, frame)


@contextmanager
def leaving_ray() -> Iterator[None]:
    """Disconnect from Ray at the end, unless the process was connected before or never came to it."""
    connected = _connected()
    try:
        yield
    finally:
        if not connected and _connected():
            sys.modules["ray"].shutdown()


def _connected() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())
