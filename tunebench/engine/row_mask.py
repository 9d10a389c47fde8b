"""Which rows of a cohort's matrices a step changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class RowMask:
    """A mask on a device, sent there only where it changes: sending waits until the device has done all it was given.

    Args:
        rows: how many, none of them marked.
        device: where the mask lives.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.marked = torch.zeros(rows, dtype=torch.bool, device=device)
        self._sent = [False] * rows

    def set(self, marked: Sequence[bool]) -> None:
        """Mark these rows from now on, in place."""
        if self._sent != list(marked):
            self.marked.copy_(torch.tensor(marked, dtype=torch.bool))
            self._sent = list(marked)

    def clear(self, row: int) -> None:
        """Mark a row no longer."""
        self.marked[row] = False
        self._sent[row] = False
