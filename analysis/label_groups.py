"""Which workloads of a run differ in their force labels only, and their label efficiency."""

from __future__ import annotations

import json
from collections.abc import Sequence

from analysis.label_efficiency import LabelEfficiency, label_efficiency
from analysis.load import Run
from tunebench.study.spec import Workload


def label_groups(workloads: Sequence[Workload]) -> tuple[dict[float, str], ...]:
    """Groups of two workloads or more that are alike but for name and `labels.force_fraction`: fraction -> name."""
    groups: dict[str, dict[float, str]] = {}
    for workload in workloads:
        rest = workload.model_dump(mode="json", exclude={"name": True, "labels": {"force_fraction"}})
        group = groups.setdefault(json.dumps(rest, sort_keys=True), {})
        group.setdefault(workload.labels.force_fraction, workload.name)
    return tuple(group for group in groups.values() if len(group) > 1)


def label_efficiencies(
    run: Run, errors: dict[str, dict[str, dict[int, float]]], baseline: str
) -> tuple[LabelEfficiency, ...]:
    """Label efficiency of every such group of a run.

    Args:
        run: the run.
        errors: workload -> optimizer -> test force error by seed index.
        baseline: optimizer that sets the mark.
    """
    found = []
    for group in label_groups(run.study.workloads):
        by_optimizer: dict[str, dict[float, dict[int, float]]] = {}
        for fraction, name in group.items():
            for optimizer, values in errors.get(name, {}).items():
                by_optimizer.setdefault(optimizer, {})[fraction] = values
        found.append(label_efficiency(group, by_optimizer, baseline))
    return tuple(found)
