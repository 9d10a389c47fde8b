"""Learning-rate schedules: a factor on the trial's learning rate that ends at the horizon."""

from __future__ import annotations

import math
from collections.abc import Callable

from tunebench.study.spec import Schedule, ScheduleKind


def schedule_factor(schedule: Schedule, step: int, horizon: int) -> float:
    """Factor for the update that follows `step` finished steps; `step == horizon` is the end of the run.

    The warm-up rises linearly to 1 over its share of the horizon and never starts at zero. The decay reaches
    `final_factor` exactly at the horizon; warmup_stable_decay holds 1 until its last `decay_fraction`.
    """
    warmup = round(schedule.warmup_fraction * horizon)
    if step < warmup:
        return (step + 1) / warmup
    match schedule.kind:
        case ScheduleKind.CONSTANT:
            return 1.0
        case ScheduleKind.WARMUP_STABLE_DECAY:
            start = horizon - round(schedule.decay_fraction * horizon)
        case _:
            start = warmup
    progress = min(max((step - start) / max(horizon - start, 1), 0.0), 1.0)
    shape = (1.0 + math.cos(math.pi * progress)) / 2.0 if schedule.kind is ScheduleKind.COSINE else 1.0 - progress
    return schedule.final_factor + (1.0 - schedule.final_factor) * shape


def learning_rate_factor(horizon: int, **schedule: float | str) -> Callable[[int], float]:
    """`schedule_factor` as the `lr_lambda` of torch's LambdaLR, also from a `nequip-train` config by `_target_`.

    A function, not an object: LambdaLR would put an object's attributes into every checkpoint.
    """
    parsed = Schedule.model_validate(schedule)

    def factor(step: int) -> float:
        return schedule_factor(parsed, step, horizon)

    return factor
