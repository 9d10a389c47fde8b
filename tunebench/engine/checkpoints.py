"""Checkpoints of a trial: everything its next step depends on, loadable with `weights_only`.

Torch is imported by what reads or writes them, so that those who only ask where they lie do without.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from tunebench.study.files import replacing
from tunebench.study.record import CHECKPOINTS

_log = logging.getLogger(__name__)

LAST = "last.pt"
FINAL = "final.ckpt"
REFINED = "refined.pt"
"""Weights by name after a refinement, in its precision, and what it did; loadable with `weights_only`."""


def checkpoint_folder(run: Path, trial_id: str) -> Path:
    """Where a trial keeps `last.pt` (to resume) and, at the end of a confirm trial, NequIP's own `final.ckpt`."""
    return run / CHECKPOINTS / trial_id


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Replace `last.pt` at once: a kill leaves the previous checkpoint whole."""
    import torch

    with replacing(folder / LAST) as partial:
        torch.save(state, partial)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The last checkpoint on the CPU; None before the first, or where a failing disk left one that cannot be read."""
    import torch

    path = folder / LAST
    if not path.is_file():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError) as error:
        _log.warning("%s: cannot be read, the trial starts anew: %s", path, error)
        return None
    return state


def drop_checkpoints(run: Path, trial_id: str) -> None:
    """Delete what a finished trial no longer needs; what cannot be deleted stays, with a line in the log."""
    try:
        shutil.rmtree(checkpoint_folder(run, trial_id))
    except FileNotFoundError:
        return  # it ended before its first checkpoint
    except OSError as error:
        _log.warning("%s: checkpoints stay: %s", trial_id, error)
