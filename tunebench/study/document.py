"""Writes what can be read off the models: both READMEs of the YAML folders and the JSON-Schema of search spaces.

``python -m tunebench.study.document`` writes them, ``--check`` only says which are out of date (exit code 1).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from tunebench.study.installed import shipped_folder
from tunebench.study.problems import parse
from tunebench.study.schema import search_space_schema, study_schema
from tunebench.study.search_space import (
    ChoiceParameter,
    FloatParameter,
    IntParameter,
    Parameter,
    SearchSpace,
    Treats,
    shipped_optimizers,
)
from tunebench.study.section import INTEGER_LIMIT
from tunebench.study.spec import Study
from tunebench.study.strict_yaml import read_yaml

_MADE_BY = "<!-- Written by `python -m tunebench.study.document`; edit the models or the YAML files, not this page. -->"

_STUDIES_HEAD = """# Studies

A study is one YAML file: workloads (what is trained) times optimizers (who trains it), searched in the tune stage and
run again with fresh seeds in the confirm stage, which alone ranks.

```
tunebench plan studies/quickstart.yaml   # check the file, show rungs and cost, start nothing
tunebench run  studies/quickstart.yaml   # start, or go on where it stopped
```

A mistake in a file ends in one line that names the key, what was found and what is allowed. Numbers may be written
`1e-3`; `yes` and `no` are texts, only `true` and `false` are truth values; a key may occur once; anchors (`&name`,
`*name`) work. A starting run freezes the file: `study.yaml`, `search_spaces/` and their hash `study.sha256` lie in the
run directory, with every default written out and paths made absolute, and a changed copy is refused.
"""

_KEYS_HEAD = """## Keys

Units stand in the key names. A key without a default is required. `[]` stands for every entry of a list.
Integers stay below 2^31.
"""

_SPACES_HEAD = """# Search spaces

One file per optimizer: what its trials vary, within which bounds, and who published them (`source` beside every
range). `schema.json` describes the format; every file is checked against it.

What makes the spaces comparable:

- **Same structure for shared roles.** Every learning rate is searched over three decades, in the logarithm, around
  values published for that optimizer. Weight decay has one range everywhere, and so have the averaging constants
  (`beta1`, `momentum`: 0.9 or 0.95; `beta2`: 0.95, 0.98 or 0.999). The same share of the range means the same point in
  every arm, so arms meet the same points of the quasi-random sequence.
- **No optimum at an edge.** Published values and defaults of ranges lie outside the outer tenth of each side.
- **More hyperparameters buy no more trials.** Every arm that competes gets `tune.trials_per_arm`.
- **`eps` is 1e-12 in every arm.** Gradients of tensor-product weights with l > 0 are so small that 1e-8 would stop
  them, and the ranking would depend on the units of the loss.
- **`role: cost`** marks what trades device time for progress per step; it is judged on device time. The other roles are
  `learning_rate`, `decay` (weight decay), `stability` (averaging, clamping) and `structure` (what is taken for a
  matrix, or which variant of the algorithm runs).
- **The promise is kept.** `treats` says which weights an optimizer's own rule must treat: `all`, or exactly the
  `matrices` that `fctp_view` makes of the model. A run refuses an arm where it treats others.

A study takes a hyperparameter out of the search with `fixed`, or brings its own file:

```yaml
optimizers:
  - name: adamw
    fixed: {weight_decay: 0.0}
  - name: soap
    search_space: my_soap.yaml   # relative to the study file; same format, same `name`
```
"""


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or with ``--check`` compare them; returns 0, or 1 where a page is out of date."""
    parser = argparse.ArgumentParser(prog="python -m tunebench.study.document", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit with 1 where a page is out of date")
    check = parser.parse_args(arguments).check
    stale = {file: text for file, text in pages().items() if not file.is_file() or file.read_text("utf-8") != text}
    for file, text in stale.items():
        print(f"{file}: {'out of date' if check else 'written'}")
        if not check:
            file.write_text(text, encoding="utf-8")
    return 1 if check and stale else 0


def pages() -> dict[Path, str]:
    """Every generated file with the text it should have."""
    studies, spaces = shipped_folder("studies"), shipped_folder("search_spaces")
    return {
        studies / "README.md": studies_page(studies),
        spaces / "README.md": search_spaces_page(),
        spaces / "schema.json": json.dumps(search_space_schema(), indent=2, ensure_ascii=False) + "\n",
    }


def studies_page(folder: Path) -> str:
    """Markdown: the studies of a folder, then every key of a study file with type, default and meaning."""
    rows = [_study_row(file) for file in sorted(folder.glob("*.yaml"))]
    head = _table(("study", "what it asks", "workloads", "optimizers", "trials (tune + confirm)"), rows)
    keys = "\n".join(_section(key, model) for key, model in dict.fromkeys(_sections("", Study)))
    return f"{_MADE_BY}\n{_STUDIES_HEAD}\n{head}\n{_KEYS_HEAD}\n{keys}"


def search_spaces_page() -> str:
    """Markdown: the rules, then every optimizer with its ranges."""
    spaces = [SearchSpace.load(name) for name in shipped_optimizers()]
    return f"{_MADE_BY}\n{_SPACES_HEAD}\n" + "\n".join(_space_section(space) for space in spaces)


def _study_row(file: Path) -> tuple[str, ...]:
    study = parse(Study, read_yaml(file), file)
    searched = [study.trials_of(arm.name) for arm in study.optimizers]
    confirmed = sum(min(study.confirm.top_k, count) for count in searched) * study.confirm.seeds
    trials = f"{len(study.workloads) * sum(searched)} + {len(study.workloads) * confirmed}"
    workloads, optimizers = (", ".join(part.name for part in parts) for parts in (study.workloads, study.optimizers))
    return f"[{study.name}]({file.name})", study.description, workloads, optimizers, trials


def _sections(key: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section of a study file with its dotted key, outer before inner, in the order of the file."""
    yield key, model
    for name, field in model.model_fields.items():
        inner = f"{key}.{name}".removeprefix(".")
        place = f"{inner}[]" if _holds_many(field.annotation) else inner
        for part in _models(field.annotation):
            yield from _sections(place, part)


def _holds_many(annotation: Any) -> bool:
    return getattr(annotation, "__origin__", None) is tuple


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _section(key: str, model: type[BaseModel]) -> str:
    schema = study_schema()
    properties = schema["properties"] if model is Study else schema["$defs"][model.__name__]["properties"]
    source = model.model_fields.get("source")
    variant = f", `source: {get_args(source.annotation)[0]}`" if source else ""
    title = f"### `{key}`{variant}" if key else "### Top level"
    rows = [
        (f"`{name}`", _kind(properties[name], schema["$defs"]), _default(field), field.description or "")
        for name, field in model.model_fields.items()
    ]
    doc = " ".join(line.strip() for line in (model.__doc__ or "").strip().splitlines() if line.strip())
    return f"{title}\n\n{doc}\n\n{_table(('key', 'value', 'default', 'meaning'), rows)}"


def _default(field: Any) -> str:
    if field.default_factory is not None:
        made = field.default_factory()
        return "its own defaults" if isinstance(made, BaseModel) else f"`{json.dumps(made)}`"
    if field.default is PydanticUndefined:
        return "required"
    return f"`{json.dumps(list(field.default) if isinstance(field.default, tuple) else field.default)}`"


def _kind(part: dict[str, Any], defs: dict[str, Any]) -> str:
    """A value's type and range in words, from its JSON-Schema."""
    if "$ref" in part:
        return _kind(defs[part["$ref"].rsplit("/", 1)[1]], defs)
    for joint in ("anyOf", "oneOf"):
        if joint in part:
            return " or ".join(dict.fromkeys(_kind(option, defs) for option in part[joint]))
    if "const" in part:
        return f"`{part['const']}`"
    if "enum" in part:
        return ", ".join(f"`{value}`" for value in part["enum"])
    words = {"string": "text", "object": "mapping", "array": "list", "boolean": "`true`, `false`", "null": "`null`"}
    word = words.get(part.get("type", ""), part.get("type", "anything"))
    if part.get("type") == "array" and "items" in part:
        word = f"list of {_kind(part['items'], defs)}"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [
        f"{sign} {part[name]:g}" for name, sign in signs.items() if part.get(name, INTEGER_LIMIT) != INTEGER_LIMIT
    ]
    return " ".join([word, *([", ".join(bounds)] if bounds else [])])


def _space_section(space: SearchSpace) -> str:
    rows = [
        (f"`{name}`", _range(part), part.role.value, _value(part.default)) for name, part in space.parameters.items()
    ]
    rows += [(f"`{name}`", "fixed", "", _value(setting.value)) for name, setting in space.fixed.items()]
    notes = [f"`{space.implementation}`"]
    notes += [f"schedule {space.schedule.value} with the study's warm-up"] if space.schedule else []
    notes += ["treats the matrices of the model, an auxiliary rule the rest"] if space.treats is Treats.MATRICES else []
    notes += ["reads out its own averaged weights"] if space.readout == "schedule_free" else []
    notes += [] if space.available else [f"not available: {space.reason}"]
    table = _table(("hyperparameter", "range", "role", "default"), rows)
    return f"## {space.name}\n\n{space.description}\n\n{'; '.join(notes)}.\n\n{table}"


def _range(parameter: Parameter) -> str:
    if isinstance(parameter, ChoiceParameter):
        return ", ".join(_value(choice) for choice in parameter.choices)
    assert isinstance(parameter, FloatParameter | IntParameter)
    return f"{parameter.low:g} to {parameter.high:g}{', log' if parameter.log else ''}"


def _value(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
