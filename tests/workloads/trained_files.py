"""Checkpoints and packages of small models, made by NequIP's own means."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from nequip.scripts import _workflow_utils, package
from nequip.train import NequIPLightningModule
from nequip.utils import get_current_code_versions
from nequip.utils.global_state import get_latest_global_state, set_global_state

from tunebench.study.spec import Model
from tunebench.workloads.data import PreparedData
from tunebench.workloads.models import model_config
from tunebench.workloads.statistics import TrainingStatistics


def model_section(model: Model, types: Sequence[str], seed: int = 5, **arguments: Any) -> dict[str, Any]:
    """A NequIP model section whose energy shifts differ from type to type."""
    statistics = TrainingStatistics(
        per_type_energy_shifts=tuple(-10.0 - 3.0 * position for position in range(len(types))),
        degenerate=False,
        force_rms=1.3,
        avg_num_neighbors=6.5,
        labelled_frames=1,
        note="",
    )
    return {**model_config(model, types, statistics, seed), **arguments}


def write_checkpoint(path: Path, section: dict[str, Any], data: PreparedData) -> torch.nn.Module:
    """A checkpoint as `nequip-train` writes it, and the model that is in it; its data are the prepared set's."""
    set_global_state()
    module_section = {"_target_": "nequip.train.NequIPLightningModule", "model": section}
    info = {
        "versions": get_current_code_versions(verbose=False),
        "data": {
            "_target_": "nequip.data.datamodule.ASEDataModule",
            "seed": 0,
            "train_file_path": str(data.splits["train"].path),
            "val_file_path": str(data.splits["val"].path),
            "transforms": [
                {
                    "_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper",
                    "model_type_names": list(section["type_names"]),
                },
                {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": section["r_max"]},
            ],
        },
        "trainer": {},
        "global_options": get_latest_global_state(),
        "runs": ["train"],
        "training_module": module_section,
    }
    sizes = {"train": 1, "val": 0, "test": 0, "predict": 0}
    module = NequIPLightningModule(model=section, num_datasets=sizes, info_dict=info)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    (model,) = module.model.values()
    return model.eval()


def write_package(path: Path, checkpoint: Path) -> None:
    """What ``nequip-package build`` makes of a checkpoint."""
    state = _workflow_utils._WORKFLOW_STATE
    arguments, sys.argv = sys.argv, ["nequip-package"]
    try:
        package.main(["build", str(checkpoint), str(path)])
    finally:
        sys.argv = arguments
        _workflow_utils._WORKFLOW_STATE = state
