"""What is to be timed, wherever that is done; imports neither Ray nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tunebench.study.resolve import ResolvedStudy
from tunebench.study.storage import Storage
from tunebench.tuning.device_budget import Searched
from tunebench.workloads.data import PreparedData


@dataclass(frozen=True, kw_only=True)
class Errand:
    """What is measured.

    Attributes:
        resolved: the study.
        data: prepared data by workload.
        searched: hyperparameters of trials by arm name.
        run: the run directory. storage: of the run, or None.
        rounds, seconds: as for `SoloPlan`.
    """

    resolved: ResolvedStudy
    data: Mapping[str, PreparedData]
    searched: Searched
    run: Path
    storage: Storage | None = None
    rounds: int = 5
    seconds: float = 0.5
