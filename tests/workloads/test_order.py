from __future__ import annotations

from pathlib import Path

import lightning
import pytest
import torch
from nequip.data.datamodule import NequIPDataModule

from tunebench.workloads.data import PreparedData
from tunebench.workloads.frames import prepared_frames
from tunebench.workloads.order import batch_order


class Recorder(lightning.LightningModule):
    """Notes which frames Lightning hands out in each training step, by their energies."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[float]] = []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.seen.append(batch["total_energy"].flatten().tolist())
        return self.weight.sum()

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 10])
@pytest.mark.parametrize("seed", [0, 2026])
def test_the_order_is_the_one_nequip_trains_in(
    prepared_ethanol: PreparedData, batch_size: int, seed: int, tmp_path: Path
) -> None:
    frames = {
        "_target_": "tunebench.workloads.frames.PreparedFrames",
        "folder": str(prepared_ethanol.folder),
        "r_max": 3.0,
    }
    data = NequIPDataModule(
        seed=seed,
        train_dataset={**frames, "split": "train"},
        val_dataset={**frames, "split": "val"},
        train_dataloader={"batch_size": batch_size, "shuffle": True, "drop_last": True},
        val_dataloader={"batch_size": 2},
    )
    recorder = Recorder()
    lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(recorder, datamodule=data)
    dataset = prepared_frames(prepared_ethanol, "train", 3.0)
    index_of = {dataset[index]["total_energy"].item(): index for index in range(len(dataset))}
    seen = [[index_of[energy] for energy in batch] for batch in recorder.seen]
    assert len(seen) == 3 * (len(dataset) // batch_size)
    assert batch_order(len(dataset), batch_size, len(seen), seed) == seen


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    assert batch_order(10, 3, 20, 5)[:7] == batch_order(10, 3, 7, 5)


def test_every_epoch_visits_a_frame_at_most_once() -> None:
    order = batch_order(11, 5, 2, 1)
    assert len({index for batch in order for index in batch}) == 10


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    batch_order(10, 2, 12, 3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_no_epoch_can_fill_is_refused(batch_size: int) -> None:
    with pytest.raises(ValueError, match=rf"^batch_size: found {batch_size}, allowed: 1 to .*10$"):
        batch_order(10, batch_size, 1, 0)
