from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from tunebench.study.power import smallest_difference


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_the_smallest_difference_is_seen_in_four_of_five_simulated_studies(seeds: int) -> None:
    draw = np.random.default_rng(0)
    errors = draw.standard_normal((2, 4000, seeds))
    errors[1] += smallest_difference(seeds)
    seen = stats.ttest_rel(errors[0], errors[1], axis=1).pvalue < 0.05
    assert np.mean(seen) == pytest.approx(0.8, abs=0.025)


def test_more_seeds_resolve_less_and_one_resolves_nothing() -> None:
    resolved = [smallest_difference(seeds) for seeds in (1, 2, 3, 5, 10, 30)]
    assert resolved[0] == math.inf
    assert resolved == sorted(resolved, reverse=True)
    assert resolved[-1] == pytest.approx(2.8 * math.sqrt(2 / 30), rel=0.06)  # the normal approximation
