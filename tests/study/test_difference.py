from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.study.test_plan import resolved
from tunebench.study.difference import differences


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, []),
        ({"seed": 3}, ["seed: 0 there, 3 here"]),
        ({"confirm": {"top_k": 2, "seeds": 4}}, ["confirm.seeds: 5 there, 4 here"]),
        ({"waive": {"F11": "short"}}, ["waive.F11: nothing there, 'short' here"]),
        ({"description": 90 * "x"}, [f"description: '' there, '{12 * 'x'}...{13 * 'x'}' here"]),
        (
            {"optimizers": [{"name": "adamw", "fixed": {"weight_decay": 0.1}}, "schedule_free"]},
            ["optimizers[0].fixed.weight_decay: nothing there, 0.1 here"],
        ),
    ],
)
def test_two_studies_differ_in_the_keys_that_were_changed(
    tmp_path: Path, changes: dict[str, Any], told: list[str]
) -> None:
    found = differences(resolved(tmp_path), resolved(tmp_path, **changes))
    assert [phrase for phrase in found if not phrase.startswith("search_spaces.")] == told
    assert any(phrase.startswith("search_spaces.adamw") for phrase in found) is ("optimizers" in changes)
