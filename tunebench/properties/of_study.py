"""The properties of a study: its sections as property plans, complete and checked, and what they will compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunebench.properties.plan import PropertyPlan, plan_problems
from tunebench.properties.registry import missing_libraries
from tunebench.study.paths import NoSuchFileError, existing_file
from tunebench.study.problems import Problem, parse, raise_problems
from tunebench.study.spec import ModelProperties, Study, StudyError


def plan_of(section: ModelProperties, file: Path | None = None, key: str = "properties") -> PropertyPlan:
    """The property plan of a section.

    Args:
        section: of a study.
        file: the study, for messages.
        key: of the section in the file, likewise.

    Raises:
        StudyError: settings or a reference that no plan has, in one line.
    """
    written = {"properties": section.properties, "reference": section.reference}
    try:
        return parse(PropertyPlan, written, file or Path("study"))
    except StudyError as error:
        raise StudyError(error.file, f"{key}.{error.key}", error.found, error.allowed, error.more) from error


def with_properties(study: Study, file: Path) -> Study:
    """The study with every default of its properties written out and absolute paths, so that its hash covers them.

    Raises:
        StudyError: a section that is no property plan, or names what cannot be had.
    """
    folder, sections = file.resolve().parent, []
    problems: list[Problem] = []
    for index, section in enumerate(study.properties):
        key = f"properties[{index}]"
        plan = plan_of(section, file, key)
        if not missing_libraries():  # else `tunebench plan` says so, and `tunebench run` refuses
            problems += [Problem(f"{key}.{p.key}", p.found, p.allowed) for p in plan_problems(plan, folder)]
        content = _anchored(plan.model_dump(mode="json"), folder)
        sections.append(section.model_copy(update=content))
    raise_problems(file, problems)
    return study.model_copy(update={"properties": tuple(sections)})


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one section computes of the models of one workload.

    Attributes:
        section: its place in the study.
        plan: entries and reference.
        time_limit_s: seconds that one entry of one model may take; None for as long as it takes.
    """

    section: int
    plan: PropertyPlan
    time_limit_s: float | None = None


def measurements(study: Study, workload: str) -> tuple[Measurement, ...]:
    """What is computed of the models of a workload, section by section."""
    return tuple(
        Measurement(section=index, plan=plan_of(section), time_limit_s=section.time_limit_s)
        for index, section in enumerate(study.properties)
        if not section.workloads or workload in section.workloads
    )


def _anchored(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A dumped plan with absolute paths; a path that leads nowhere stays as it is written."""
    for entry in plan["properties"].values():
        _anchor(entry["structure"], "path", folder)
    reference = plan["reference"]
    for named in (*reference["forces"].values(), *reference["files"].values()):
        _anchor(named, "path", folder)
    _anchor(reference, "calculator", folder)
    return plan


def _anchor(part: dict[str, Any], name: str, folder: Path) -> None:
    text = part.get(name)
    if isinstance(text, str):
        try:
            part[name] = str(existing_file(text, folder))
        except NoSuchFileError:
            return  # a teacher's name, or what `plan_problems` has told


def property_needs(study: Study, arms: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the properties will take, a mapping for each section with a line of text: for `tunebench plan`.

    Args:
        study: the study.
        arms: rows of the plan's summary, ``arm`` and ``confirm_trials``.
    """
    trials = [(str(arm["arm"]).partition("/")[0], int(arm["confirm_trials"])) for arm in arms]
    missing, found = missing_libraries(), []
    for section in study.properties:
        workloads = section.workloads or tuple(workload.name for workload in study.workloads)
        models = sum(count for workload, count in trials if workload in workloads)
        found.append(
            {
                "regime": section.regime.value,
                "workloads": list(workloads),
                "entries": list(section.properties),
                "models": models,
                "refined_models": models if study.confirm.refine else 0,
                "reference": _reference_words(plan_of(section)),
                "missing": missing,
                "text": _need_text(study, section, models, missing),
            }
        )
    return found


def _need_text(study: Study, section: ModelProperties, models: int, missing: Sequence[str]) -> str:
    refined = ", and as many refined ones," if study.confirm.refine else ""
    gpus = f" and {section.gpus_per_model:g} of a GPU" if section.gpus_per_model else ""
    installed = f"NOT installed: {', '.join(missing)}" if missing else "all libraries installed"
    return (
        f"{section.regime}, {', '.join(section.properties)} of up to {models} models{refined} with "
        f"{section.cpus_per_model:g} CPU cores{gpus} each; reference: {_reference_words(plan_of(section))}; {installed}"
    )


def _reference_words(plan: PropertyPlan) -> str:
    reference: Mapping[str, Any] = plan.reference.model_dump()
    named = [f"{part} of {', '.join(reference[part])}" for part in ("values", "files", "forces") if reference[part]]
    if plan.reference.calculator:
        named.append(f"calculator {Path(plan.reference.calculator).name}")
    return "; ".join(named) or "none"
