"""What of a run directory the driver copies to its storage."""

from __future__ import annotations

from pathlib import Path

from tunebench.study.run_copy import RunCopy
from tunebench.study.storage import Storage


def test_the_drivers_own_files_are_stored_and_a_trials_log_is_not(tmp_path: Path) -> None:
    run, storage = tmp_path / "run", Storage(str(tmp_path / "kept"))
    storage.make()
    own = ["journal.log", "logs/driver.log", "properties/ethanol.adamw.confirm.c000.s0.parquet", "properties/emt.json"]
    for name in [*own, "logs/ethanol.adamw.confirm.c000.s0.log", "properties/emt.json.partial", "control"]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    with RunCopy(run, storage):
        pass
    assert sorted(storage.files()) == sorted(own)
