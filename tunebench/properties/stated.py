"""Published values as references: from a place in a JSON file, or from what a structure file says of a structure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from tunebench.study.paths import NoSuchFileError, existing_file
from tunebench.study.problems import one_of
from tunebench.study.spec import NonNegativeInt, Section
from tunebench.workloads.errors import WorkloadError


class StatedFile(Section):
    """A file that states values of an entry's quantities, in the quantities' own units."""

    path: str = Field(description="JSON, or any structure file of ASE's; ${VARIABLE} comes from the environment")
    at: str = Field(default="", description="place in a JSON file, keys with dots between them: values.Cu")
    index: NonNegativeInt = Field(default=0, description="which structure of a structure file; its info has the values")
    names: dict[str, str] = Field(default_factory=dict, description="what the file calls a quantity, where it differs")


def stated_values(stated: StatedFile, units: Mapping[str, str], base: Path | None = None) -> dict[str, float]:
    """The values that a file states of the quantities asked for.

    A list under a name holds the branches of a phonon point: ``X: [4.4, 4.4, 12.1]`` states ``X.1`` to ``X.3``, rising.

    Args:
        stated: file and place.
        units: quantities of the entry by name; whatever else the file states is left out.
        base: folder that a relative path starts from.

    Raises:
        WorkloadError: no such file or place, or none of the quantities there; its key is relative to the entry.
    """
    try:
        path = existing_file(stated.path, base or Path.cwd())
    except NoSuchFileError as error:
        raise WorkloadError("path", stated.path, str(error)) from error
    place = _in_json(path, stated.at) if path.suffix == ".json" else _in_structure(path, stated.index)
    flat = _flat(place)
    found = {name: flat[stated.names.get(name, name)] for name in units if stated.names.get(name, name) in flat}
    if not found:
        raise WorkloadError("at", f"{path} {stated.at or stated.index} with {one_of(flat)[:200]}", one_of(units))
    return found


def _in_json(path: Path, at: str) -> Mapping[str, Any]:
    try:
        place = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WorkloadError("path", f"{path} ({error})", "a JSON file") from error
    for key in at.split(".") if at else ():
        if not isinstance(place, dict) or key not in place:
            allowed = one_of(place, key) if isinstance(place, dict) else "nothing below"
            raise WorkloadError("at", at, f"a place in {path}; instead of {key}: {allowed}")
        place = place[key]
    if not isinstance(place, dict):
        raise WorkloadError("at", at, f"a mapping of quantities to numbers in {path}")
    return place


def _in_structure(path: Path, index: int) -> Mapping[str, Any]:
    from tunebench.workloads.structure_files import read_structures

    structures = read_structures(path, "path")
    if index >= len(structures):
        raise WorkloadError("index", index, f"less than {len(structures)}, the structures of {path}")
    info: Mapping[str, Any] = structures[index].info
    return info


def _flat(place: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by name, those of a list numbered from 1 as they rise."""
    found: dict[str, float] = {}
    for name, value in place.items():
        if isinstance(value, list) and all(_is_number(number) for number in value):
            found |= {f"{name}.{number}": float(x) for number, x in enumerate(sorted(value), start=1)}
        elif _is_number(value):
            found[name] = float(value)
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
