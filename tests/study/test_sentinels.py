from __future__ import annotations

import pytest

from tunebench.study.sentinels import sentinel_configurations, sentinel_count
from tunebench.study.spec import Asha


@pytest.mark.parametrize(("trials", "count"), [(4, 4), (8, 8), (16, 8), (53, 8), (54, 9), (100, 15)])
def test_by_default_sentinels_are_15_percent_at_least_8_and_at_most_all(trials: int, count: int) -> None:
    assert sentinel_count(Asha(), trials) == count
    assert len(sentinel_configurations(Asha(), trials, 0, "ethanol")) == count


def test_the_study_may_say_how_many() -> None:
    assert sentinel_count(Asha(sentinels=0), 20) == 0
    assert sentinel_count(Asha(sentinels=3), 20) == 3
    assert sentinel_count(None, 20) == 0


def test_the_draw_depends_on_the_studys_seed_and_the_workload_and_on_nothing_else() -> None:
    drawn = sentinel_configurations(Asha(), 40, 7, "ethanol")
    assert drawn == sentinel_configurations(Asha(form="stopping"), 40, 7, "ethanol")
    assert drawn <= set(range(40))
    assert drawn != sentinel_configurations(Asha(), 40, 8, "ethanol")
    assert drawn != sentinel_configurations(Asha(), 40, 7, "water")


def test_every_configuration_is_equally_likely_to_be_a_sentinel() -> None:
    counts = [0] * 20
    for root in range(500):
        for index in sentinel_configurations(Asha(sentinels=5), 20, root, "ethanol"):
            counts[index] += 1
    assert all(85 < count < 165 for count in counts)  # 125 expected, standard deviation 9.7
