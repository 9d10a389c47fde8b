"""The configuration to use, as text for a `nequip-train` config: everything but data paths and model."""

from __future__ import annotations

import yaml

from analysis.choice import Choice
from analysis.load import Run
from analysis.selection import chosen_readout, finished_trials
from tunebench.study.record import Readout, TrialRecord
from tunebench.study.training_sections import training_sections


def repeated_trial(run: Run, choice: Choice) -> TrialRecord:
    """The trial that a config of a choice repeats: its finished confirm trial with the lowest seed index."""
    own = finished_trials(run, choice.workload, choice.optimizer, choice.config_index)
    return min(own, key=lambda trial: trial.key.seed_index)


def kept_readout(run: Run, trial: TrialRecord) -> Readout:
    """The weights by which a finished trial counts, as far as NequIP can keep them.

    For a schedule-free optimizer NequIP keeps the averaged weights alone.
    """
    averaged = Readout(run.resolved.spaces[trial.key.optimizer].readout)
    raw = chosen_readout(trial, run.study.objective) == Readout.RAW
    return Readout.RAW if raw and averaged is Readout.EMA else averaged


def config_text(run: Run, choice: Choice) -> str:
    """YAML of trainer, data loader and training module of a choice; `tunebench export` adds data and model."""
    workload = next(found for found in run.study.workloads if found.name == choice.workload)
    space = run.resolved.spaces[choice.optimizer]
    sections = {
        "trainer": {"max_steps": workload.max_steps, "gradient_clip_val": workload.clip_global_norm},
        "data": {"train_dataloader": {"batch_size": workload.batch_size, "shuffle": True, "drop_last": True}},
        "training_module": training_sections(
            workload,
            run.rule_of(choice.optimizer),
            {**choice.params, **space.fixed_values()},
            run.resolved.schedules[choice.optimizer],
            kept_readout(run, repeated_trial(run, choice)),
            horizon=workload.max_steps,
        ),
    }
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=100)
