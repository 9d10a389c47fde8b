from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

from analysis.__main__ import BAD_INPUT, DONE, main
from analysis.compare import Joined, compare_sources
from analysis.verdict import Verdict
from tests.analysis.synthetic_run import Plan, write_run
from tunebench.study.errors import RunError

ADAMW = (0.031, 0.030, 0.032, 0.033, 0.029)
SOAP = (0.021, 0.020, 0.022, 0.023, 0.019)
WORKLOAD = "ethanol-nequip"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    first = write_run(folder / "first", Plan(arms={"adamw": ADAMW, "soap": SOAP}, top_k=2))
    second = write_run(
        folder / "second", Plan(arms={"adamw": ADAMW, "muon": (0.025, 0.026, 0.027, 0.024, 0.0255)}, top_k=2)
    )
    return first, second


def table(folder: Path, **arms: list[float | None]) -> Path:
    rows = [
        {"workload": WORKLOAD, "optimizer": name, "seed": seed, "error": error}
        for name, errors in arms.items()
        for seed, error in enumerate(errors)
    ]
    file = folder / "theirs.csv"
    pd.DataFrame(rows).to_csv(file, index=False)
    return file


def only(joined: Joined):
    (workload,) = joined.workloads
    return workload


def test_arms_of_two_runs_stand_side_by_side(runs: tuple[Path, Path]) -> None:
    workload = only(compare_sources(runs))
    assert [(arm.optimizer, arm.source) for arm in workload.arms] == [
        ("soap", "first"),
        ("muon", "second"),
        ("adamw@first", "first"),
        ("adamw@second", "second"),
    ]
    by_name = {comparison.second: comparison for comparison in workload.comparisons}
    assert by_name["muon"].redrawn is None
    assert by_name["adamw@first"].redrawn is not None
    assert by_name["muon"].search_error is not None
    assert by_name["muon"].search_error > 0.0
    assert any("independently" in note for note in workload.notes)
    assert {point.optimizer for point in workload.pareto} == {arm.optimizer for arm in workload.arms}


def test_results_from_elsewhere_join_a_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    file = table(tmp_path, lion=[0.010, 0.011, 0.012, 0.0105, 0.0115], sgd=[0.04, None, math.inf, 0.05, 0.05])
    workload = only(compare_sources([runs[0], file]))
    assert [arm.optimizer for arm in workload.arms] == ["lion", "soap", "adamw", "sgd"]
    assert workload.arms[-1].iqm == math.inf
    assert workload.decision.winner == "lion"
    assert any("cannot be checked" in note for note in workload.notes)
    assert any("pairing is arbitrary" in note for note in workload.notes)


def test_parquet_says_the_same_as_csv(runs: tuple[Path, Path], tmp_path: Path) -> None:
    file = table(tmp_path, lion=[0.010, 0.011, 0.012])
    pd.read_csv(file).to_parquet(tmp_path / "theirs.parquet", index=False)
    first, second = (compare_sources([runs[0], path]) for path in (file, tmp_path / "theirs.parquet"))
    assert only(first).decision == only(second).decision


def test_configuration_of_a_table_is_selected_on_validation(tmp_path: Path) -> None:
    rows = pd.DataFrame(
        {
            "workload": WORKLOAD,
            "optimizer": "lion",
            "config": [0, 0, 0, 1, 1, 1],
            "seed": [0, 1, 2, 0, 1, 2],
            "error": [0.01, 0.01, 0.01, 0.02, 0.02, 0.02],
            "validation": [0.9, 0.9, 0.9, 0.5, 0.5, 0.5],
            "device_s": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
        }
    )
    rows.to_csv(tmp_path / "a.csv", index=False)
    rows.assign(optimizer="adamw").to_csv(tmp_path / "b.csv", index=False)
    workload = only(compare_sources([tmp_path / "a.csv", tmp_path / "b.csv"]))
    assert [arm.iqm for arm in workload.arms] == pytest.approx([0.02, 0.02])
    assert [point.device_s for point in workload.pareto] == [5.0, 5.0]
    assert workload.decision.verdict is Verdict.UNRESOLVED


def test_unfinished_run_forbids_a_claim(runs: tuple[Path, Path], tmp_path: Path) -> None:
    half = write_run(tmp_path / "half", Plan(arms={"muon": (0.01, 0.011, 0.012, 0.013, math.nan)}))
    decision = only(compare_sources([runs[0], half])).decision
    assert decision.winner is None
    assert "half: ethanol-nequip/muon: 4 of 5 confirm trials have ended" in decision.sentence


def test_other_data_under_the_same_name_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(runs[1], other)
    journal = other / "journal.log"
    lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
    text = json.dumps(lines).replace('"data_hash": "', '"data_hash": "5eed')
    journal.write_text("\n".join(json.dumps(line) for line in json.loads(text)) + "\n", encoding="utf-8")
    with pytest.raises(RunError, match="ethanol-nequip: found other data, model or horizon in other than in first"):
        compare_sources([runs[0], other])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("workload,optimizer,seed\nw,a,0\n", "found no column error"),
        ("workload,optimizer,seed,error\n", "found no rows"),
        ("workload,optimizer,seed,error\nw,a,0.5,1\n", "seed: found 0.5"),
        ("workload,optimizer,seed,error\nw,a,0,-1\n", "error: found -1"),
        ("workload,optimizer,seed,error\nw,a,0,x\n", "error: found"),
        ("workload,optimizer,seed,error\nw,a,0,1\nw,a,0,2\n", "w/a config 0 seed 0 twice"),
        ("workload,optimizer,seed,error\nw,,0,1\n", "optimizer: found an empty cell"),
        ("workload,optimizer,seed,error,config\nw,a,0,1,0\nw,a,0,1,1\n", "w/a: validation: found an empty cell"),
    ],
)
def test_tables_that_break_the_form_are_one_line(
    text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.csv").write_text(text, encoding="utf-8")
    assert main(["compare", str(tmp_path / "bad.csv"), str(tmp_path / "bad.csv")]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert expected in line


def test_one_source_or_one_given_twice_is_refused(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs[0])]) == BAD_INPUT
    assert "found 1 source" in capsys.readouterr().err
    assert main(["compare", str(runs[0]), str(runs[0])]) == BAD_INPUT
    assert "found first twice" in capsys.readouterr().err


def test_command_prints_sentences_or_json(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, runs)]) == DONE
    out = capsys.readouterr().out
    assert out.startswith("ethanol-nequip: ")
    assert "overall: " in out
    assert main(["compare", *map(str, runs), "--json"]) == DONE
    assert json.loads(capsys.readouterr().out)["sources"] == ["first", "second"]
