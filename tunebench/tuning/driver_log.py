"""Ray's and Tune's own messages, which go to a file of the run and not to the screen."""

from __future__ import annotations

import logging
from pathlib import Path

from tunebench.tuning.trial_log import LOGS


class _DriverLog(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: where the disk is full the run says so itself, and a log cannot."""


def log_driver(run: Path, name: str = "driver.log") -> None:
    """From now on Ray's and Tune's messages of this process go to a file in the run's `logs/`."""
    (run / LOGS).mkdir(parents=True, exist_ok=True)
    handler = _DriverLog(run / LOGS / name)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for each in ("ray", "ray.tune"):
        logger = logging.getLogger(each)
        logger.handlers = [handler]
        logger.propagate = False
    # it looks for Tune's own result files, which this run does not write
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
