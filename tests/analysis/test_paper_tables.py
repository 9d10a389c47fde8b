"""What of the report goes into other texts: Markdown for a pull request, LaTeX for a paper."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import latex
from analysis.choice import choose
from analysis.latex import tabular, write_latex
from analysis.load import Run, load
from analysis.mean_ranks import MeanRanks, ranks_of
from analysis.ranking import Ranking, rank
from analysis.summary import escaped, summary
from tests.analysis.synthetic_run import Plan, write_run

ARMS = {
    "schedule_free": (0.03, 0.031, 0.032, 0.033, math.inf),
    "soap": (0.02, 0.021, 0.022, 0.023, 0.024),
    "muon": (0.0201, 0.0209, 0.0221, 0.0229, 0.0241),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    plan = Plan(arms=ARMS, workloads=("ethanol_nequip", "ethanol-allegro"))
    return load(write_run(tmp_path_factory.mktemp("paper") / "run", plan))


@pytest.fixture(scope="module")
def ranking(run: Run) -> Ranking:
    return rank(run)


def check_latex(text: str) -> None:
    """Braces balance, rows have as many cells as the alignment has letters, no special character stands bare."""
    body = re.sub(r"(?m)^%.*$", "", text)
    plain = re.sub(r"\\[{}]", "", body)
    assert plain.count("{") == plain.count("}")
    assert re.sub(r"\\\$", "", body).count("$") % 2 == 0
    alignment = re.search(r"\\begin\{tabular\}\{(\w+)\}", body)
    assert alignment is not None
    rows = [line for line in body.splitlines() if line.endswith(r" \\")]
    assert all(len(re.split(r"(?<!\\)&", row)) == len(alignment.group(1)) for row in rows)
    assert not re.search(r"(?<!\\)[%#_]|[Å∞−]", re.sub(r"\$[^$]*\$", "", body))  # noqa: RUF001
    for name in ("table", "tabular"):
        assert body.count(rf"\begin{{{name}}}") == body.count(rf"\end{{{name}}}") == 1
    assert [body.count(rule) for rule in (r"\toprule", r"\midrule", r"\bottomrule")] == [1, 1, 1]


def test_latex_tables_balance_and_hold_every_arm(ranking: Ranking, tmp_path: Path) -> None:
    write_latex(ranking, tmp_path)
    texts = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.glob("*.tex")}
    assert set(texts) == {
        "arms-ethanol_nequip.tex",
        "arms-ethanol-allegro.tex",
        "comparisons-ethanol_nequip.tex",
        "comparisons-ethanol-allegro.tex",
        "overall.tex",
    }
    for text in texts.values():
        check_latex(text)
    arms = texts["arms-ethanol_nequip.tex"]
    assert r"schedule\_free" in arms
    assert r"meV/\AA{}" in arms


@settings(max_examples=40)
@given(st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4))
def test_any_text_makes_a_table_that_balances(cells: list[str]) -> None:
    text = tabular(cells, "l" * len(cells), [cells], "caption")
    rows = [line for line in text.splitlines() if line.endswith(r" \\")]
    assert len(rows) == 2
    plain = re.sub(r"\\[{}]", "", text)
    assert plain.count("{") == plain.count("}")
    assert all(len(re.split(r"(?<!\\)&", row)) == len(cells) for row in rows)
    assert latex.escaped("a_b & 50 %") == r"a\_b \& 50 \%"


def test_the_summary_says_verdict_evidence_cost_and_what_to_use(run: Run, ranking: Ranking) -> None:
    text = summary(run, ranking)
    assert text.startswith("## synthetic\n\n**")
    assert "### ethanol\\_nequip" in text
    assert "| 1 | muon | 22.0 |" in text
    assert "schedule\\_free" in text
    for heading in ("### How sure", "### Cost"):
        assert heading in text
    assert "To use: muon, learning\\_rate" in text
    assert "muon leads, and which is the cheapest is not known" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.split(r"(?<!\\)\|", line)) for line in table} == {8}


@given(st.text())
def test_nothing_in_the_summary_is_markup_or_a_mention(text: str) -> None:
    shown = escaped(text)
    assert "\n" not in shown
    assert not re.search(r"(?<!\\)(\\\\)*[`*_<>|#@\[\]]", shown)


def test_the_choice_in_a_tie_is_the_cheapest_where_steps_were_timed_alone(ranking: Ranking) -> None:
    workload = ranking.workloads[0]
    shared = choose(workload)
    assert shared is not None
    assert (shared.optimizer, "the cheapest is not known: steps were not timed alone" in shared.why) == ("muon", True)
    points = tuple(
        dataclasses.replace(point, alone=True, device_s=1.0 if point.optimizer == "soap" else 2.0)
        for point in workload.pareto
    )
    found = choose(dataclasses.replace(workload, pareto=points))
    assert found is not None
    assert (found.optimizer, found.why) == ("soap", "tie of muon, soap; soap is the cheapest of them")


def test_another_arm_than_the_choice_can_be_asked_for(ranking: Ranking) -> None:
    asked = choose(ranking.workloads[0], "soap")
    assert asked is not None
    assert asked.why == "soap was asked for; tie on ethanol_nequip, where the choice is muon"
    assert choose(ranking.workloads[0], "adamw") is None


def test_mean_ranks_by_hand() -> None:
    steps = np.arange(1.0, 11.0)
    found = ranks_of({"a": steps, "b": 1.01 * steps + 0.001 * (-1.0) ** steps, "c": 3.0 * steps})
    assert isinstance(found, MeanRanks)
    assert found.workloads == 10
    assert found.ranks["c"] == 3.0
    assert all("c" not in group for group in found.groups)
    alike = ranks_of({"a": np.array([1.0, 2.0] * 4), "b": np.array([2.0, 1.0] * 4)})
    assert isinstance(alike, str)
    assert "no pair" in alike


@given(st.permutations(["a", "b", "c"]))
def test_mean_ranks_do_not_depend_on_the_order_of_the_optimizers(order: list[str]) -> None:
    generator = np.random.default_rng(0)
    base = generator.uniform(1.0, 2.0, 8)
    errors = {"a": base, "b": base * 1.5, "c": base * generator.uniform(0.9, 1.1, 8)}
    assert ranks_of({name: errors[name] for name in order}) == ranks_of(errors)
