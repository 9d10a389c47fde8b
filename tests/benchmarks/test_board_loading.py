from __future__ import annotations

from pathlib import Path

from benchmarks.board_loading import loading_seconds, write_run


def test_a_run_is_shown_whole(tmp_path: Path) -> None:
    arms = write_run(tmp_path, 30, 2)
    seconds = loading_seconds(tmp_path, 30, len(arms), data_server=False)
    assert len(arms) == 10
    assert 0.0 < seconds["arms' curves"] <= seconds["tags of all runs"] <= seconds["all in HPARAMS"] < 60.0
