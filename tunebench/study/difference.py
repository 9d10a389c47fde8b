"""Where two studies say different things, key by key as error messages name keys."""

from __future__ import annotations

import reprlib

from tunebench.study.resolve import ResolvedStudy
from tunebench.study.spec import InWords

_NOTHING = InWords("nothing")


def differences(there: ResolvedStudy, here: ResolvedStudy) -> list[str]:
    """One phrase for every key of study or search spaces that differs, ``KEY: VALUE there, VALUE here``."""
    one, other = _flat(_content(there)), _flat(_content(here))
    return [
        f"{key}: {reprlib.repr(one.get(key, _NOTHING))} there, {reprlib.repr(other.get(key, _NOTHING))} here"
        for key in {**one, **other}
        if one.get(key, _NOTHING) != other.get(key, _NOTHING)
    ]


def _content(resolved: ResolvedStudy) -> dict[str, object]:
    study = resolved.study.model_dump(mode="json")
    for arm in study["optimizers"]:
        del arm["search_space"]  # a path; what lies there is compared
    return {**study, "search_spaces": {name: space.model_dump(mode="json") for name, space in resolved.spaces.items()}}


def _flat(content: object, key: str = "") -> dict[str, object]:
    """Plain data by dotted path."""
    if isinstance(content, dict):
        parts = [(f"{key}.{name}".lstrip("."), part) for name, part in content.items()]
    elif isinstance(content, list):
        parts = [(f"{key}[{index}]", part) for index, part in enumerate(content)]
    else:
        return {key: content}
    return {path: value for place, part in parts for path, value in _flat(part, place).items()}
