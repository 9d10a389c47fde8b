"""Arguments of a model's builder that a study says elsewhere. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping

SET_BY_TUNEBENCH: Mapping[str, str] = {
    "seed": "tunebench sets it from the study's seed",
    "model_dtype": "say model.dtype instead",
    "r_max": "say model.r_max_angstrom instead",
    "type_names": "tunebench sets it from the data",
    "do_derivatives": "tunebench needs forces",
    "preset": "say model.preset instead",
}


def why_left_out(name: str) -> str | None:
    """Why `model.arguments` cannot hold an argument of this name, or None where it can."""
    if name.startswith("_"):
        return "tunebench names the builder itself"
    return SET_BY_TUNEBENCH.get(name)
