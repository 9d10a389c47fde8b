"""One log file per trial, whoever works on it; imports neither Ray nor torch."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOGS = "logs"


def trial_log(run: Path, trial: str) -> Path:
    """Where a trial's log lies."""
    return run / LOGS / f"{trial}.log"


def stall_file(run: Path, trial: str) -> Path:
    """Where it is told that a trial's own process stopped training without an end."""
    return run / LOGS / f"{trial}.stalled"


def cohort_stall_file(logs: Path, cohort: int) -> Path:
    """Likewise for a cohort's process; `logs` is the folder of the run's logs."""
    return logs / f"cohort-{cohort}.stalled"


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send this process's log, warnings and the traceback of a failure to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.captureWarnings(True)
    try:
        yield
    except Exception:
        logging.getLogger(__name__).error("the trial crashed\n%s", traceback.format_exc())
        raise
    finally:
        root.removeHandler(handler)
        handler.close()
