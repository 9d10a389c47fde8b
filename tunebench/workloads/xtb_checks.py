"""Contradictions in the data section of GFN2-xTB data, found before anything is computed.

A study file is checked with it, and so is a data section that comes from elsewhere. ASE is loaded only for a molecule
that the table of everyday names does not know.
"""

from __future__ import annotations

from collections.abc import Iterator

from tunebench.study.problems import Problem, one_of
from tunebench.study.spec import WATER_BOX, InWords, XtbData, XtbMixtureData
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.molecules import MOLECULES


def xtb_problems(data: XtbData) -> Iterator[Problem]:
    """What is wrong, with keys relative to the data section, for example ``frames.ood``."""
    if data.system != WATER_BOX:
        yield from _molecule_problems(data)
    if data.ood_temperature_kelvin is not None and data.frames.ood == 0:
        yield Problem("frames.ood", 0, "1 or more frames, because ood_temperature_kelvin is given")
    if data.ood_temperature_kelvin is None and data.frames.ood > 0:
        yield Problem("ood_temperature_kelvin", InWords("nothing"), "a value, because frames.ood is above 0")
    if data.timestep_fs > data.interval_fs:
        yield Problem("interval_fs", data.interval_fs, f"at least timestep_fs = {data.timestep_fs:g}")


def mixture_problems(data: XtbMixtureData) -> Iterator[Problem]:
    """What is wrong with a mixture; keys as for `xtb_problems`."""
    for index, system in enumerate(data.systems):
        key = f"systems[{index}]"
        if system == WATER_BOX:
            yield Problem(key, system, "a molecule")
        elif system in data.systems[:index]:
            yield Problem(key, system, "each molecule once")
        elif system not in MOLECULES and system not in _g2_names():
            yield Problem(key, system, f"a name of ASE's G2 set, or one of {one_of(MOLECULES, system)}")
    for split in ("train", "val", "test"):
        if getattr(data.frames, split) < len(data.systems):
            allowed = f"at least {len(data.systems)}, one for each molecule"
            yield Problem(f"frames.{split}", getattr(data.frames, split), allowed)
    if data.frames.ood:
        yield Problem("frames.ood", data.frames.ood, "0: a mixture has no split out of distribution")
    if data.timestep_fs > data.interval_fs:
        yield Problem("interval_fs", data.interval_fs, f"at least timestep_fs = {data.timestep_fs:g}")


def check_xtb(data: XtbData | XtbMixtureData) -> None:
    """Refuse a data section that contradicts itself.

    Raises:
        WorkloadError: the first of `xtb_problems` or `mixture_problems`.
    """
    for problem in mixture_problems(data) if isinstance(data, XtbMixtureData) else xtb_problems(data):
        raise WorkloadError(f"data.{problem.key}", problem.found, problem.allowed)


def _molecule_problems(data: XtbData) -> Iterator[Problem]:
    if data.system not in MOLECULES and data.system not in _g2_names():
        allowed = one_of([WATER_BOX, *MOLECULES], data.system)
        yield Problem("system", data.system, f"a name of ASE's G2 set, or one of {allowed}")
    for name in ("molecules", "density_g_cm3"):
        if getattr(data, name) != XtbData.model_fields[name].default:
            yield Problem(name, getattr(data, name), f"left out unless system is {WATER_BOX}")


def _g2_names() -> list[str]:
    from ase.collections import g2

    return list(g2.names)
