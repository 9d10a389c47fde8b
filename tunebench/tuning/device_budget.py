"""How many configurations each arm of a run may search under the study's cap on device-seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunebench.study.budget import affordable, arm_sentinels, cap_of, most_device_s
from tunebench.study.journal import JournalWriter
from tunebench.study.plan import ArmPlan
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import InWords, StudyError
from tunebench.study.step_times import DeviceTimes, add_tables, read_calibration

Searched = Mapping[str, Sequence[Mapping[str, Any]]]
"""Searched hyperparameters of all configurations by arm name, in the order of the Sobol sequence."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an arm searches.

    Attributes:
        count: configurations, the first ones of the common sequence.
        sentinels: indices of those that no rung stops.
    """

    count: int
    sentinels: frozenset[int]


def budgets(
    resolved: ResolvedStudy,
    searched: Searched,
    arms: Sequence[ArmPlan],
    run: Path,
    journal: JournalWriter,
    say: Callable[[str], None],
    measure: Callable[[], DeviceTimes],
) -> dict[str, Budget]:
    """Configurations and sentinels by arm name: all configurations, or as many as the cap pays for.

    What was decided once stays decided: the journal keeps it, whatever a later calibration measures. Where the run has
    no step times yet, or no kind of device has all its settings, they are measured now.

    Args:
        resolved: the study.
        searched: what each arm would search without a cap.
        arms: of the study.
        run: the run directory.
        journal: of the run.
        say: takes lines for the user.
        measure: times the steps of all settings that are searched.

    Raises:
        StudyError: the cap does not pay for the configurations that an arm is to confirm.
    """
    if resolved.study.tune.device_seconds_per_arm is None:
        return {arm.name: Budget(count=arm.trials, sentinels=arm_sentinels(resolved, arm)) for arm in arms}
    before = {arm.name: journal.afforded_before(arm.name, arm.trials) for arm in arms}
    found = {arm.name: journal.afforded(arm.name, arm.trials) for arm in arms}
    open_arms = [arm for arm in arms if found[arm.name] is None]
    times = _step_seconds(resolved, searched, open_arms, run, measure) if open_arms else {}
    new = {arm.name: _afforded(resolved, arm, times[arm.name], before[arm.name]) for arm in open_arms}
    for arm in open_arms:  # when every arm is known to have enough
        journal.afford(arm.name, arm.trials, new[arm.name])
    counts = {name: new[name] if count is None else count for name, count in found.items()}
    given = {
        arm.name: Budget(
            count=counts[arm.name],
            sentinels=arm_sentinels(resolved, arm, before[arm.name] | {arm.trials: counts[arm.name]}),
        )
        for arm in arms
    }
    for arm in open_arms:
        _tell(resolved, arm, given[arm.name], say)
    return given


def _tell(resolved: ResolvedStudy, arm: ArmPlan, budget: Budget, say: Callable[[str], None]) -> None:
    """Say where the cap bites."""
    if budget.count < arm.trials:
        cap = cap_of(arm, resolved.study.tune)
        pays = f"pay for {budget.count} of {arm.trials} configurations, {len(budget.sentinels)} of them sentinels"
        say(f"{arm.name}: {cap:.0f} device-seconds {pays}")


def _afforded(resolved: ResolvedStudy, arm: ArmPlan, step_s: Sequence[float], before: Mapping[int, int]) -> int:
    tune, fewest = resolved.study.tune, resolved.study.confirm.top_k
    cap = cap_of(arm, tune)
    assert cap is not None

    def sentinels(count: int) -> frozenset[int]:
        return arm_sentinels(resolved, arm, {**before, arm.trials: count})

    count = affordable(arm, tune.asha, step_s, sentinels, fewest, cap, before.values())
    needed = min(fewest, arm.trials)
    if count < needed:
        least = most_device_s(arm, tune.asha, step_s[:needed], sentinels(needed), fewest)
        allowed = f"{least:.0f} or more, which {needed} configurations of {arm.name} may cost (confirm.top_k)"
        found = InWords(f"{cap:g} for {arm.name}")
        raise StudyError(resolved.file, "tune.device_seconds_per_arm", found, allowed)
    return count


def _step_seconds(
    resolved: ResolvedStudy,
    searched: Searched,
    arms: Sequence[ArmPlan],
    run: Path,
    measure: Callable[[], DeviceTimes],
) -> dict[str, list[float]]:
    """Seconds of a step of every configuration, by arm name, all on one kind of device."""
    found = read_calibration(run, resolved.hash)
    configurations = [(arm.space, arm.workload.name, params) for arm in arms for params in searched[arm.name]]
    table = found.covering(configurations) if found else None
    if table is None:
        table = measure()
        add_tables(run, resolved.hash, [table])
    return {arm.name: _known(resolved, arm, _of_arm(table, arm, searched)) for arm in arms}


def _of_arm(table: DeviceTimes, arm: ArmPlan, searched: Searched) -> list[float | None]:
    times = (table.step_time(arm.space, arm.workload.name, params) for params in searched[arm.name])
    return [None if time is None else time.median_s for time in times]


def _known(resolved: ResolvedStudy, arm: ArmPlan, seconds: Sequence[float | None]) -> list[float]:
    known = [each for each in seconds if each is not None]
    if len(known) < len(seconds):
        found = InWords(f"no step time for {len(seconds) - len(known)} configurations of {arm.name}")
        raise StudyError(
            resolved.file, "tune.device_seconds_per_arm", found, "steps that can be measured, as said above"
        )
    return known
