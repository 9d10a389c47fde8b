from __future__ import annotations

import base64
import csv
import gzip
import json
import math
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from analysis.__main__ import BAD_INPUT, CHECK_FAILED, DONE, main
from analysis.charts import search_charts
from analysis.report import ReportResult, write_report
from tests.analysis.synthetic_run import Plan, write_run
from tunebench.study.record import CURVES, ENVIRONMENT, JOURNAL, STUDY

ARMS = {"adamw": (0.03, 0.031, 0.032, 0.033, 0.034), "soap": (0.02, 0.021, math.inf, 0.023, 0.024)}
DESCRIPTION = 'Is <b>soap</b> & "water" better?'


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("command") / "run", Plan(arms=ARMS, description=DESCRIPTION))
    assert main([str(folder)]) == DONE
    return folder


def packed(page: str, name: str) -> Any:
    """What the page carries for its script."""
    found = re.search(rf'<script type="text/plain" id="packed-{name}">([^<]*)</script>', page)
    assert found is not None
    return json.loads(gzip.decompress(base64.b64decode(found.group(1))))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_report_holds_page_ranking_tables_and_figures(run: Path) -> None:
    report = run / "report"
    assert json.loads((report / "ranking.json").read_text(encoding="utf-8"))["study"] == "synthetic"
    for figure in ("errors", "learning", "pareto", "tuning", "best-of-n", "sensitivity", "endings"):
        assert (report / "figures" / f"ethanol-nequip-{figure}.svg").stat().st_size > 1000
        table = (report / "tables" / "figures" / f"ethanol-nequip-{figure}.csv").read_text(encoding="utf-8")
        assert len(table.splitlines()) > 3
    with (report / "tables" / "trials.csv").open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * (6 + 5)
    assert {row["reason"] for row in rows} == {"FINISHED", "STOPPED_ASHA", "DIVERGED"}


def test_page_is_one_file_without_foreign_parts(run: Path) -> None:
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|<script[^>]* src=|<link(?! rel=\"icon\" href=\"data:)", page)
    assert "default-src 'none'" in page


def test_page_points_to_warnings(run: Path) -> None:
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert '1 <a href="#checks">warning</a>' in page
    assert "largest over smallest share of device-seconds" in page


def test_page_escapes_what_the_study_says(run: Path) -> None:
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    assert "<b>soap</b>" not in page
    assert "&lt;b&gt;soap&lt;/b&gt; &amp;" in page


def test_page_shows_the_environment_and_what_changed_later(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    environment = {"packages": {"torch": "2.13.0"}, "gpus": [], "later": [{"packages": {"torch": "2.14.0"}}]}
    (folder / ENVIRONMENT).write_text(json.dumps(environment), encoding="utf-8")
    assert main([str(folder)]) == DONE
    text = re.sub(r"<[^>]*>|\s+", " ", (folder / "report" / "index.html").read_text(encoding="utf-8"))
    words = " ".join(text.split())
    assert "packages.torch 2.13.0 gpus [] later.0.packages.torch 2.14.0" in words


def test_page_tells_every_trials_end(run: Path) -> None:
    page = (run / "report" / "index.html").read_text(encoding="utf-8")
    trials = packed(page, "trials")
    assert "loss is not finite at step 30" in trials["why"]
    assert any(re.fullmatch(r"rung 60: 0\.\d+ above cutoff 0\.\d+", why) for why in trials["why"])
    assert len(trials["why"]) == 2 * (6 + 5)
    assert "5 (1 failed)" in page


def test_figures_and_tables_are_the_same_every_time(run: Path, tmp_path: Path) -> None:
    assert main([str(run), "--out", str(tmp_path)]) == DONE
    for file in (run / "report").rglob("*"):
        if file.is_file():
            again, once = (tmp_path / file.relative_to(run / "report")).read_bytes(), file.read_bytes()
            if file.name == "summary.md":  # its last line names the page
                again, once = (text.partition(b"The report with every trial:")[0] for text in (again, once))
            assert again == once, file.name


def test_json_prints_the_ranking_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--json", "--out", str(tmp_path)]) == DONE
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "ranking.json").read_text(encoding="utf-8"))


def test_missing_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == BAD_INPUT
    assert "nowhere" in one_line(capsys)


def test_edited_study_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / STUDY).write_text(
        (folder / STUDY).read_text(encoding="utf-8").replace("seed: 7", "seed: 8"), encoding="utf-8"
    )
    assert main([str(folder)]) == BAD_INPUT
    assert STUDY in one_line(capsys)


def test_foreign_journal_is_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / JOURNAL).write_text("not a journal\nat all\n", encoding="utf-8")
    assert main([str(folder)]) == BAD_INPUT
    assert JOURNAL in one_line(capsys)


def test_damaged_curve_makes_a_report_and_fails_a_check(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    file = folder / CURVES / "ethanol-nequip.soap.confirm.c001.s1.parquet"
    file.write_bytes(file.read_bytes()[:200])
    assert main([str(folder)]) == CHECK_FAILED
    assert file.name in capsys.readouterr().out
    assert "Check failed" in (folder / "report" / "index.html").read_text(encoding="utf-8")


def test_report_of_a_sound_run_names_its_files_and_no_failed_check(run: Path, tmp_path: Path) -> None:
    report = write_report(run, tmp_path)
    assert report == ReportResult(page=tmp_path / "index.html", ranking=tmp_path / "ranking.json", failed_checks=())
    assert report.page.is_file()
    assert report.ranking.is_file()


def test_report_names_each_failed_check_in_one_line(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    for name in ("a", "b"):
        (folder / CURVES / f"{name}.parquet").write_bytes(b"")
    (line,) = write_report(folder).failed_checks
    assert line == f"curve files belong to trials of the journal: {CURVES}/a.parquet belongs to no trial (and 1 more)"


def test_journal_cut_in_mid_entry_is_read_up_to_there(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    text = (folder / JOURNAL).read_bytes()
    (folder / JOURNAL).write_bytes(text[:-20])
    assert main([str(folder)]) == DONE
    assert json.loads((folder / "report" / "ranking.json").read_text(encoding="utf-8"))["finished"] is False


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3])
def test_run_that_has_hardly_begun_has_a_report(run: Path, tmp_path: Path, share: float) -> None:
    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("report"))
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    (folder / JOURNAL).write_bytes(b"".join(lines[: int(share * len(lines))]))
    shutil.rmtree(folder / CURVES)
    assert main([str(folder)]) in (DONE, CHECK_FAILED)
    assert "Unfinished" in (folder / "report" / "index.html").read_text(encoding="utf-8")


def test_analysis_imports_neither_ray_nor_torch(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from analysis.__main__ import main; code = main(sys.argv[1:]); "
        "print(sorted({'ray', 'torch', 'nequip', 'lightning'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, str(run), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == DONE, done.stderr
    assert done.stderr.strip() == "[]"


def test_every_figure_finds_its_layout_also_without_a_failed_trial(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_charts, "ended_value", lambda trial: trial.value or 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert main([str(run), "--out", str(tmp_path / "report")]) == DONE
