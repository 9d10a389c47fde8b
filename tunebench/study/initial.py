"""The `init` section of a workload: a trained model whose weights every trial starts from.

All arms and all seeds of a workload start from the same weights. A trial's seeds then draw the order of its data and
its force labels, and nothing else.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, PlainSerializer, PlainValidator

from tunebench.study.section import SHA256_PATTERN, NonNegativeInt, PositiveFloat, Section

ADOPTED = "adopted"
"""The preset of a model whose architecture was read from the file that `init` names."""

Pattern = Annotated[str, Field(min_length=1)]


class NewTypes(StrEnum):
    """What becomes of species that the file does not know: an error, or rows of weights drawn at random."""

    ERROR = "error"
    RANDOM = "random"


class Energies(StrEnum):
    """Energies of an atom of each type: as in the file, or corrected by least squares on the training split."""

    KEEP = "keep"
    REESTIMATE = "reestimate"


def _train(value: object) -> object:
    if value in ("all", "readout"):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(part, str) and part for part in value):
        return tuple(value)
    raise ValueError("all, readout, or a list of patterns of at least 1")


Named = Literal["all", "readout"]
Train = Annotated[
    Named | tuple[str, ...],
    PlainValidator(_train, json_schema_input_type=Named | Annotated[list[Pattern], Field(min_length=1)]),
    PlainSerializer(lambda value: value if isinstance(value, str) else list(value)),
]


class Initial(Section):
    """Initial weights from a file, alike for every arm and seed. Reading one runs code in it: name files you trust."""

    path: str = Field(
        min_length=1,
        description="a checkpoint of `tunebench pretrain`, of a confirm trial (`final.ckpt`) or of NequIP (`.ckpt`), "
        "or a packaged model (`.nequip.zip`); a relative path starts at the study file's folder",
    )
    sha256: Annotated[str, Field(pattern=SHA256_PATTERN)] | None = Field(
        default=None, description="of the file; a starting run writes it down and from then on accepts no other"
    )
    new_types: Annotated[NewTypes, Field(strict=False)] = Field(
        default=NewTypes.ERROR, description="species that the file does not know: `error`, or `random` weights for them"
    )
    energies: Annotated[Energies, Field(strict=False)] = Field(
        default=Energies.REESTIMATE,
        description="energy of an atom of each type: `keep`, or `reestimate` it by least squares of what the file's "
        "model leaves over on the training split",
    )
    train: Train = Field(
        default="all",
        description="weights that move: `all`, `readout`, or patterns of their names (`*` stands for anything)",
    )
    lr_factors: dict[Pattern, PositiveFloat] = Field(
        default_factory=dict,
        description="factors on the learning rate of the weights whose names match a pattern, alike for every arm; no "
        "weight may match two",
    )
    seed: NonNegativeInt = Field(default=0, description="seed of the weights of new species; not the study's")

    @property
    def chooses(self) -> bool:
        """Whether weights are treated apart: some stand still, or have a learning rate of their own."""
        return self.train != "all" or bool(self.lr_factors)


Source = Literal["checkpoint", "package"]


def source_of(path: str) -> Source | None:
    """What kind of file a path names, by its ending; None for one that holds no initial weights."""
    if path.endswith(".nequip.zip"):
        return "package"
    return "checkpoint" if path.endswith(".ckpt") else None
