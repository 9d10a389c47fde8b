"""From what pydantic found wrong to lines a person can act on: dotted key, value found, what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tunebench.study.section import NAME_PATTERN, RULE_PATTERN, SHA256_PATTERN
from tunebench.study.spec import InWords, StudyError

ModelT = TypeVar("ModelT", bound=BaseModel)

_PATTERNS = {
    NAME_PATTERN: "lower-case letters, digits, - and _, with a letter or digit first",
    SHA256_PATTERN: "a SHA-256 of 64 hexadecimal digits",
    RULE_PATTERN: "a rule from F1 to F19",
}
_ALLOWED: dict[str, Callable[[dict[str, Any]], str]] = {
    "int_type": lambda _: "an integer",
    "float_type": lambda _: "a number",
    "string_type": lambda _: "a text",
    "bool_type": lambda _: "true or false",
    "dict_type": lambda _: "a mapping",
    "model_type": lambda _: "a mapping",
    "model_attributes_type": lambda _: "a mapping",
    "tuple_type": lambda _: "a list",
    "finite_number": lambda _: "a finite number",
    "too_short": lambda ctx: f"a list of at least {ctx['min_length']}",
    "string_too_short": lambda _: "a text that is not empty",
    "string_too_long": lambda ctx: f"at most {ctx['max_length']} characters",
    "string_pattern_mismatch": lambda ctx: _PATTERNS[ctx["pattern"]],
    "union_tag_invalid": lambda ctx: str(ctx["expected_tags"]),
}


@dataclass(frozen=True)
class Problem:
    """One mistake in a file; `key` is dotted, for example ``workloads[0].model.family``."""

    key: str
    found: object
    allowed: str


def parse(model: type[ModelT], data: object, file: Path) -> ModelT:
    """The data as `model`.

    Raises:
        StudyError: the first problem and how many more there are.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # An unknown key comes first: it is often the misspelt form of one that is then missing.
        details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
        raise_problems(file, [_problem(model, detail) for detail in details])
        raise


def raise_problems(file: Path, problems: Sequence[Problem]) -> None:
    """Raise a StudyError for the first problem, if there is one."""
    if problems:
        first = problems[0]
        raise StudyError(file, first.key, first.found, first.allowed, more=len(problems) - 1)


def one_of(names: Iterable[str], found: object = None) -> str:
    """The allowed names for a message, the nearest to what was found first named."""
    names = sorted(names)
    near = difflib.get_close_matches(found, names, n=1, cutoff=0.5) if isinstance(found, str) else []
    return ", ".join(names) + (f"; did you mean {near[0]}?" if near else "")


def _problem(root: type[BaseModel], details: ErrorDetails) -> Problem:
    kind, ctx = details["type"], details.get("ctx", {})
    key, section = _locate(root, details["loc"])[0], _locate(root, details["loc"][:-1])[1]
    if kind == "extra_forbidden":
        found = InWords(f"an unknown key with value {details['input']!r}")
        return Problem(key, found, one_of(section.model_fields, details["loc"][-1]))
    if kind == "missing":
        field = section.model_fields[str(details["loc"][-1])]
        return Problem(key, InWords("nothing"), f"a value, it is required: {field.description}")
    if kind == "union_tag_not_found":
        return Problem(f"{key}.{_tag_name(ctx)}", InWords("nothing"), one_of(_tags_at(root, details["loc"])))
    if kind == "union_tag_invalid":
        return Problem(f"{key}.{_tag_name(ctx)}", ctx["tag"], one_of(_tags_at(root, details["loc"]), ctx["tag"]))
    if kind in _ALLOWED:
        return Problem(key, details["input"], _ALLOWED[kind](dict(ctx)))
    allowed = details["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    in_words, _, rest = allowed.partition("; allowed: ")
    return Problem(key, InWords(in_words), rest) if rest else Problem(key, details["input"], allowed)


def _tag_name(ctx: dict[str, Any]) -> str:
    return str(ctx["discriminator"]).strip("'")


def _tags_at(root: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    return [tag for model in _candidates(root, loc)[1] for tag in _tags(model)]


def _locate(root: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel]]:
    """The dotted key of a pydantic location, and the section it lies in."""
    parts, candidates = _candidates(root, loc)
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return key.removeprefix("."), candidates[0]


def _candidates(root: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[int | str], list[type[BaseModel]]]:
    """Follow a location from the root; pydantic's union tags, which no file holds, are left out of the key."""
    candidates, parts = [root], []
    for part in loc:
        tagged = [model for model in candidates if part in _tags(model)] if len(candidates) > 1 else []
        if tagged:
            candidates = tagged
            continue
        if part == "[key]":
            continue
        parts.append(part)
        field = candidates[0].model_fields.get(str(part)) if len(candidates) == 1 else None
        candidates = (_models(field.annotation) if field else []) or candidates
    return parts, candidates


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _tags(model: type[BaseModel]) -> list[str]:
    literals = [field.annotation for field in model.model_fields.values() if get_origin(field.annotation) is Literal]
    return [str(value) for literal in literals for value in get_args(literal) if len(get_args(literal)) == 1]
