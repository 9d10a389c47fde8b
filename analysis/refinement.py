"""What the second-order refinement of confirm trials did, beside what it began with. It never ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.load import Run
from analysis.page_tables import MEV, Table
from analysis.statistics import iqm
from analysis.wording import ABSENT, listed, milli, number
from tunebench.study.record import Metric, Readout, Split, Stage, TrialRecord


def refinement_table(run: Run, workload: str) -> Table:
    """One row per arm with refined trials: errors before and after over the same seeds, why it ended, what it cost."""
    found = {
        optimizer: [trial for trial in run.arm(workload, optimizer, Stage.CONFIRM) if "refinement" in trial.detail]
        for optimizer in run.optimizers
    }
    return Table(
        title="Second-order refinement",
        note="Full-batch L-BFGS after training, from the weights that count, of all confirm trials: interquartile "
        f"means over the same trials before and after, lower is better. Force MAE in {MEV}, energy MAE in meV/atom. "
        "Loss: kept weights over those it began with, on the training split; 1 where nothing was gained. Steps: "
        "training steps that see as many frames. No verdict rests on it.",
        columns=(
            "optimizer",
            "trials",
            "test force MAE, before",
            "after",
            "test energy MAE, before",
            "after",
            "training loss, after over before",
            "ended by",
            "steps",
            "device-seconds",
        ),
        rows=tuple((optimizer, *_row(trials)) for optimizer, trials in found.items() if trials),
    )


def refused(run: Run, workload: str) -> list[str]:
    """One line per trial that ended its refinement with the weights it began with, with the reason."""
    return [
        f"{trial.key.trial_id}: {done['message']}"
        for optimizer in run.optimizers
        for trial in run.arm(workload, optimizer, Stage.CONFIRM)
        if (done := trial.detail.get("refinement")) and not done.get("kept_iteration")
    ]


def _row(trials: Sequence[TrialRecord]) -> tuple[str, ...]:
    done: list[dict[str, Any]] = [trial.detail["refinement"] for trial in trials]
    refined = [(trial, one) for trial, one in zip(trials, done, strict=True) if "loss_after" in one]
    ends = Counter(str(one["end"]) for one in done)
    errors: list[str] = []
    for metric in (Metric.FORCES_MAE, Metric.ENERGY_PER_ATOM_MAE):
        for readout in (None, Readout.REFINED.value):
            values = [
                trial.result.get(Split.TEST, {}).get(readout or one["readout"], {}).get(metric)
                for trial, one in refined
            ]
            known = [value for value in values if value is not None]
            errors.append(milli(_mean(known)) if known else ABSENT)
    ratios = [one["loss_after"] / one["loss_before"] for _, one in refined if one["loss_before"]]
    return (
        str(len(trials)),
        *errors,
        number(_mean(ratios), 3) if ratios else ABSENT,
        listed(f"{end} {count}" for end, count in sorted(ends.items())),
        number(sum(one["refine_steps"] for _, one in refined), 3),
        number(sum(one["refine_device_s"] for _, one in refined), 3),
    )


def _mean(values: Sequence[float]) -> float:
    return float(iqm(np.array(values, dtype=np.float64)))
