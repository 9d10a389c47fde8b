"""What Ray reserves for a trial's process. Tune sends this with every trial, so it imports neither torch nor NequIP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune

from tunebench.study.spec import Resources
from tunebench.tuning.devices import share_of_kind
from tunebench.tuning.trial_actors import SEAT


def trial_resources(resources: Resources) -> dict[str, float]:
    """What is reserved for one trial of the `lightning` engine."""
    return {"CPU": resources.cpus_per_trial, "GPU": resources.gpus_per_trial}


@dataclass(frozen=True)
class Shares:
    """The share of each trial: a seat for a tenant, whose device is its cohort's.

    Attributes:
        alone: what is reserved for a trial that is no tenant.
        kinds: names of those, with the kind of device that each has to have; empty where any will do.
    """

    alone: Mapping[str, float]
    kinds: Mapping[str, str]

    def __call__(self, config: Mapping[str, Any]) -> tune.PlacementGroupFactory:
        """What the trial that `config["trial"]` names needs."""
        kind = self.kinds.get(config["trial"])
        share = SEAT if kind is None else {**self.alone, **share_of_kind(kind)}
        return tune.PlacementGroupFactory([dict(share)])
