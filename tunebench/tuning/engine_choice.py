"""Which engine trains a workload: the cohort where its model can be traced, else the lightning engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tunebench.study.plan import plan_arms
from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import Engine, InWords, StudyError
from tunebench.workloads.data import PreparedData


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """The engine of one workload.

    Attributes:
        engine: COHORT or LIGHTNING.
        slots: trials that a cohort trains at once, where the study says so.
        reason: why it is not the cohort although that was wished for, in one line; else empty.
    """

    workload: str
    engine: Engine
    slots: int | None = None
    reason: str = ""

    def to_plain(self) -> dict[str, Any]:
        """Engine, slots (a number, `auto` or None) and reason."""
        slots = (self.slots or "auto") if self.engine is Engine.COHORT else None
        return {"engine": self.engine.value, "slots": slots, "reason": self.reason}

    def warning(self) -> str:
        """The line that says why the cohort does not train the workload; empty where it does or was not wished for."""
        return f"{self.workload}: {self.engine} engine, because {self.reason}" if self.reason else ""


def choose_engines(
    resolved: ResolvedStudy, data: Mapping[str, PreparedData], workloads: Iterable[str] | None = None
) -> dict[str, EngineChoice]:
    """The engine of each workload by its name; traces its model on the CPU unless the study asks for `lightning`.

    Args:
        resolved: the study.
        data: prepared data by workload.
        workloads: names of those to look at; left out, all.

    Raises:
        StudyError: the study asks for the cohort and a model cannot be traced.
    """
    study = resolved.study
    names = [workload.name for workload in study.workloads]
    chosen = [name for name in names if workloads is None or name in set(workloads)]
    if study.engine is Engine.LIGHTNING:
        return {name: EngineChoice(workload=name, engine=Engine.LIGHTNING) for name in chosen}
    return {name: _choose(resolved, data[name], name) for name in chosen}


def _choose(resolved: ResolvedStudy, data: PreparedData, workload: str) -> EngineChoice:
    from tunebench.engine.calibration import untuned_task  # imports torch and NequIP
    from tunebench.tuning.traceability import why_untraceable

    resources = resolved.study.resources
    arm = next(arm for arm in plan_arms(resolved) if arm.workload.name == workload)
    task = untuned_task(resolved, arm, data)
    reason = why_untraceable(replace(task, device="cpu"))
    if not reason:
        bounds = [bound for bound in (resources.slots, resources.concurrent_trials) if isinstance(bound, int)]
        slots = min(bounds) if isinstance(resources.slots, int) else None
        return EngineChoice(workload=workload, engine=Engine.COHORT, slots=slots)
    if resolved.study.engine is Engine.COHORT:
        found = InWords(f"cohort, but the model of workload {workload} cannot be traced: {reason}")
        raise StudyError(resolved.file, "engine", found, "auto or lightning")
    return EngineChoice(workload=workload, engine=Engine.LIGHTNING, reason=f"its model cannot be traced: {reason}")
