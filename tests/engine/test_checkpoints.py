from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tunebench.engine.checkpoints import (
    LAST,
    checkpoint_folder,
    drop_checkpoints,
    load_checkpoint,
    save_checkpoint,
)

STATE = {
    "module": {"weight": torch.arange(6, dtype=torch.float32).reshape(2, 3)},
    "optimizer": {"state": {0: {"step": torch.tensor(4.0, dtype=torch.float64), "GG": [[], None]}}},
    "rows": [("trial", 4, 0.5)],
    "evaluation": "{}",
}

# Ends as a kill does, without any clean-up, at the moment the written file would take its name.
KILLED_BEFORE_THE_RENAME = """
import os, sys
from pathlib import Path
from tunebench.engine.checkpoints import save_checkpoint

def killed(path, target):
    assert path.stat().st_size > 0
    os._exit(9)

Path.replace = killed
save_checkpoint(Path(sys.argv[1]), {"step": 8})
"""


class NotPlain:
    """Something that only unrestricted unpickling would bring back."""


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a" / "b", STATE)
    loaded = load_checkpoint(tmp_path / "a" / "b")
    assert loaded is not None
    weight, step = loaded["module"]["weight"], loaded["optimizer"]["state"][0]["step"]
    assert torch.equal(weight, STATE["module"]["weight"])
    assert (weight.dtype, step.dtype) == (torch.float32, torch.float64)
    assert loaded["optimizer"]["state"][0]["GG"] == [[], None]
    assert loaded["rows"] == STATE["rows"]


def test_before_the_first_checkpoint_there_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "nowhere") is None


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"object": NotPlain()})
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        load_checkpoint(tmp_path)


def test_a_newer_checkpoint_takes_the_place_of_the_older(tmp_path: Path) -> None:
    for step in (4, 8):
        save_checkpoint(tmp_path, {"step": step})
    assert load_checkpoint(tmp_path) == {"step": 8}
    assert [file.name for file in tmp_path.iterdir()] == [LAST]


def test_a_kill_between_write_and_rename_leaves_the_older(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"step": 4})
    killed = subprocess.run([sys.executable, "-c", KILLED_BEFORE_THE_RENAME, str(tmp_path)], check=False)
    assert killed.returncode == 9
    assert load_checkpoint(tmp_path) == {"step": 4}
    save_checkpoint(tmp_path, {"step": 8})
    assert load_checkpoint(tmp_path) == {"step": 8}
    assert [file.name for file in tmp_path.iterdir()] == [LAST]


def test_dropping_touches_one_trial_only_and_may_be_repeated(tmp_path: Path) -> None:
    for name in ("w.soap.confirm.c000.s1", "w.soap.confirm.c000.s10"):
        save_checkpoint(checkpoint_folder(tmp_path, name), {"step": 4})
    for _ in range(2):
        drop_checkpoints(tmp_path, "w.soap.confirm.c000.s1")
        assert load_checkpoint(checkpoint_folder(tmp_path, "w.soap.confirm.c000.s1")) is None
        assert load_checkpoint(checkpoint_folder(tmp_path, "w.soap.confirm.c000.s10")) == {"step": 4}
