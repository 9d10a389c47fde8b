"""The configuration to use, as text for a `nequip-train` config: everything but data paths and model."""

from __future__ import annotations

import yaml

from analysis.choice import Choice
from analysis.load import Run
from tunebench.study.record import Readout
from tunebench.study.training_sections import training_sections


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
            Readout(space.readout),
            horizon=workload.max_steps,
        ),
    }
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True, width=100)
