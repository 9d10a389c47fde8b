"""Holds what an arm's optimizer really treats against what its search space promises (rule F10)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from tunebench.engine.calibration import configured_optimizer, training_parts
from tunebench.engine.task import TrialTask
from tunebench.optim.matrix_view import FctpView
from tunebench.optim.realised import check_promise, realised_groups
from tunebench.study.search_space import ChoiceParameter, Role, SearchSpace, Treats
from tunebench.study.training_sections import optimizer_section


def check_groups(task: TrialTask, groups: Iterable[Mapping[str, Any]], model: torch.nn.Module) -> None:
    """Compare a trial's realised groups with its search space's promise.

    Args:
        task: the trial.
        groups: from `realised_groups`.
        model: whose weights are trained.

    Raises:
        BrokenPromise: in one line, with optimizer, share found and share promised.
    """
    view = FctpView(task.hyperparameters["fctp_view"]) if task.treats is Treats.MATRICES else None
    check_promise(task.optimizer, groups, model, view)


def check_arm(task: TrialTask, space: SearchSpace) -> None:
    """Build a trial's model once, and its optimizer in every variant that the arm may search, and check them.

    Args:
        task: the arm's untuned trial.
        space: the arm's search space.

    Raises:
        WorkloadError: the model's builder refuses its arguments.
        ValueError: settings that the optimizer refuses, or groups that are not those promised.
    """
    module, _ = training_parts(task)
    for hyper in _variants(task.hyperparameters, space):
        module.optimizer_config = optimizer_section(task.workload, task.optimizer, hyper)
        optimizer = configured_optimizer(module)
        check_groups(replace(task, hyperparameters=hyper), realised_groups(optimizer), module.model)


def _variants(defaults: dict[str, Any], space: SearchSpace) -> Iterator[dict[str, Any]]:
    """The defaults, and them with each other choice of structure in turn."""
    yield defaults
    for name, parameter in space.parameters.items():
        if parameter.role is Role.STRUCTURE and isinstance(parameter, ChoiceParameter):
            yield from ({**defaults, name: choice} for choice in parameter.choices if choice != defaults[name])
