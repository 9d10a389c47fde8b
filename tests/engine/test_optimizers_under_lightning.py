"""The optimizers inside NequIP's own training modules and a real Trainer."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
from hydra.utils import get_class
from nequip.data import AtomicDataDict
from nequip.utils.global_state import set_global_state
from torch.utils.data import DataLoader

from tests.engine.conftest import MakeTask
from tests.engine.test_lightning import assert_same_state
from tunebench.engine.batches import task_frames
from tunebench.engine.nequip_config import training_module
from tunebench.engine.task import TrialTask
from tunebench.study.record import Split
from tunebench.study.search_space import shipped_optimizers

STEPS = 4
EVERY = [(name, "nequip") for name in shipped_optimizers()] + [("soap", "allegro"), ("schedule_free", "allegro")]


def fitted(task: TrialTask, *, validate_every: int | None, optimizer: dict[str, Any] | None = None) -> Any:
    """NequIP's module after some steps; `validate_every` so many of them, in the middle of the epoch."""
    set_global_state()
    config = training_module(task)
    config |= {"optimizer": optimizer} if optimizer else {}
    kind = get_class(config.pop("_target_"))
    module = kind(num_datasets={"train": 1, "val": 1, "test": 1, "predict": 0}, **config)
    loaders = {
        split: DataLoader(task_frames(task, split), batch_size=2, collate_fn=AtomicDataDict.batched_from_list)
        for split in (Split.TRAIN, Split.VAL)
    }
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=validate_every,
        check_val_every_n_epoch=None if validate_every else 1,
        limit_val_batches=1.0 if validate_every else 0,
        gradient_clip_val=1.0,
    )
    trainer.fit(module, train_dataloaders=loaders[Split.TRAIN], val_dataloaders=loaders[Split.VAL])
    assert trainer.global_step == STEPS
    return module


def weights(module: Any) -> dict[str, torch.Tensor]:
    """Of the model and, where there is one, of its moving average; metrics left out."""
    return {key: value for key, value in module.state_dict().items() if key.startswith(("model.", "ema."))}


@pytest.mark.parametrize(("optimizer", "family"), EVERY)
def test_validation_in_the_middle_of_an_epoch_changes_no_bit_of_the_training(
    make_task: MakeTask, optimizer: str, family: str
) -> None:
    task = make_task(optimizer, family=family)
    uninterrupted = fitted(task, validate_every=None)
    validated = fitted(task, validate_every=1)
    for module in (uninterrupted, validated):
        if optimizer == "schedule_free":
            module.optimizers().train()
    assert_same_state(weights(uninterrupted), weights(validated))
    states = [module.optimizers().state_dict()["state"] for module in (uninterrupted, validated)]
    assert states[0]["group 0"]["step"] == STEPS
    assert_same_state(*states)


def test_the_schedulefree_library_breaks_off_after_such_a_validation(make_task: MakeTask) -> None:
    task = make_task("schedule_free")
    theirs = {"_target_": "schedulefree.AdamWScheduleFree", "lr": 1e-2}
    with pytest.raises(Exception, match="not in train mode"):
        fitted(task, validate_every=1, optimizer=theirs)


def test_validation_sees_the_averaged_weights_of_schedule_free(make_task: MakeTask) -> None:
    module = fitted(make_task("schedule_free"), validate_every=STEPS)
    averaged = [parameter.detach().clone() for parameter in module.model.parameters()]
    module.optimizers().train()
    pairs = zip(averaged, module.model.parameters(), strict=True)
    assert not any(torch.equal(average, trained) for average, trained in pairs)
