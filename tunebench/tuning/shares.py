"""What Ray reserves for a trial's process. Tune sends this with every trial, so it imports neither torch nor NequIP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune

from tunebench.study.spec import Resources

_TENANT_BYTES = 128 * 2**20


def trial_resources(resources: Resources) -> dict[str, float]:
    """What is reserved for one trial of the `lightning` engine."""
    return {"CPU": resources.cpus_per_trial, "GPU": resources.gpus_per_trial}


@dataclass(frozen=True)
class Shares:
    """The share of each trial: memory alone for a tenant, whose device is its cohort's.

    Attributes:
        alone: what is reserved for a trial that is no tenant.
        trials: names of those.
    """

    alone: Mapping[str, float]
    trials: frozenset[str]

    def __call__(self, config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
        """What the trial that `config["trial"]` names needs."""
        share: dict[str, int | float] = {"memory": _TENANT_BYTES}
        if config["trial"] in self.trials:
            share = dict(self.alone)
        return tune.PlacementGroupFactory([share])
