from __future__ import annotations

from typing import Any

import pytest

from tunebench.study.spec import Labels, Loss, Model, Objective, Workload, XtbData
from tunebench.workloads.coverage import check_labels
from tunebench.workloads.data import PreparedData
from tunebench.workloads.errors import WorkloadError

FORCES = Loss(energy_per_atom=0.0)


def workload(data: XtbData, **changes: Any) -> Workload:
    return Workload(name="w", data=data, model=Model(family="nequip"), max_steps=8, **changes)


@pytest.mark.parametrize(
    ("changes", "objective", "key"),
    [
        ({"loss": FORCES, "labels": Labels(force_fraction=0.01)}, Objective(), "labels.force_fraction"),
        ({"labels": Labels(force_fraction=0.0)}, Objective(energy_per_atom=0.0), "labels.force_fraction"),
        ({"loss": Loss(stress=1.0)}, Objective(), "loss.stress"),
        ({}, Objective(stress=50.0), "objective.stress"),
        ({"batch_size": 11}, Objective(), "batch_size"),
    ],
)
def test_a_weight_without_a_label_is_refused(
    tiny_ethanol: XtbData, prepared_ethanol: PreparedData, changes: dict[str, Any], objective: Objective, key: str
) -> None:
    with pytest.raises(WorkloadError) as refused:
        check_labels(prepared_ethanol, workload(tiny_ethanol, **changes), objective)
    assert refused.value.key == key


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_energies_alone_are_enough(tiny_ethanol: XtbData, prepared_ethanol: PreparedData, fraction: float) -> None:
    check_labels(prepared_ethanol, workload(tiny_ethanol, labels=Labels(force_fraction=fraction)), Objective())
    assert prepared_ethanol.splits["train"].frames == 10
