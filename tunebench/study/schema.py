"""JSON-Schemas of the two kinds of file a user writes, for editors and for checks outside tunebench."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from tunebench.study.search_space import SearchSpace
from tunebench.study.spec import Study

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def study_schema() -> dict[str, Any]:
    """JSON-Schema (draft 2020-12) of a study file; an optimizer may be a bare name.

    It knows keys, types and ranges. What only several keys together can get wrong is left to `load_study`.
    """
    from tunebench.properties.plan import PropertyPlan  # which needs `schema_of`

    schema, plan = schema_of(Study, "tunebench study"), PropertyPlan.model_json_schema(mode="validation")
    schema["$defs"] = plan["$defs"] | schema["$defs"]
    section = schema["$defs"]["ModelProperties"]["properties"]
    for name in ("properties", "reference"):  # the study's model takes them as they are, the plan's checks them
        section[name] = plan["properties"][name] | {"description": section[name]["description"]}
    return schema


def search_space_schema() -> dict[str, Any]:
    """JSON-Schema (draft 2020-12) of a search-space file; ``search_spaces/schema.json`` holds it."""
    return schema_of(SearchSpace, "tunebench search space")


def schema_of(model: type[BaseModel], title: str) -> dict[str, Any]:
    """JSON-Schema of what a model reads, with its dialect and a title."""
    return {"$schema": _DIALECT, **model.model_json_schema(mode="validation"), "title": title}
