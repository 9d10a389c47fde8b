"""How many configurations each arm of a run may search under the study's cap on device-seconds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunebench.study.budget import affordable, cap_of, most_device_s
from tunebench.study.journal import JournalWriter
from tunebench.study.plan import ArmPlan
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import InWords, StudyError
from tunebench.study.step_times import Calibration, read_calibration, write_calibration
from tunebench.workloads.data import PreparedData, graphs_folder

Searched = Mapping[str, Sequence[Mapping[str, Any]]]
"""Searched hyperparameters of all configurations by arm name, in the order of the Sobol sequence."""


def afforded(
    resolved: ResolvedStudy,
    data: Mapping[str, PreparedData],
    searched: Searched,
    sentinels: Mapping[str, Collection[int]],
    arms: Sequence[ArmPlan],
    run: Path,
    journal: JournalWriter,
    say: Callable[[str], None],
) -> dict[str, int]:
    """Configurations by arm name: all of them, or as many as the cap pays for.

    What was decided once stays decided: the journal keeps it, whatever a later calibration measures. Where the run has
    no step times yet, or not of all its settings, they are measured now.

    Args:
        resolved: the study.
        data: prepared data by workload.
        searched: what each arm would search without a cap.
        sentinels: indices of the sentinels by workload.
        arms: of the study.
        run: the run directory.
        journal: of the run.
        say: takes lines for the user.

    Raises:
        StudyError: the cap does not pay for the configurations that an arm is to confirm.
    """
    if resolved.study.tune.device_seconds_per_arm is None:
        return {arm.name: arm.trials for arm in arms}
    found = {arm.name: journal.afforded(arm.name, arm.trials) for arm in arms}
    open_arms = [arm for arm in arms if found[arm.name] is None]
    times = _step_seconds(resolved, data, searched, open_arms, run, say) if open_arms else {}
    for arm in open_arms:
        spared = sentinels[arm.workload.name]
        decided = journal.afforded_before(arm.name, arm.trials)
        found[arm.name] = _afforded(resolved, arm, times[arm.name], spared, decided)
    for arm in open_arms:  # when every arm is known to have enough
        count = found[arm.name]
        assert count is not None
        journal.afford(arm.name, arm.trials, count)
        if count < arm.trials:
            cap = cap_of(arm, resolved.study.tune)
            kept = sum(index < count for index in sentinels[arm.workload.name])
            pays = f"pay for {count} of {arm.trials} configurations, {kept} of them sentinels"
            say(f"{arm.name}: {cap:.0f} device-seconds {pays}")
    return {name: count for name, count in found.items() if count is not None}


def _afforded(
    resolved: ResolvedStudy,
    arm: ArmPlan,
    step_s: Sequence[float],
    sentinels: Collection[int],
    decided: Collection[int],
) -> int:
    tune, fewest = resolved.study.tune, resolved.study.confirm.top_k
    cap = cap_of(arm, tune)
    assert cap is not None
    count = affordable(arm, tune.asha, step_s, sentinels, fewest, cap, decided)
    needed = min(fewest, arm.trials)
    if count < needed:
        least = most_device_s(arm, tune.asha, step_s[:needed], sentinels, fewest)
        allowed = f"{least:.0f} or more, which {needed} configurations of {arm.name} may cost (confirm.top_k)"
        found = InWords(f"{cap:g} for {arm.name}")
        raise StudyError(resolved.file, "tune.device_seconds_per_arm", found, allowed)
    return count


def _step_seconds(
    resolved: ResolvedStudy,
    data: Mapping[str, PreparedData],
    searched: Searched,
    arms: Sequence[ArmPlan],
    run: Path,
    say: Callable[[str], None],
) -> dict[str, list[float]]:
    """Seconds of a step of every configuration, by arm name."""
    table = read_calibration(run, resolved.hash)
    if table is None or any(None in _of_arm(table, arm, searched) for arm in arms):
        from tunebench.engine.solo import SoloPlan, solo_steps  # imports torch and NequIP

        say("measuring steps for the cap on device-seconds")
        table = solo_steps(resolved, data, searched, SoloPlan(cache=graphs_folder()), say)
        write_calibration(run, table)
    return {arm.name: _known(resolved, arm, _of_arm(table, arm, searched)) for arm in arms}


def _of_arm(table: Calibration, arm: ArmPlan, searched: Searched) -> list[float | None]:
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
