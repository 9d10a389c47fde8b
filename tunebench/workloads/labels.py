"""Partial force labels: which frames keep their forces."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tunebench.study.record import Split
from tunebench.study.seeds import named_seed

_MASKED_SPLITS = (Split.TRAIN, Split.VAL)


def labelled_frames(num_frames: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Mark the ``round(fraction * num_frames)`` frames that keep their forces.

    The frames are a prefix of one permutation per seed, so the frames of a smaller fraction are among those of a larger
    one, and every optimizer of a study sees the same frames.

    Args:
        num_frames: frames in the split.
        fraction: fraction that keeps its forces, in [0, 1].
        seed: seed of the permutation.

    Returns:
        Mask of shape (num_frames,).

    Raises:
        ValueError: the fraction lies outside [0, 1].
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction: found {fraction!r}, allowed: a number from 0 to 1")
    mask = np.zeros(num_frames, dtype=np.bool_)
    order = np.random.default_rng(seed).permutation(num_frames)
    mask[order[: round(fraction * num_frames)]] = True
    return mask


def split_labels(split: str, num_frames: int, fraction: float, seed: int) -> NDArray[np.bool_]:
    """Mark the labelled frames of a split: training and validation are masked, test and every ``ood:`` split never.

    Training and validation draw from separate seeds, both named from ``seed``; shape (num_frames,).
    """
    if split not in _MASKED_SPLITS:
        return np.ones(num_frames, dtype=np.bool_)
    return labelled_frames(num_frames, fraction, named_seed(seed, "labels", split))
