from __future__ import annotations

import pytest

from tunebench.engine.schedules import schedule_factor
from tunebench.study.spec import Schedule, ScheduleKind

HORIZON = 200


def factors(schedule: Schedule) -> list[float]:
    return [schedule_factor(schedule, step, HORIZON) for step in range(HORIZON + 1)]


@pytest.mark.parametrize("kind", [kind for kind in ScheduleKind if kind is not ScheduleKind.CONSTANT])
@pytest.mark.parametrize("final", [0.0, 0.1])
def test_every_decay_ends_at_the_horizon_and_never_rises_after_the_warm_up(kind: ScheduleKind, final: float):
    values = factors(Schedule(kind=kind, warmup_fraction=0.1, final_factor=final))
    assert values[HORIZON] == pytest.approx(final, abs=1e-15)
    assert max(values) == 1.0
    after = values[20:]
    assert after == sorted(after, reverse=True)
    assert values[HORIZON - 1] > final


def test_the_warm_up_rises_linearly_and_never_starts_at_zero():
    values = factors(Schedule(kind=ScheduleKind.CONSTANT, warmup_fraction=0.1))
    assert values[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert set(values[20:]) == {1.0}


def test_cosine_is_half_way_down_in_the_middle_of_its_decay():
    values = factors(Schedule(kind=ScheduleKind.COSINE, warmup_fraction=0.0))
    assert values[HORIZON // 2] == pytest.approx(0.5)


def test_warmup_stable_decay_holds_until_its_last_part():
    values = factors(Schedule(kind=ScheduleKind.WARMUP_STABLE_DECAY, warmup_fraction=0.0, decay_fraction=0.25))
    assert set(values[:151]) == {1.0}
    assert values[175] == pytest.approx(0.5)
