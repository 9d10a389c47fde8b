from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunebench.engine.task import Evaluation, Seeds, TrialTask
from tunebench.study.record import Readout, Stage, TrialKey
from tunebench.study.search_space import SearchSpace
from tunebench.study.spec import Arm, Labels, Loss, Model, Objective, Schedule, Workload, XtbData
from tunebench.workloads.data import PreparedData

MakeTask = Callable[..., TrialTask]


@pytest.fixture
def make_task(tmp_path: Path, tiny_ethanol: XtbData, prepared_ethanol: PreparedData) -> MakeTask:
    """Builds a trial of ten ethanol frames; keywords override the optimizer's defaults."""

    def make(
        optimizer: str = "adamw",
        *,
        family: str = "nequip",
        stage: Stage = Stage.TUNE,
        steps: int = 8,
        evaluation_steps: tuple[int, ...] = (4, 8),
        force_fraction: float = 1.0,
        name: str = "trial",
        loss: Loss | None = None,
        **hyperparameters: Any,
    ) -> TrialTask:
        space = SearchSpace.load(optimizer)
        workload = Workload(
            name="ethanol",
            data=tiny_ethanol,
            model=Model(family=family, r_max_angstrom=4.0),
            loss=loss or Loss(),
            labels=Labels(force_fraction=force_fraction),
            batch_size=2,
            max_steps=steps,
        )
        return TrialTask(
            key=TrialKey(workload="ethanol", optimizer=optimizer, stage=stage, config_index=0, seed_index=0),
            workload=workload,
            data=prepared_ethanol,
            hyperparameters={**space.defaults(), **hyperparameters},
            averaged=Readout(space.readout),
            schedule=space.schedule_of(Arm(name=optimizer), Schedule()),
            objective=Objective(),
            seeds=Seeds(init=1, order=2, labels=3),
            evaluation_steps=evaluation_steps,
            run=tmp_path / name,
            treats=space.treats,
            written_every_s=0.0,
        )

    return make


class Reports(list[Evaluation]):
    """Collects a trial's reports, and stops it after `stop_after` of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self._stop_after = stop_after

    def __call__(self, evaluation: Evaluation) -> None:
        self.append(evaluation)
        if len(self) == self._stop_after:
            raise SystemExit
