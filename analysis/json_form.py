"""Records as plain JSON data, and the JSON-Schema of that form."""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass
from enum import StrEnum
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import numpy as np


def to_json(record: object) -> Any:
    """A record as plain JSON data; infinite numbers become the strings ``"inf"`` and ``"-inf"``, NaN is refused.

    Raises:
        ValueError: a NaN reached the record.
    """
    if is_dataclass(record):
        return {field.name: to_json(getattr(record, field.name)) for field in fields(record)}
    if isinstance(record, dict):
        return {str(name): to_json(value) for name, value in record.items()}
    if isinstance(record, np.ndarray):
        return [to_json(value) for value in record.tolist()]
    if isinstance(record, list | tuple):
        return [to_json(value) for value in record]
    if isinstance(record, float):
        return _json_float(record)
    return record.value if isinstance(record, StrEnum) else record


def _json_float(number: float) -> float | str:
    if math.isnan(number):
        raise ValueError("ranking: found NaN, allowed: a number or inf")
    return float(number) if math.isfinite(number) else "inf" if number > 0.0 else "-inf"


def schema_of(record: type) -> dict[str, Any]:
    """The JSON-Schema (2020-12) of what `to_json` makes of a record class.

    Raises:
        TypeError: a field has a type that has no form here.
    """
    definitions: dict[str, Any] = {}
    top = _type_schema(record, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": definitions, **top}


def _type_schema(of: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = get_origin(of), get_args(of)
    if origin in (Union, UnionType):
        return {"anyOf": [_type_schema(part, definitions) for part in arguments]}
    if origin is tuple:
        return {"type": "array", "items": _type_schema(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type_schema(arguments[1], definitions)}
    if origin is np.ndarray:
        return {"type": "array", "items": _NUMBER}
    if is_dataclass(of):
        return _record_schema(cast("type", of), definitions)
    if isinstance(of, type) and issubclass(of, StrEnum):
        return {"enum": [member.value for member in of]}
    if of not in _PLAIN:
        raise TypeError(f"schema: found {of}, allowed: records, tuples, dictionaries, arrays, enums and plain values")
    return _PLAIN[of]


def _record_schema(record: type, definitions: dict[str, Any]) -> dict[str, Any]:
    name = record.__name__
    if name not in definitions:
        definitions[name] = {}
        hints = get_type_hints(record)
        properties = {field.name: _type_schema(hints[field.name], definitions) for field in fields(record)}
        definitions[name] = {
            "type": "object",
            "description": (record.__doc__ or "").strip().splitlines()[0],
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}


_NUMBER: dict[str, Any] = {"anyOf": [{"type": "number"}, {"enum": ["inf", "-inf"]}]}
_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    float: _NUMBER,
    type(None): {"type": "null"},
    Any: {},
}
