from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tunebench.workloads.labels import labelled_frames, split_labels


@pytest.mark.parametrize("frames", [0, 1, 7, 100])
@pytest.mark.parametrize("seed", [0, 1, 2026])
def test_smaller_fractions_are_subsets_of_the_rounded_size(frames: int, seed: int) -> None:
    fractions = (0.0, 0.05, 0.1, 0.5, 0.75, 1.0)
    masks = [labelled_frames(frames, fraction, seed) for fraction in fractions]
    assert [mask.sum() for mask in masks] == [round(fraction * frames) for fraction in fractions]
    for few, many in pairwise(masks):
        assert not np.any(few & ~many)


def test_the_seed_alone_chooses_the_frames() -> None:
    assert np.array_equal(labelled_frames(100, 0.3, 7), labelled_frames(100, 0.3, 7))
    assert not np.array_equal(labelled_frames(100, 0.3, 7), labelled_frames(100, 0.3, 8))


def test_only_training_and_validation_lose_labels() -> None:
    assert split_labels("train", 10, 0.0, 0).sum() == 0
    assert split_labels("val", 10, 0.5, 0).sum() == 5
    assert split_labels("test", 10, 0.0, 0).all()
    assert split_labels("ood:hot", 10, 0.0, 0).all()


def test_training_and_validation_draw_apart() -> None:
    assert not np.array_equal(split_labels("train", 100, 0.5, 0), split_labels("val", 100, 0.5, 0))


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_an_impossible_fraction_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"^fraction: found"):
        labelled_frames(10, fraction, 0)
