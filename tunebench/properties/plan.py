"""A property plan: which properties, of which structures, against which reference; a YAML file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import Field

from tunebench.properties.registry import AnySettings, check_installed, property_of
from tunebench.properties.stated import StatedFile, stated_values
from tunebench.properties.structures import atoms_of
from tunebench.study.paths import NoSuchFileError, existing_file
from tunebench.study.problems import Problem, one_of, parse, raise_problems
from tunebench.study.schema import schema_of
from tunebench.study.spec import InWords, Name, PositiveInt, Section
from tunebench.study.strict_yaml import read_yaml
from tunebench.workloads.errors import WorkloadError


class ForcesReference(Section):
    """A data set's own forces on displaced supercells, for an entry of the kind `phonons`."""

    path: str = Field(description="file that ASE reads, plain or compressed; ${VARIABLE} comes from the environment")
    displaced_atoms: PositiveInt | None = Field(
        default=None, description="take frames with so many displaced atoms only; 1 for a set of finite displacements"
    )


class Reference(Section):
    """What errors are measured against: for each entry what is stated, else its forces, else the calculator."""

    calculator: str | None = Field(
        default=None, description="emt, gfn2-xtb, or a model's path, run through the same code"
    )
    forces: dict[Name, ForcesReference] = Field(default_factory=dict, description="files of forces by entry")
    values: dict[Name, dict[str, float]] = Field(
        default_factory=dict, description="stated values by entry and quantity, in the quantity's own unit"
    )
    files: dict[Name, StatedFile] = Field(default_factory=dict, description="files that state values, by entry")


class PropertyPlan(Section):
    """Entries by name, each a property with its settings, and a reference."""

    properties: dict[Name, AnySettings] = Field(min_length=1, description="properties by a name of the user's")
    reference: Reference = Field(default_factory=Reference, description="what errors are measured against")


def load_plan(file: Path) -> PropertyPlan:
    """Read a plan, and find every structure and file it names; relative paths start at its folder.

    Raises:
        RunError: matcalc or phonopy is not installed.
        StudyError: what is wrong, in one line with the file, the key, what was found and what is allowed.
    """
    check_installed()
    plan = parse(PropertyPlan, read_yaml(file), file)
    raise_problems(file, plan_problems(plan, file.parent))
    return plan


def plan_problems(plan: PropertyPlan, base: Path) -> list[Problem]:
    """What a plan names and cannot be had: structures, files, entries and quantities.

    Raises:
        ModuleNotFoundError: phonopy is not installed, without which the quantities of phonons are not known.
    """
    return [*_structures(plan, base), *_references(plan, base)]


def plan_schema() -> dict[str, Any]:
    """JSON-Schema (draft 2020-12) of a plan."""
    return schema_of(PropertyPlan, "tunebench property plan")


def settings_hash(settings: AnySettings, base: Path | None = None) -> str:
    """Hexadecimal sha256 of settings and of the structure they name, wherever it lies."""
    atoms = atoms_of(settings.structure, base)
    described = {
        **settings.model_dump(mode="json", exclude={"structure"}),
        "numbers": atoms.numbers.tolist(),
        "positions": atoms.positions.tolist(),
        "cell": atoms.cell.array.tolist(),
        "pbc": atoms.pbc.tolist(),
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode("ascii")).hexdigest()


def _structures(plan: PropertyPlan, base: Path) -> list[Problem]:
    problems = []
    for name, settings in plan.properties.items():
        try:
            atoms_of(settings.structure, base)
        except WorkloadError as error:
            problems.append(Problem(f"properties.{name}.{error.key}", error.found, error.allowed))
    return problems


def _references(plan: PropertyPlan, base: Path) -> list[Problem]:
    reference, entries = plan.reference, plan.properties
    problems = [
        Problem(f"reference.{part}", name, one_of(entries, name))
        for part, named in (("forces", reference.forces), ("values", reference.values), ("files", reference.files))
        for name in named
        if name not in entries
    ]
    for name in entries.keys() & reference.forces.keys():
        key = f"reference.forces.{name}"
        if entries[name].property != "phonons":
            problems.append(Problem(key, InWords(f"an entry of {entries[name].property}"), "an entry of phonons"))
        try:
            existing_file(reference.forces[name].path, base)
        except NoSuchFileError as error:
            problems.append(Problem(f"{key}.path", reference.forces[name].path, str(error)))
    if problems:
        return problems
    for name, file in reference.files.items():
        try:
            stated_values(file, property_of(entries[name]).units(entries[name], base), base)
        except WorkloadError as error:
            problems.append(Problem(f"reference.files.{name}.{error.key}", error.found, error.allowed))
    for name, values in reference.values.items():
        known = property_of(entries[name]).units(entries[name], base)
        problems += [
            Problem(f"reference.values.{name}", quantity, one_of(known, quantity))
            for quantity in values
            if quantity not in known
        ]
    return problems
