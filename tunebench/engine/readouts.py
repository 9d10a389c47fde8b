"""Readouts: which weights an evaluation sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tunebench.study.record import Readout


@contextmanager
def readout_weights(module: Any, optimizer: Any, readout: Readout) -> Iterator[None]:
    """The module's model holds the weights of `readout` inside the block, and its training weights again after it.

    They come back, bit for bit, however the block ends. EMA swaps with the averages NequIP's EMALightningModule keeps;
    SCHEDULE_FREE switches the optimizer to its averaged iterate and back.
    """
    match readout:
        case Readout.RAW:
            yield
        case Readout.EMA:
            module.ema.swap_parameters(module.model)
            try:
                yield
            finally:
                module.ema.swap_parameters(module.model)
        case Readout.SCHEDULE_FREE:
            optimizer.eval()
            try:
                yield
            finally:
                optimizer.train()
