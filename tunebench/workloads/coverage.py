"""Whether a label stands behind every weight of a study."""

from __future__ import annotations

from tunebench.study.spec import Loss, Objective, Workload
from tunebench.workloads.data import PreparedData
from tunebench.workloads.errors import WorkloadError


def check_labels(data: PreparedData, workload: Workload, objective: Objective) -> None:
    """Refuse weights without labels: they would train or select on nothing.

    Raises:
        WorkloadError: a weighted stress that the data do not have; forces as the only weight while the label fraction
            leaves none; a batch larger than the training split.
    """
    _check_section("loss", workload.loss, "train", data, workload)
    _check_section("objective", objective, "val", data, workload)
    frames = data.splits["train"].frames
    if workload.batch_size > frames:
        raise WorkloadError("batch_size", workload.batch_size, f"at most the {frames} training frames")


def _check_section(name: str, weights: Loss | Objective, split: str, data: PreparedData, workload: Workload) -> None:
    if weights.stress > 0 and not data.has_stress:
        raise WorkloadError(f"{name}.stress", weights.stress, "0, for the data carry no stress")
    frames, fraction = data.splits[split].frames, workload.labels.force_fraction
    forces_alone = weights.forces > 0 and weights.energy_per_atom + weights.stress == 0
    if forces_alone and round(fraction * frames) == 0:
        allowed = f"a fraction that labels one of the {frames} {split} frames or more, or another weight in {name}"
        raise WorkloadError("labels.force_fraction", fraction, allowed)
