"""YAML as a study file means it: numbers are numbers, a key occurs once, and what is written reads back the same.

PyYAML follows YAML 1.1, where ``1e-3`` is a text, ``no`` is false, ``010`` is eight and a repeated key silently wins.
The reader and the writer here share one small set of scalar rules instead (close to YAML 1.2's core schema).
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from tunebench.study.spec import InWords, StudyError

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^[-+]?[0-9]+(?:_[0-9]+)*$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:[0-9]+(?:_[0-9]+)*\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
_NUMBER_STARTS = list("-+0123456789.")
_SCALARS = (
    ("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", _BOOL, list("tTfF")),
    ("tag:yaml.org,2002:int", _INT, _NUMBER_STARTS),
    ("tag:yaml.org,2002:float", _FLOAT, _NUMBER_STARTS),
    ("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"]),
)


def read_yaml(file: Path) -> dict[str, Any]:
    """Read one YAML mapping, with anchors and merge keys.

    Raises:
        StudyError: the file is missing, unreadable, no YAML, no mapping, repeats a key or has a key that is no text.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StudyError(file, "", InWords("no such file"), "a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(file, "", InWords(error), "a readable YAML file in UTF-8") from None
    try:
        data = yaml.load(text, Loader=_Reader)
    except yaml.YAMLError as error:
        raise StudyError(file, *_yaml_problem(error)) from None
    except RecursionError:
        raise StudyError(file, "", InWords("endless nesting"), "a mapping") from None
    if not isinstance(data, dict):
        found = InWords("an empty file") if data is None else data
        raise StudyError(file, "", found, "a mapping of keys to values")
    return data


def write_yaml(data: dict[str, Any]) -> str:
    """YAML text that `read_yaml` reads back as the same data, keys in the order given."""
    return yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=120)


class _RefusedKeyError(yaml.constructor.ConstructorError):
    """A key that is repeated or no text; `key` and `line` say which and where."""

    def __init__(self, key: object, found: str, line: int) -> None:
        super().__init__(None, None, found, None)
        self.key, self.found, self.line = key, found, line


class _Reader(yaml.SafeLoader):
    """SafeLoader with the scalar rules above; containers are built whole, so a mapping cannot hold itself."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # PyYAML's own class attribute

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _RefusedKeyError(key, f"the key {key!r}", key_node.start_mark.line + 1)
            if key in seen:
                raise _RefusedKeyError(key, f"the key {key!r} twice", key_node.start_mark.line + 1)
            seen.add(key)
        return super().construct_mapping(node, deep=True)

    def construct_whole_sequence(self, node: yaml.SequenceNode) -> list[Any]:
        return self.construct_sequence(node, deep=True)


class _Writer(yaml.SafeDumper):
    """SafeDumper that quotes by the scalar rules above and never writes aliases."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Escaped where PyYAML would write one of Unicode's line breaks as it is and read back another character."""
        style = '"' if any(not char.isprintable() and char != "\n" for char in text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


for _tag, _pattern, _starts in _SCALARS:
    _Reader.add_implicit_resolver(_tag, _pattern, _starts)
    _Writer.add_implicit_resolver(_tag, _pattern, _starts)
_Reader.add_constructor("tag:yaml.org,2002:map", _Reader.construct_mapping)
_Reader.add_constructor("tag:yaml.org,2002:seq", _Reader.construct_whole_sequence)
_Reader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))
_Reader.add_constructor("tag:yaml.org,2002:float", lambda _, node: _float(node.value))


_Writer.add_representer(str, _Writer.represent_text)


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _yaml_problem(error: yaml.YAMLError) -> tuple[str, object, str]:
    if isinstance(error, _RefusedKeyError):
        return str(error.key), InWords(f"{error.found} (line {error.line})"), "each key once, and keys that are texts"
    if isinstance(error, yaml.MarkedYAMLError):
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        problem = str(error.problem).removeprefix("but ").removeprefix("found ")
        return "", InWords(f"{problem}{line}"), "one document of valid YAML"
    return "", InWords(error), "valid YAML"
