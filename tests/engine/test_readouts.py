from __future__ import annotations

from typing import Any

import pytest
import torch
from nequip.data import AtomicDataDict
from nequip.utils.global_state import set_global_state

from tests.engine.conftest import MakeTask
from tunebench.engine.batches import task_frames
from tunebench.engine.loss import LossWeights
from tunebench.engine.modules import build_module
from tunebench.engine.nequip_config import training_module
from tunebench.engine.readouts import readout_weights
from tunebench.study.objective import selected_readout
from tunebench.study.record import Readout, Split
from tunebench.study.spec import Objective

OPTIMIZER_OF = {Readout.RAW: "adamw", Readout.EMA: "adamw", Readout.SCHEDULE_FREE: "schedule_free"}
READOUTS = pytest.mark.parametrize("readout", list(OPTIMIZER_OF))


def weights(module: Any) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.model.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Training:
    """A module and its optimizer after three steps on one batch, as Lightning would hold them."""

    def __init__(self, make_task: MakeTask, readout: Readout) -> None:
        set_global_state()
        task = make_task(OPTIMIZER_OF[readout])
        frames = task_frames(task, Split.TRAIN)
        self.batch = AtomicDataDict.batched_from_list([frames[0], frames[1]])
        self.module = build_module(training_module(task), LossWeights.of(task.workload.loss), task.averaged)
        configured = self.module.configure_optimizers()
        self.optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
        if readout is Readout.SCHEDULE_FREE:
            self.optimizer.train()
        for _ in range(3):
            self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.module.training_step(dict(self.batch), 0).backward()
        self.optimizer.step()
        if hasattr(self.module, "ema"):
            self.module.ema.update_parameters(self.module.model)


@READOUTS
def test_an_averaged_readout_shows_other_weights_inside_the_block_only(make_task: MakeTask, readout: Readout) -> None:
    training = Training(make_task, readout)
    before = weights(training.module)
    with readout_weights(training.module, training.optimizer, readout):
        inside = weights(training.module)
    assert same(inside, before) is (readout is Readout.RAW)
    assert same(weights(training.module), before)


@READOUTS
def test_an_exception_inside_the_block_gives_the_training_weights_back(make_task: MakeTask, readout: Readout) -> None:
    training = Training(make_task, readout)
    before = weights(training.module)
    with (
        pytest.raises(MemoryError),
        readout_weights(training.module, training.optimizer, readout),
    ):
        raise MemoryError
    assert same(weights(training.module), before)
    training.step()  # schedule-free would refuse a step in its averaged state
    assert not same(weights(training.module), before)


@pytest.mark.parametrize("averaged", ["ema", "schedule_free"])
@pytest.mark.parametrize(
    ("policy", "raw", "expected"),
    [
        ("raw", 2.0, 2.0),
        ("raw", 0.5, 0.5),
        ("averaged", 2.0, 1.0),
        ("averaged", 0.5, 1.0),
        ("best", 2.0, 1.0),
        ("best", 0.5, 0.5),
    ],
)
def test_the_study_says_which_readout_counts(averaged: str, policy: Any, raw: float, expected: float) -> None:
    objectives = {"raw": raw, averaged: 1.0}
    readout = selected_readout(objectives, Objective(readout=policy))
    assert objectives[str(readout)] == expected
