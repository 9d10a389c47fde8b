"""What a study file says that no single key can show: parts that contradict each other or promise nothing.

Every check yields the problems it finds and reads no data.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from tunebench.study.initial import ADOPTED
from tunebench.study.problems import Problem, one_of
from tunebench.study.search_space import SearchSpace
from tunebench.study.spec import (
    WATER_BOX,
    Asha,
    AshaForm,
    AshaOrder,
    ExtxyzData,
    InWords,
    Model,
    NequipData,
    Sampler,
    Schedule,
    ScheduleKind,
    Study,
    Tune,
    Workload,
    XtbData,
    XtbMixtureData,
)
from tunebench.workloads.model_arguments import why_left_out
from tunebench.workloads.presets import PRESETS
from tunebench.workloads.xtb_checks import mixture_problems, xtb_problems


def study_problems(study: Study) -> Iterator[Problem]:
    """Every contradiction inside a study file, in the order of its keys."""
    yield from _repeated_names(study)
    for index, workload in enumerate(study.workloads):
        yield from _workload_problems(workload, f"workloads[{index}]")
    yield from _schedule_problems(study.schedule, "schedule")
    for index, arm in enumerate(study.optimizers):
        if arm.untuned and arm.budget > 1:
            yield Problem(f"optimizers[{index}].budget", arm.budget, "left out: an untuned arm has one configuration")
        if arm.schedule is not None:
            yield from _schedule_problems(arm.schedule, f"optimizers[{index}].schedule")
    yield from _objective_problems(study)
    yield from _stage_problems(study)
    yield from _property_problems(study)
    gpus = study.resources.gpus_per_trial
    if gpus > 1.0:
        yield Problem("resources.gpus_per_trial", gpus, "0 to 1: a trial trains on one GPU or on a part of one")


def _property_problems(study: Study) -> Iterator[Problem]:
    if study.properties and study.keep_checkpoints == "none":
        yield Problem("keep_checkpoints", study.keep_checkpoints, "confirm or all, because properties need the models")
    names = [workload.name for workload in study.workloads]
    taken: set[tuple[str, str]] = set()
    for index, section in enumerate(study.properties):
        for name in section.workloads:
            if name not in names:
                yield Problem(f"properties[{index}].workloads", name, one_of(names, name))
        own = {(workload, entry) for workload in section.workloads or names for entry in section.properties}
        for workload, entry in sorted(own & taken):
            yield Problem(f"properties[{index}].properties", entry, f"each name once for workload {workload}")
        taken |= own


def space_problems(study: Study, spaces: Mapping[str, SearchSpace]) -> Iterator[Problem]:
    """What optimizers and their fixed hyperparameters promise that their search spaces do not hold."""
    for index, arm in enumerate(study.optimizers):
        space = spaces[arm.name]
        if not space.available:
            yield Problem(f"optimizers[{index}].name", arm.name, f"an available optimizer; {arm.name}: {space.reason}")
        yield from space.fixing_problems(arm.fixed, f"optimizers[{index}].fixed")
    eps = {index: arm.fixed["eps"] for index, arm in enumerate(study.optimizers) if "eps" in arm.fixed}
    if eps and (len(eps) < len(study.optimizers) or len({str(value) for value in eps.values()}) > 1):
        index, value = next(iter(eps.items()))
        yield Problem(f"optimizers[{index}].fixed.eps", value, "one value for all optimizers: it decides the ranking")


def _repeated_names(study: Study) -> Iterator[Problem]:
    for section, names in (
        ("workloads", [workload.name for workload in study.workloads]),
        ("optimizers", [arm.name for arm in study.optimizers]),
    ):
        for name, count in Counter(names).items():
            if count > 1:
                last = len(names) - 1 - names[::-1].index(name)
                yield Problem(f"{section}[{last}].name", name, "each name once")


def _workload_problems(workload: Workload, key: str) -> Iterator[Problem]:
    if isinstance(workload.data, XtbData):
        for problem in xtb_problems(workload.data):
            yield Problem(f"{key}.data.{problem.key}", problem.found, problem.allowed)
    if isinstance(workload.data, XtbMixtureData):
        for problem in mixture_problems(workload.data):
            yield Problem(f"{key}.data.{problem.key}", problem.found, problem.allowed)
    if isinstance(workload.data, ExtxyzData):
        yield from _extxyz_problems(workload.data, f"{key}.data")
    if isinstance(workload.data, NequipData):
        yield from _nequip_problems(workload.data, f"{key}.data")
    if workload.init is None and workload.model.preset == ADOPTED:
        yield Problem(f"{key}.model.preset", ADOPTED, "another preset, or an `init` whose file says all of the model")
    yield from _model_problems(workload.model, f"{key}.model")
    yield from _loss_problems(workload, key)
    yield from _size_problems(workload, key)


def _extxyz_problems(data: ExtxyzData, key: str) -> Iterator[Problem]:
    if data.ood and data.frames.ood == 0:
        yield Problem(f"{key}.frames.ood", 0, "1 or more frames, because ood files are given")
    if not data.ood and data.frames.ood > 0:
        yield Problem(f"{key}.ood", InWords("nothing"), "files by name, because frames.ood is above 0")


def _nequip_problems(data: NequipData, key: str) -> Iterator[Problem]:
    target = data.datamodule.get("_target_", InWords("nothing"))
    if not isinstance(target, str) or isinstance(target, InWords):
        yield Problem(f"{key}.datamodule._target_", target, "a DataModule's import path")
    yield from _not_finite(data.datamodule, f"{key}.datamodule")
    if len(set(data.ood)) < len(data.ood):
        yield Problem(f"{key}.ood", list(data.ood), "each name once")


def _model_problems(model: Model, key: str) -> Iterator[Problem]:
    presets = PRESETS[model.family]
    if model.preset not in presets and model.preset != ADOPTED:
        yield Problem(f"{key}.preset", model.preset, f"for {model.family}: {one_of(presets, model.preset)}")
    for name in model.arguments:
        if reason := why_left_out(name):
            yield Problem(f"{key}.arguments.{name}", model.arguments[name], f"left out: {reason}")
    yield from _not_finite(model.arguments, f"{key}.arguments")


def _not_finite(value: object, key: str) -> Iterator[Problem]:
    """Infinities and NaN in free mappings, which JSON and therefore the study's hash cannot hold."""
    if isinstance(value, float) and not math.isfinite(value):
        yield Problem(key, value, "a finite number")
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _not_finite(part, f"{key}.{name}")
    if isinstance(value, list):
        for index, part in enumerate(value):
            yield from _not_finite(part, f"{key}[{index}]")


def _loss_problems(workload: Workload, key: str) -> Iterator[Problem]:
    loss = workload.loss
    if loss.energy_per_atom + loss.forces + loss.stress == 0.0:
        yield Problem(f"{key}.loss", InWords("weights that are all 0"), "at least one weight above 0")
    elif workload.labels.force_fraction == 0.0 and loss.energy_per_atom + loss.stress == 0.0:
        yield Problem(f"{key}.labels.force_fraction", 0.0, "above 0, because the loss holds forces only")
    if loss.stress > 0.0 and _without_stress(workload):
        yield Problem(f"{key}.loss.stress", loss.stress, "0: a molecule is not periodic and has no stress")


def _without_stress(workload: Workload) -> bool:
    data = workload.data
    return isinstance(data, XtbMixtureData) or (isinstance(data, XtbData) and data.system != WATER_BOX)


def _size_problems(workload: Workload, key: str) -> Iterator[Problem]:
    if not isinstance(workload.data, NequipData) and workload.batch_size > workload.data.frames.train:
        train = workload.data.frames.train
        yield Problem(f"{key}.batch_size", workload.batch_size, f"at most data.frames.train = {train}")
    every = workload.evaluate_every_steps
    if every is not None and every > workload.max_steps:
        yield Problem(f"{key}.evaluate_every_steps", every, f"at most max_steps = {workload.max_steps}")


def _schedule_problems(schedule: Schedule, key: str) -> Iterator[Problem]:
    """A setting that its kind does not read would be ignored without a word."""
    if schedule.kind is ScheduleKind.CONSTANT and schedule.final_factor != Schedule().final_factor:
        yield Problem(f"{key}.final_factor", schedule.final_factor, "left out: a constant schedule does not decay")
    if schedule.kind is not ScheduleKind.WARMUP_STABLE_DECAY:
        if schedule.decay_fraction != Schedule().decay_fraction:
            allowed = f"left out unless kind is {ScheduleKind.WARMUP_STABLE_DECAY}"
            yield Problem(f"{key}.decay_fraction", schedule.decay_fraction, allowed)
    elif schedule.warmup_fraction + schedule.decay_fraction > 1.0:
        rest = 1.0 - schedule.warmup_fraction
        yield Problem(f"{key}.decay_fraction", schedule.decay_fraction, f"at most 1 - warmup_fraction = {rest:g}")


def _objective_problems(study: Study) -> Iterator[Problem]:
    objective = study.objective
    if objective.energy_per_atom + objective.forces + objective.stress == 0.0:
        yield Problem("objective", InWords("weights that are all 0"), "at least one weight above 0")
    molecules = [workload.name for workload in study.workloads if _without_stress(workload)]
    if objective.stress > 0.0 and molecules:
        yield Problem(
            "objective.stress", objective.stress, f"0: workload {molecules[0]} is a molecule and has no stress"
        )


def _stage_problems(study: Study) -> Iterator[Problem]:
    grace = study.tune.asha.grace_steps if study.tune.asha else None
    shortest = min(study.workloads, key=lambda workload: workload.max_steps)
    if grace is not None and grace > shortest.max_steps:
        allowed = f"at most max_steps = {shortest.max_steps} of workload {shortest.name}"
        yield Problem("tune.asha.grace_steps", grace, allowed)
    if study.tune.asha:
        yield from _asha_problems(study.tune.asha, study.tune.trials_per_arm)
    if study.tune.device_seconds_per_arm is not None:
        yield from _cap_problems(study.tune)
    if study.confirm.top_k > study.tune.trials_per_arm:
        allowed = f"at most tune.trials_per_arm = {study.tune.trials_per_arm}"
        yield Problem("confirm.top_k", study.confirm.top_k, allowed)


def _cap_problems(tune: Tune) -> Iterator[Problem]:
    """A cap is kept by what is known before the first step."""
    if tune.sampler is Sampler.TPE:
        yield Problem("tune.device_seconds_per_arm", tune.device_seconds_per_arm, "left out with sampler: tpe")
    asha = tune.asha
    if asha and (asha.form, asha.order) != (AshaForm.PROMOTION, AshaOrder.DETERMINISTIC):
        allowed = "left out, or tune.asha with form: promotion, order: deterministic, whose cost is known beforehand"
        yield Problem("tune.device_seconds_per_arm", tune.device_seconds_per_arm, allowed)


def _asha_problems(asha: Asha, trials: int) -> Iterator[Problem]:
    if asha.form is AshaForm.STOPPING and asha.order is AshaOrder.DETERMINISTIC:
        allowed = "asynchronous with form: stopping, which judges a trial when it arrives"
        yield Problem("tune.asha.order", asha.order.value, allowed)
    if asha.sentinels != "auto" and asha.sentinels > trials:
        yield Problem("tune.asha.sentinels", asha.sentinels, f"at most tune.trials_per_arm = {trials}")
