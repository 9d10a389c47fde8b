"""The models that a run's confirm stage has left, and how far their properties have come.

Imports neither Ray nor torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tunebench.engine.checkpoints import FINAL, REFINED, checkpoint_folder
from tunebench.properties.model_record import ModelRecord
from tunebench.properties.of_study import Measurement, measurements
from tunebench.properties.time_limit import running_entries
from tunebench.study.objective import objective_value, selected_readout
from tunebench.study.record import Readout, Reason, Split, Stage, TrialRecord
from tunebench.study.spec import Study


@dataclass(frozen=True, kw_only=True)
class MeasuredModel:
    """One model and what is to be computed of it.

    Attributes:
        name: that of its files: a trial's id, or ``TRIAL.refined``.
        checkpoint: where it lies.
        readout: which weights.
        measured: sections and their plans.
    """

    name: str
    checkpoint: Path
    readout: Readout
    measured: tuple[Measurement, ...]

    @property
    def entries(self) -> frozenset[str]:
        """Entries of all its sections."""
        return frozenset(entry for part in self.measured for entry in part.plan.properties)


def models_of_run(study: Study, records: Sequence[TrialRecord], run: Path) -> list[MeasuredModel]:
    """Each model that the confirm stage has left: the weights that rank, and the refined ones.

    A trial that did not finish has no model; the analysis counts its properties as failed.
    """
    models = []
    for record in records:
        key = record.key
        measured = measurements(study, key.workload)
        readout = ranking_readout(study, record)
        if key.stage is not Stage.CONFIRM or record.reason is not Reason.FINISHED or not measured or readout is None:
            continue
        folder = checkpoint_folder(run, key.trial_id)
        names = {key.trial_id: readout}
        if (folder / REFINED).is_file():
            names[f"{key.trial_id}.{Readout.REFINED}"] = Readout.REFINED
        models += [
            MeasuredModel(name=name, checkpoint=folder / FINAL, readout=weights, measured=measured)
            for name, weights in names.items()
        ]
    return models


def ranking_readout(study: Study, record: TrialRecord) -> Readout | None:
    """The readout that counts for a trial under the study's policy, by its validation errors at its end."""
    errors = record.result.get(Split.VAL, {})
    objectives = {readout: objective_value(found, study.objective) for readout, found in errors.items()}
    chosen = selected_readout(objectives, study.objective)
    return None if chosen is None else Readout(chosen)


@dataclass(frozen=True, kw_only=True)
class PropertyProgress:
    """How far the properties of a run have come.

    Attributes:
        models: that there are so far. complete: of them, those that lack no entry.
        entries: over all models. done: of them, failed ones included. failed: of those.
        running: entries that a process has begun, with ``model``, ``entry`` and ``seconds``, the longest first.
    """

    models: int
    complete: int
    entries: int
    done: int
    failed: int
    running: tuple[dict[str, Any], ...]

    def to_plain(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        return {**asdict(self), "running": list(self.running)}


def property_progress(study: Study, records: Sequence[TrialRecord], run: Path) -> PropertyProgress:
    """Count models and entries by their files."""
    models = models_of_run(study, records, run)
    known = {model.name: ModelRecord(run, model.name) for model in models}
    done = {model.name: model.entries & known[model.name].entries for model in models}
    return PropertyProgress(
        models=len(models),
        complete=sum(done[model.name] == model.entries for model in models),
        entries=sum(len(model.entries) for model in models),
        done=sum(map(len, done.values())),
        failed=sum(len(done[name] & record.failed) for name, record in known.items()),
        running=tuple(
            {"model": one.model, "entry": one.entry, "seconds": one.seconds}
            for one in running_entries(run)
            if not one.ended and one.entry not in done.get(one.model, ())
        ),
    )
