from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from analysis.__main__ import BAD_INPUT, main
from analysis.watch import watch
from tests.analysis.synthetic_run import Plan, write_run
from tunebench.study.record import CURVES, JOURNAL


def test_the_report_follows_the_run_to_its_end(tmp_path: Path) -> None:
    going = write_run(tmp_path / "run", Plan(arms={"adamw": (0.03, math.nan)}))
    ended = write_run(tmp_path / "ended", Plan(arms={"adamw": (0.03, 0.04)}))
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:  # at the first look nothing has changed
            shutil.copytree(ended / CURVES, going / CURVES, dirs_exist_ok=True)
            shutil.copy(ended / JOURNAL, going / JOURNAL)

    pages = []
    for ranking, page in watch(going, every_s=7, wait=wait):
        pages.append((ranking.finished, page.read_text(encoding="utf-8")))
    assert waited == [7, 7]
    assert [finished for finished, _ in pages] == [False, True]
    assert '<meta http-equiv="refresh" content="7">' in pages[0][1]
    assert "every 7 s" in pages[0][1]
    assert 'http-equiv="refresh"' not in pages[1][1]


@pytest.mark.parametrize("every", ["0", "-1", "soon"])
def test_a_time_between_looks_that_is_none_is_refused(every: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["watch", "run", f"--every={every}"])
    assert ended.value.code == BAD_INPUT
    assert "allowed: a whole number of seconds" in capsys.readouterr().err


def test_a_run_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path / "nowhere")]) == BAD_INPUT
    assert len(capsys.readouterr().err.splitlines()) == 1
