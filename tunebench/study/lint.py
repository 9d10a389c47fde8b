"""The rules F1 to F19 of a fair comparison, as far as a study file can break them before anything has run.

Each rule is a small function that looks at the resolved study and says pass, warn or fail, with the reason and the
mend. A study that fails a rule does not run unless it names the rule under `waive` with a reason. F5, F16, F18 and F19
are judged by the report, which alone knows the results.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import combinations
from pathlib import Path
from typing import Any

from tunebench.study.budget import arm_sentinels
from tunebench.study.plan import ArmPlan, plan_arms, tune_steps
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.search_space import FloatParameter, Role
from tunebench.study.sentinels import FEWEST, SMALLEST_SHARE
from tunebench.study.spec import AshaForm, AshaOrder, Fidelity, InWords, Sampler, ScheduleKind, StudyError

_CONFIRMED, _SEEDS, _LARGEST_FACTOR = 3, 5, 3  # rules F11 and F12
_SMALLEST_GRACE = 0.25  # of the horizon
_WINDOWS = 2  # of the moving average
_SAME_RANGE = 0.05  # decades by which learning-rate ranges may differ


class Verdict(StrEnum):
    """What a rule says of a study."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one rule found.

    Attributes:
        rule: ``F1`` to ``F19``.
        reason: what was found.
        mend: what would make it pass; empty where it does.
        waived: the study's reason to go on all the same; empty where there is none.
    """

    rule: str
    verdict: Verdict
    reason: str
    mend: str = ""
    waived: str = ""

    @property
    def blocks(self) -> bool:
        """Whether the study may not run."""
        return self.verdict is Verdict.FAIL and not self.waived

    def to_plain(self) -> dict[str, Any]:
        """Strings only."""
        return {**asdict(self), "verdict": self.verdict.value}


_Judged = tuple[Verdict, str, str]
_PASS, _WARN, _FAIL = Verdict.PASS, Verdict.WARN, Verdict.FAIL


def lint(resolved: ResolvedStudy) -> list[Finding]:
    """Every rule that can be judged beforehand, in the order of their numbers."""
    waived = resolved.study.waive
    arms = plan_arms(resolved)
    found = []
    for rule, judge in _RULES.items():
        verdict, reason, mend = judge(resolved, arms)
        waiver = waived.get(rule, "") if verdict is Verdict.FAIL else ""
        found.append(Finding(rule=rule, verdict=verdict, reason=reason, mend=mend, waived=waiver))
    return found


def refuse_unfair(resolved: ResolvedStudy) -> None:
    """Let a study pass whose broken rules are waived.

    Raises:
        StudyError: the first rule that it breaks without a waiver.
    """
    blocking = [finding for finding in lint(resolved) if finding.blocks]
    if blocking:
        first = blocking[0]
        allowed = f"{first.mend}, or a reason under waive.{first.rule}"
        found = InWords(f"rule {first.rule} broken: {first.reason}")
        raise StudyError(resolved.file, f"waive.{first.rule}", found, allowed, more=len(blocking) - 1)


def _one_ladder_per_arm(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    return _PASS, f"{len(arms)} arms, each with its own sampler and its own rungs", ""


def _equal_budget(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    trials = resolved.study.tune.trials_per_arm
    larger = [arm.name for arm in resolved.study.optimizers if arm.budget > 1]
    audits = f"; {', '.join(larger)} searches more, as an audit, and its rank does not count" if larger else ""
    audits += _dearer_fidelity(resolved, arms)
    cap = resolved.study.tune.device_seconds_per_arm
    if cap is None:
        reason = f"{trials} configurations for every arm that competes, at whatever their steps cost{audits}"
        return _WARN, reason, "tune.device_seconds_per_arm"
    return _PASS, f"{trials} configurations and {cap:g} device-seconds for every arm that competes{audits}", ""


def _dearer_fidelity(resolved: ResolvedStudy, arms: list[ArmPlan]) -> str:
    """What arms with complete short schedules cost beside those with truncated ones, where a study has both."""
    tune, fewest = resolved.study.tune, resolved.study.confirm.top_k
    horizons = {
        arm.fidelity: tune_steps(tune, arm.rungs, arm.workload.max_steps, fewest, arm.fidelity) / arm.workload.max_steps
        for arm in arms
    }
    if len(horizons) < 2:
        return ""
    names = dict.fromkeys(arm.optimizer for arm in arms if arm.fidelity is Fidelity.RESCALE)
    ratio = horizons[Fidelity.RESCALE] / horizons[Fidelity.TRUNCATE]
    return f"; complete short schedules cost {', '.join(names)} {ratio:.1f} times the steps of the other arms"


def _baselines(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    entries = resolved.study.optimizers
    missing = [] if any(arm.untuned for arm in entries) else ["an untuned arm"]
    missing += [] if any(arm.budget > 1 for arm in entries) else ["an audit of the baseline with twice the budget"]
    if not missing:
        return _PASS, "an untuned arm tells what tuning is worth, an audit whether it sufficed", ""
    mend = "optimizers: {name: adamw-untuned, optimizer: adamw, untuned: true}, and one with budget: 2"
    return _WARN, f"without {' and '.join(missing)} nobody knows whether the budget sufficed", mend


def _search_spaces(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    mend = "a range of the learning rate in every arm's search space, as many decades in each"
    decades = {}
    tuned = [arm.name for arm in resolved.study.optimizers if not arm.untuned]
    for name in tuned:
        space = resolved.spaces[name]
        rates = [p for p in space.parameters.values() if p.role is Role.LEARNING_RATE and isinstance(p, FloatParameter)]
        if not rates:
            return _FAIL, f"{name} does not search its learning rate", mend
        decades[name] = math.log10(rates[0].high / max(rates[0].low, 1e-300))
    if not decades:
        return _FAIL, "every arm is untuned", mend
    narrow, wide = min(decades, key=lambda n: decades[n]), max(decades, key=lambda n: decades[n])
    if decades[wide] - decades[narrow] > _SAME_RANGE:
        reason = f"{narrow} searches {decades[narrow]:.2g} decades of the learning rate, {wide} {decades[wide]:.2g}"
        return _FAIL, reason, mend
    return _PASS, f"every arm searches {decades[wide]:.2g} decades of the learning rate", ""


def _sampling(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    if resolved.study.tune.sampler is Sampler.SOBOL:
        return _PASS, "one scrambled Sobol sequence, shared by the arms of a workload", ""
    return _WARN, "tpe adapts to results: the study explores and is never ranked", "tune.sampler: sobol"


def _cost_trading(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    names = {
        f"{space.name}.{name}"
        for space in resolved.spaces.values()
        for name, parameter in space.parameters.items()
        if parameter.role is Role.COST
    }
    if not names:
        return _PASS, "no arm searches a setting that trades device time for progress per step", ""
    reason = f"{', '.join(sorted(names))} is searched by error at a step, where dearer steps always look better"
    return _WARN, reason, "read the time axis (tunebench calibrate), or give it under fixed"


def _schedules(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    schedules = [resolved.schedules[arm.name] for arm in resolved.study.optimizers]
    if len(schedules) > 1 and not any(one == other for one, other in combinations(schedules, 2)):
        reason = "no two optimizers share a schedule, so schedules and optimizers cannot be told apart"
        return _WARN, reason, "another optimizer with the schedule of one that takes part"
    return _PASS, "schedules end at the fixed horizon", ""


def _readouts(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    return _PASS, f"every arm is read out alike: {resolved.study.objective.readout}", ""


def _alike(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    resources = resolved.study.resources
    if 0.0 < resources.gpus_per_trial < 1.0:
        reason = f"{1.0 / resources.gpus_per_trial:.0f} trials share a GPU: their seconds say nothing of an optimizer"
        return _WARN, reason, "read the time axis after tunebench calibrate, or gpus_per_trial: 1"
    starts = [
        f"{workload.name} starts from {Path(workload.init.path).name} ({str(workload.init.sha256)[:12]})"
        for workload in resolved.study.workloads
        if workload.init is not None
    ]
    reason = "data, batch, precision, clipping, initial weights and data order are alike in every arm"
    return _PASS, "; ".join([reason, *starts]), ""


def _echo(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    return _PASS, "every arm is built before the start and held against what its search space promises", ""


def _confirmation(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    confirm = resolved.study.confirm
    reason = f"{confirm.top_k} configurations of each arm are confirmed with {confirm.seeds} fresh seeds each"
    if confirm.top_k < _CONFIRMED or confirm.seeds < _SEEDS:
        return _FAIL, reason, f"confirm.top_k of at least {_CONFIRMED} and confirm.seeds of at least {_SEEDS}"
    return _PASS, reason, ""


def _fidelity(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    asha = resolved.study.tune.asha
    if asha is None:
        return _PASS, "every trial runs to the horizon", ""
    if asha.reduction_factor > _LARGEST_FACTOR:
        return _FAIL, f"reduction_factor {asha.reduction_factor}", f"reduction_factor of at most {_LARGEST_FACTOR}"
    cut = [arm for arm in arms if arm.rungs and arm.fidelity is Fidelity.TRUNCATE]
    for arm in cut:
        smallest, why = smallest_grace(arm)
        if arm.rungs[0] < smallest:
            reason = f"{arm.name} is compared at step {arm.rungs[0]}, before {why} (step {smallest})"
            return _FAIL, reason, f"tune.asha.grace_steps of at least {smallest}, or left out"
    decaying = sorted({arm.optimizer for arm in cut if arm.schedule.kind is not ScheduleKind.CONSTANT})
    if decaying:
        reason = f"{', '.join(decaying)} are compared in the middle of a schedule that decays until the horizon"
        return _WARN, reason, "tune.asha.fidelity: rescale, or more sentinels, which tell what it costs"
    return _PASS, _compared(arms), ""


def _compared(arms: list[ArmPlan]) -> str:
    """What rungs compare, by fidelity."""
    words = {
        Fidelity.TRUNCATE: "no trial is compared before warm-up, two averaging windows and a quarter of the horizon",
        Fidelity.RESCALE: "trials are compared at the ends of complete schedules",
    }
    kinds = {kind: sorted({arm.optimizer for arm in arms if arm.fidelity is kind}) for kind in words}
    told = {kind: names for kind, names in kinds.items() if names}
    if len(told) == 1:
        return words[next(iter(told))]
    return "; ".join(f"{', '.join(names)}: {words[kind]}" for kind, names in told.items())


def smallest_grace(arm: ArmPlan) -> tuple[int, str]:
    """The first step at which trials of an arm may be compared, and what has passed by then (rule F12).

    The window of the moving average at step n is ``1 / (1 - min(decay, (1 + n) / (10 + n)))`` steps, for NequIP's
    average warms up.
    """
    horizon, decay = arm.workload.max_steps, arm.workload.ema_decay

    def windows_passed(step: int) -> bool:
        return step >= _WINDOWS / (1.0 - min(decay, (1.0 + step) / (10.0 + step)))

    ends = {
        "a quarter of the horizon": math.floor(_SMALLEST_GRACE * horizon),
        "the end of its warm-up": round(arm.schedule.warmup_fraction * horizon),
        "two windows of the moving average": next((n for n in range(1, horizon + 1) if windows_passed(n)), horizon),
    }
    why = max(ends, key=lambda name: ends[name])
    return max(ends[why], 1), why


def _sentinels(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    tune = resolved.study.tune
    if tune.asha is None or not any(arm.rungs for arm in arms):
        return _PASS, "nothing is stopped", ""
    count = len(arm_sentinels(resolved, max(arms, key=lambda arm: arm.trials)))  # an audit has no more than the others
    wanted = math.ceil(SMALLEST_SHARE * tune.trials_per_arm)
    if count < max(wanted, FEWEST):
        reason = f"{count} sentinels of {tune.trials_per_arm} trials: how often ASHA errs stays unknown"
        return _WARN, reason, f"tune.asha.sentinels: auto, with {FEWEST} trials per arm or more"
    if count == tune.trials_per_arm:
        return _WARN, f"all {count} trials of an arm are sentinels: nothing is stopped", "more trials_per_arm"
    capped = "; an arm that its cap cuts short has as many" if tune.device_seconds_per_arm else ""
    return _PASS, f"{count} of {tune.trials_per_arm} trials of every arm are never stopped{capped}", ""


def _order(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    asha = resolved.study.tune.asha
    if asha is None or (asha.form is AshaForm.PROMOTION and asha.order is AshaOrder.DETERMINISTIC):
        return _PASS, "decisions depend on results alone and are kept in the journal", ""
    reason = f"{asha.form}, {asha.order}: arrival has a part in what is stopped"
    return _WARN, reason, "form: promotion, order: deterministic"


def _workloads(resolved: ResolvedStudy, arms: list[ArmPlan]) -> _Judged:
    count = len(resolved.study.workloads)
    if count == 1:
        return _WARN, "one workload: what is found holds for it alone", "a second workload"
    return _PASS, f"{count} workloads are the units of comparison, not their seeds", ""


_RULES: dict[str, Callable[[ResolvedStudy, list[ArmPlan]], _Judged]] = {
    "F1": _one_ladder_per_arm,
    "F2": _equal_budget,
    "F3": _search_spaces,
    "F4": _sampling,
    "F6": _cost_trading,
    "F7": _schedules,
    "F8": _readouts,
    "F9": _alike,
    "F10": _echo,
    "F11": _confirmation,
    "F12": _fidelity,
    "F13": _sentinels,
    "F14": _order,
    "F15": _workloads,
    "F17": _baselines,
}
