"""Readouts: which weights an evaluation sees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tunebench.study.record import Readout
from tunebench.study.spec import Objective


@contextmanager
def readout_weights(module: Any, optimizer: Any, readout: Readout) -> Iterator[None]:
    """The module's model holds the weights of `readout` inside the block, and its training weights again after it.

    They come back however the block ends. EMA swaps with the averages NequIP's EMALightningModule keeps;
    SCHEDULE_FREE switches the optimizer to its averaged iterate and back, which schedulefree requires before the
    next step.
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


def selected_value(by_readout: dict[str, float], objective: Objective) -> float:
    """The objective under the study's readout policy, alike for every arm (rule F8)."""
    raw = by_readout[Readout.RAW]
    averaged = next(value for name, value in by_readout.items() if name != Readout.RAW)
    match objective.readout:
        case "raw":
            return raw
        case "averaged":
            return averaged
        case _:
            return min(raw, averaged)
