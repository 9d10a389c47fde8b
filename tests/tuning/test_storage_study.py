"""A study whose checkpoints and curves are kept in a real S3 server, with all that may happen to either."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.s3 import BUCKET, S3Server, s3_server
from tests.tuning.conftest import STUDY, tunebench, write_study
from tests.tuning.driver import Driver
from tests.tuning.test_kill import order_of_arms
from tunebench.cli import run_command
from tunebench.study.journal import read_trials
from tunebench.study.record import JOURNAL
from tunebench.study.storage import Storage

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture
def server() -> Iterator[S3Server]:
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


def addresses(storage: str) -> list[str]:
    """Storages of the runs below an address."""
    return [f"{storage}/{name.split('/')[0]}" for name in Storage(storage).files() if name.endswith("/study.sha256")]


@pytest.mark.skipif("TUNEBENCH_S3_STUDY" not in os.environ, reason="takes minutes: set TUNEBENCH_S3_STUDY=1")
def test_a_study_goes_on_from_its_storage_when_driver_and_disk_are_gone(
    server: S3Server, finished_study: Path, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "cache of the first machine"))
    storage = Storage(f"s3://{BUCKET}/studies")
    driver = Driver(finished_study, tmp_path / "run", "--storage", storage.address)
    try:
        driver.wait(lambda: any(name.endswith("last.pt") for name in storage.files()))
        os.kill(driver.process.pid, signal.SIGKILL)
    finally:
        driver.end()
    shutil.rmtree(tmp_path / "run")
    (address,) = addresses(storage.address)
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "cache of another machine"))
    tunebench("run", address, "--run", tmp_path / "other")
    assert run_command(["fetch", address, "--run", str(tmp_path / "fetched")]) == 0
    assert run_command(["report", str(tmp_path / "fetched")]) == 0
    assert order_of_arms(tmp_path / "fetched") == order_of_arms(finished_run)
    trials = read_trials(tmp_path / "fetched")
    assert max(trial.ledger["attempts"] for trial in trials) > 1
    kept = {name.split("/")[1] for name in Storage(address).files("checkpoints")}
    assert kept == {trial.key.trial_id for trial in trials if trial.key.stage == "confirm"}


def test_a_bucket_that_goes_away_stops_the_study_in_one_line_and_refuses_the_next_start(
    server: S3Server, tmp_path: Path
) -> None:
    import boto3

    long = {**STUDY["workloads"][0], "max_steps": 2000, "evaluate_every_steps": 12}
    short: dict[str, Any] = {"tune": {"trials_per_arm": 1, "asha": None}, "confirm": {"top_k": 1, "seeds": 1}}
    study = write_study(tmp_path, engine="cohort", workloads=[long], optimizers=["adamw"], **short)
    storage = Storage(f"s3://{BUCKET}/studies")
    driver = Driver(study, tmp_path / "run", "--storage", storage.address)
    try:
        driver.wait(lambda: any(name.endswith("last.pt") for name in storage.files()))
        bucket = boto3.resource("s3").Bucket(BUCKET)
        bucket.objects.delete()
        bucket.delete()
        code, output = driver.finish()
    finally:
        driver.end()
    assert code == 1
    line = output.splitlines()[-1]
    assert line.startswith("tunebench: the storage failed: s3://")
    assert "bucket does not exist" in line
    assert [trial.reason for trial in read_trials(tmp_path / "run")] == [None]
    again = tunebench("run", tmp_path / "run", check=False)
    assert again.returncode == 2
    (line,) = again.stderr.splitlines()
    assert "bucket does not exist" in line
    assert (tmp_path / "run" / JOURNAL).exists()


def test_wrong_keys_are_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import boto3

    # moto asks for keys only in this form; every key is then a wrong one
    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "1")
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(boto3.exceptions.botocore.exceptions.ClientError):
            boto3.client("s3").list_buckets()
        study = write_study(tmp_path, waive=STUDY["waive"])
        options = ["--run", str(tmp_path / "run"), "--storage", f"s3://{BUCKET}/studies"]
        assert run_command(["run", str(study), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tunebench: the storage failed: s3://{BUCKET}/studies/small-")
    assert not (tmp_path / "run").exists()
