"""Structures that properties are computed of: built from a few numbers, a molecule by name, or read from a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from tunebench.study.paths import NoSuchFileError, existing_file
from tunebench.study.spec import NonNegativeInt, PositiveFloat, PositiveInt, Section
from tunebench.workloads.errors import WorkloadError
from tunebench.workloads.molecules import MOLECULES

if TYPE_CHECKING:
    from ase import Atoms


class BuiltCrystal(Section):
    """A crystal of `ase.build.bulk`, its conventional cubic cell where it has one."""

    kind: Literal["crystal"] = Field(description="built by ase.build.bulk")
    formula: str = Field(description="chemical symbol or formula, for example Cu, NaCl")
    lattice: Literal["fcc", "bcc", "sc", "hcp", "diamond", "zincblende", "rocksalt", "cesiumchloride", "fluorite"] = (
        Field(description="crystal structure")
    )
    a_angstrom: PositiveFloat = Field(description="lattice constant that relaxation starts from")
    c_angstrom: PositiveFloat | None = Field(default=None, description="second lattice constant; hcp only")


class NamedMolecule(Section):
    """A molecule of ASE's G2 collection."""

    kind: Literal["molecule"] = Field(description="a molecule by name")
    name: str = Field(description="everyday name (ethanol) or a name of the G2 collection (CH3CH2OH)")


class StructureFile(Section):
    """A structure in any file that ASE reads, plain or compressed (.xz, .gz)."""

    kind: Literal["file"] = Field(description="read from a file")
    path: str = Field(description="the file; ${VARIABLE} comes from the environment")
    index: NonNegativeInt = Field(default=0, description="which structure of the file")


Structure = Annotated[BuiltCrystal | NamedMolecule | StructureFile, Field(discriminator="kind")]
Crystal = Annotated[BuiltCrystal | StructureFile, Field(discriminator="kind")]
Molecule = Annotated[NamedMolecule | StructureFile, Field(discriminator="kind")]
Repeats = Annotated[tuple[PositiveInt, PositiveInt, PositiveInt], Field(strict=False)]

_NOT_CUBIC = ("hcp",)


def atoms_of(structure: BuiltCrystal | NamedMolecule | StructureFile, base: Path | None = None) -> Atoms:
    """The structure as ASE's atoms, without a calculator.

    Args:
        structure: its description.
        base: folder that relative paths start from; left out, the working directory.

    Raises:
        WorkloadError: no such file, molecule or crystal.
    """
    if isinstance(structure, StructureFile):
        return _from_file(structure, base or Path.cwd())
    from ase.build import bulk, molecule

    try:
        if isinstance(structure, NamedMolecule):
            found: Atoms = molecule(MOLECULES.get(structure.name, structure.name))
            return found
        a, c, cubic = structure.a_angstrom, structure.c_angstrom, structure.lattice not in _NOT_CUBIC
        return bulk(structure.formula, structure.lattice, a=a, c=c, cubic=cubic)
    except (KeyError, ValueError, RuntimeError) as error:
        name = structure.name if isinstance(structure, NamedMolecule) else structure.formula
        raise WorkloadError(f"structure of {structure.kind}", name, f"what ASE can build ({error})") from error


def _from_file(structure: StructureFile, base: Path) -> Atoms:
    try:
        path = existing_file(structure.path, base)
    except NoSuchFileError as error:
        raise WorkloadError("structure.path", structure.path, str(error)) from error
    from tunebench.workloads.structure_files import read_structures

    found = read_structures(path, "structure.path")
    if structure.index >= len(found):
        raise WorkloadError("structure.index", structure.index, f"less than {len(found)}, the structures of {path}")
    atoms = found[structure.index]
    atoms.calc = None
    return atoms
