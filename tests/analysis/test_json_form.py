from __future__ import annotations

import json
import math
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from analysis import ranking as ranking_module
from analysis.json_form import schema_of, to_json
from analysis.load import load
from analysis.ranking import Ranking, rank
from tests.analysis.synthetic_run import Plan, write_run

SCHEMA = Path(ranking_module.__file__).with_name("ranking.schema.json")
ADAMW = (0.031, 0.030, 0.032, 0.033, 0.029)
PLANS = {
    "plain": Plan(arms={"adamw": ADAMW, "soap": (0.021, 0.020, 0.022, 0.023, 0.019)}, top_k=2),
    "failures": Plan(arms={"adamw": ADAMW, "soap": (0.021, math.inf, math.inf, 0.023, math.inf)}),
    "hopeless": Plan(arms={"sgd": ADAMW, "adamw": ADAMW}, hopeless=("sgd",)),
    "nothing": Plan(arms={"adamw": [math.nan] * 5}),
    "one seed": Plan(arms={"adamw": (0.03,), "soap": (0.02,)}),
    "exploratory": Plan(arms={"adamw": ADAMW, "soap": ADAMW}, sampler="tpe"),
    "two workloads": Plan(arms={"adamw": ADAMW, "soap": ADAMW}, workloads=("ethanol-nequip", "ethanol-allegro")),
}


def test_shipped_schema_is_that_of_the_records() -> None:
    assert json.loads(SCHEMA.read_text(encoding="utf-8")) == schema_of(Ranking)


@pytest.mark.parametrize("name", PLANS)
def test_rankings_follow_the_schema(name: str, tmp_path: Path) -> None:
    content = to_json(rank(load(write_run(tmp_path / "run", PLANS[name]))))
    jsonschema.validate(
        json.loads(json.dumps(content, allow_nan=False)), json.loads(SCHEMA.read_text(encoding="utf-8"))
    )


def test_arrays_failures_and_enums_have_plain_forms() -> None:
    assert to_json({"a": np.array([1.0, math.inf]), 0.5: (None, True)}) == {"a": [1.0, "inf"], "0.5": [None, True]}


def test_type_without_a_form_is_refused() -> None:
    with pytest.raises(TypeError, match="found <class 'complex'>"):
        schema_of(complex)
