"""What every section of a YAML file is made of: names, ranges, and a frozen model without unknown keys."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]*$"
SHA256_PATTERN = r"^[0-9a-f]{64}$"
RULE_PATTERN = r"^F([1-9]|1[0-9])$"

Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=60)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
INTEGER_LIMIT = 2**31
PositiveInt = Annotated[int, Field(ge=1, lt=INTEGER_LIMIT)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=INTEGER_LIMIT)]


class Section(BaseModel):
    """A part of a study file: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
