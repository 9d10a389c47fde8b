"""Runs that are broken, small or not over: the report says so and claims nothing."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest

from analysis.__main__ import BAD_INPUT, DONE, main
from analysis.report import ReportResult, write_report
from tests.analysis.synthetic_run import Plan, write_run
from tunebench.study.record import CURVES, JOURNAL, STUDY_HASH

SEEDS = (0.03, 0.031, 0.032, 0.033, 0.034)
BETTER = (0.02, 0.021, 0.022, 0.023, 0.024)


def words(report: ReportResult) -> str:
    """The page's text without its script, style and packed data."""
    page = report.page.read_text(encoding="utf-8")
    page = re.sub(r"<(script|style)[^>]*>.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", page)).split())


def verdicts(report: ReportResult) -> list[str]:
    ranking = json.loads(report.ranking.read_text(encoding="utf-8"))
    return [workload["decision"]["verdict"] for workload in ranking["workloads"]]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (Plan(arms={"adamw": SEEDS, "soap": [math.inf] * 5}, hopeless=("soap",)), "no configuration survived the tune"),
        (Plan(arms={"adamw": SEEDS, "soap": [math.inf] * 5}), "5 of 5 seeds failed|5 \\(5 failed\\)"),
        (Plan(arms={"adamw": (0.03,), "soap": (0.02,)}), "the smallest number of paired seeds is 1, a winner needs 5"),
        (Plan(arms={"adamw": SEEDS}), "a single arm has nothing to be compared with"),
        (Plan(arms={"adamw": SEEDS, "soap": [*BETTER[:4], math.nan]}), "the study is unfinished"),
        (Plan(arms={"adamw": [math.nan] * 5, "soap": [math.nan] * 5}), "no confirm trial of adamw, soap has ended"),
    ],
    ids=["hopeless arm", "arm that always fails", "one seed", "one arm", "unfinished", "nothing confirmed"],
)
def test_small_and_unfinished_runs_have_a_page_that_says_so(plan: Plan, said: str, tmp_path: Path) -> None:
    report = write_report(write_run(tmp_path / "run", plan))
    text = words(report)
    assert re.search(said, text), text[:2000]
    assert not re.search(r"\bnan\b|None", text)
    wins = plan.hopeless or math.isinf(plan.arms.get("soap", (0.0,))[0])
    assert verdicts(report) == (["winner"] if wins else ["unresolved"])


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("broken") / "run", Plan(arms={"adamw": SEEDS, "soap": BETTER}))


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "run")


def cut_journal(run: Path) -> None:
    text = (run / JOURNAL).read_bytes()
    (run / JOURNAL).write_bytes(text[: int(0.8 * len(text))])


def lose_curves(run: Path) -> None:
    shutil.rmtree(run / CURVES)


def lose_some_curves(run: Path) -> None:
    for file in (run / CURVES).glob("*confirm*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_journal, "Unfinished : everything below is provisional"),
        (lose_curves, "no ema validation curve"),
        (lose_some_curves, "no ema validation curve"),
    ],
)
def test_damage_that_leaves_something_is_on_the_page_and_nobody_wins(
    run: Path, damage: Callable[[Path], None], said: str
) -> None:
    damage(run)
    report = write_report(run)
    assert said in words(report)
    assert verdicts(report) == ["unresolved"]


def test_a_study_of_another_hash_is_refused_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / STUDY_HASH).write_text("0" * 64 + "\n", encoding="utf-8")
    assert main([str(run)]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert "hash" in line


def test_trials_on_other_data_forbid_a_winner(run: Path) -> None:
    journal = (run / JOURNAL).read_text(encoding="utf-8")
    lines = journal.splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if "soap.confirm.c001.s2" in line and "data_hash" in line)
    lines[place] = re.sub(r'("data_hash":\s*")[0-9a-f]{8}', r"\g<1>5eed5eed", lines[place])
    (run / JOURNAL).write_text("".join(lines), encoding="utf-8")
    report = write_report(run)
    assert "data 5eed5eed" in words(report)
    assert verdicts(report) == ["unresolved"]


def test_the_sound_run_has_a_winner(run: Path) -> None:
    assert main([str(run)]) == DONE
    assert verdicts(ReportResult(page=run, ranking=run / "report" / "ranking.json", failed_checks=())) == ["winner"]
