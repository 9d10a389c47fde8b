"""An arm's cap on device-seconds: how many configurations it may search (rule F2).

Device-seconds are steps times the seconds of a step alone on the device, so the cap depends on nothing that happens
while a study runs: not on company in a cohort, other users or a kill. In the promotion form a rung lets a known number
of trials go on, and what an arm costs at most is known before the first step.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

from tunebench.study.plan import ArmPlan, legs, promoted
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.sentinels import grown_sentinels, sentinel_configurations
from tunebench.study.spec import Asha, Tune


def cap_of(arm: ArmPlan, tune: Tune) -> float | None:
    """Device-seconds that the tune stage may give to an arm; an audit has as many more as it has configurations."""
    cap = tune.device_seconds_per_arm
    return None if cap is None else cap * max(arm.trials / tune.trials_per_arm, 1.0)


def most_device_s(
    arm: ArmPlan,
    asha: Asha | None,
    step_s: Sequence[float],
    sentinels: Collection[int],
    fewest: int,
    decided: Collection[int] = (),
) -> float:
    """Device-seconds of an arm's search if the dearest of its configurations are those that go on.

    Args:
        arm: the arm.
        asha: how the study stops, in the promotion form and the deterministic order; None stops nothing.
        step_s: seconds of a step of each configuration that it searches, in their order.
        sentinels: indices of those that go on in any case.
        fewest: trials that a rung lets go on at least.
        decided: numbers of configurations that the arm had before each extension. Their rungs had been decided, and
            whom those let go on goes on beside the best of all.
    """
    stretches = legs(arm.rungs, arm.workload.max_steps, arm.fidelity)
    spared = [seconds for index, seconds in enumerate(step_s) if index in sentinels]
    others = sorted((seconds for index, seconds in enumerate(step_s) if index not in sentinels), reverse=True)
    going, total = sorted({*decided, len(step_s)}), stretches[0] * sum(step_s)
    for steps in stretches[1:]:
        assert asha is not None
        here = [promoted(asha, count, fewest) for count in going]
        going = list(itertools.accumulate(here))  # whom an extension promotes, beside those who were before it
        total += steps * (sum(spared) + sum(others[: going[-1]]))
    return total


def affordable(
    arm: ArmPlan,
    asha: Asha | None,
    step_s: Sequence[float],
    sentinels: Callable[[int], Collection[int]],
    fewest: int,
    cap_s: float,
    decided: Collection[int] = (),
) -> int:
    """How many of an arm's configurations, from the first on, cost no more than a cap.

    Those that an arm has already stay, whatever they cost.

    Args:
        arm: the arm.
        asha: as for `most_device_s`.
        step_s: seconds of a step of each configuration that it would search without a cap.
        sentinels: indices of the sentinels in an arm with so many configurations.
        fewest: trials that a rung lets go on at least.
        cap_s: device-seconds.
        decided: as for `most_device_s`.
    """
    counts = range(len(step_s), max(decided, default=0), -1)
    fits = (n for n in counts if most_device_s(arm, asha, step_s[:n], sentinels(n), fewest, decided) <= cap_s)
    return next(fits, max(decided, default=0))


def arm_sentinels(resolved: ResolvedStudy, arm: ArmPlan, sizes: Mapping[int, int] | None = None) -> frozenset[int]:
    """Indices of an arm's sentinels, by the same rule for every arm, and the same ones where no cap bites.

    An untuned arm has one trial, which no rung can stop; it is a sentinel where the first trial of the others is.

    Args:
        resolved: the study with its extensions.
        arm: the arm.
        sizes: where there is a cap, configurations of the arm by those it would have without one, at the start and
            after each extension; None where there is none.
    """
    study, per_arm = resolved.study, (*resolved.earlier_trials_per_arm, resolved.study.tune.trials_per_arm)
    asha, seed, workload = study.tune.asha, study.seed, arm.workload.name
    if arm.trials < per_arm[-1]:
        return sentinel_configurations(asha, per_arm[0], seed, workload) & frozenset(range(arm.trials))
    budget = arm.trials // per_arm[-1]
    uncapped = {budget * trials: budget * trials for trials in per_arm}
    return grown_sentinels(asha, uncapped if sizes is None else sizes, seed, workload, budget=budget)
