"""Batch order: which frames form the batch of each training step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader


def batch_order(num_frames: int, batch_size: int, steps: int, seed: int) -> list[list[int]]:
    """The frame indices of every training step, exactly as plain NequIP training with this data seed draws them.

    NequIP's data module hands one generator, seeded once, to a shuffling `torch.utils.data.DataLoader` that is iterated
    epoch after epoch. Here a real one runs over bare indices, because it also takes a number of its own from the
    generator at each epoch, which a reimplementation would have to know about.

    Args:
        num_frames: training frames.
        batch_size: frames per step; the incomplete batch at the end of an epoch is dropped.
        steps: batches wanted.
        seed: data-order seed.

    Returns:
        ``steps`` lists of ``batch_size`` frame indices.

    Raises:
        ValueError: the batch is larger than the training split, so that no epoch has a batch.
    """
    if not 1 <= batch_size <= num_frames:
        raise ValueError(f"batch_size: found {batch_size}, allowed: 1 to the number of training frames, {num_frames}")
    batches = _epochs(num_frames, batch_size, seed)
    return [next(batches) for _ in range(steps)]


def _epochs(num_frames: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    used = num_frames // batch_size * batch_size
    loader: DataLoader[int] = DataLoader(
        range(num_frames),  # type: ignore[arg-type]  # a range is a map-style dataset in all but name
        batch_size=used,  # all batches of an epoch in one: the draws are the same, and a loader's step is slow
        shuffle=True,
        drop_last=True,
        generator=torch.Generator().manual_seed(seed),
        collate_fn=list,
    )
    while True:
        # Lightning stops after the last batch without asking for more, so the sampler never makes its closing draw.
        epoch = next(iter(loader))
        yield from (epoch[first : first + batch_size] for first in range(0, used, batch_size))
