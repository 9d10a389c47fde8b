"""One Tune trial: looks its task up by name and runs it on the `lightning` engine in its own process.

Actors are reused, so a process imports NequIP once and then trains trial after trial. Whatever a trial depends on
is set from its task; the engine leaves no state that the next trial would see.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray import tune

from tunebench.engine.task import Evaluation, TrialTask

LOGS = "logs"


def train_trial(config: Mapping[str, Any], tasks: Mapping[str, TrialTask]) -> None:
    """Tune's function trainable; `config["trial"]` names the task."""
    from tunebench.engine.lightning import run_trial  # imports torch and NequIP in the trial's process only

    task = tasks[config["trial"]]
    with log_to(task.run / LOGS / f"{task.key.trial_id}.log"):
        run_trial(task, _report)


def _report(evaluation: Evaluation) -> None:
    """Report to Tune, which raises SystemExit here where the scheduler stops the trial."""
    tune.report(evaluation.to_plain())


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
