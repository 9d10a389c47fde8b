from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

import pytest

from tests.s3 import BUCKET, KEYS, S3Server, s3_server
from tunebench.study.storage import STORAGE_FAILED, Storage, StorageError

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(params=["s3", "folder", "file address"])
def storage(request: pytest.FixtureRequest, server: S3Server, tmp_path: Path) -> Storage:
    address = {
        "s3": f"s3://{BUCKET}/{tmp_path.name}",
        "folder": str(tmp_path / "kept"),
        "file address": f"file://{tmp_path}/kept",
    }[request.param]
    storage = Storage(address, patience_s=1.0)
    storage.make()
    return storage


def test_what_is_put_is_listed_and_comes_back_until_it_is_dropped(storage: Storage, tmp_path: Path) -> None:
    began = time.time()
    (tmp_path / "file").write_bytes(b"one")
    storage.put("curves/a.parquet", tmp_path / "file")
    storage.write("journal.log", b"three")
    assert {name: stored.size for name, stored in storage.files().items()} == {"curves/a.parquet": 3, "journal.log": 5}
    changed = storage.files("curves")["curves/a.parquet"].changed
    assert changed is not None
    assert abs(changed - began) < 60.0
    (tmp_path / "file").write_bytes(b"another")
    storage.put("curves/a.parquet", tmp_path / "file")
    assert storage.read("curves/a.parquet") == b"another"
    assert storage.get("curves/a.parquet", tmp_path / "new" / "a.parquet")
    assert (tmp_path / "new" / "a.parquet").read_bytes() == b"another"
    storage.drop("curves")
    assert list(storage.files()) == ["journal.log"]


def test_what_is_not_there_is_none_and_leaves_no_file(storage: Storage, tmp_path: Path) -> None:
    storage.write("something", b"")
    assert storage.read("nothing") is None
    assert not storage.get("nothing", tmp_path / "here")
    assert storage.files("nothing") == {}
    storage.drop("nothing")
    assert not (tmp_path / "here").exists()


def test_another_process_sees_the_same_files(storage: Storage) -> None:
    storage.write("x", b"first")
    assert storage.read("x") == b"first"
    script = "import pickle, sys; pickle.load(sys.stdin.buffer).write('x', b'second')"
    subprocess.run([sys.executable, "-c", script], input=pickle.dumps(storage), check=True, timeout=60)
    assert storage.read("x") == b"second"


def test_a_killed_upload_leaves_the_file_of_before(storage: Storage, tmp_path: Path) -> None:
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(400 * 2**20)
    storage.write("last.pt", b"whole")
    script = (
        "import pickle, sys, pathlib; storage = pickle.load(sys.stdin.buffer); storage.files(); print(flush=True)\n"
        "storage.put('last.pt', pathlib.Path(sys.argv[1]))"
    )
    upload = subprocess.Popen(
        [sys.executable, "-c", script, big], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    )
    assert upload.stdin is not None
    assert upload.stdout is not None
    upload.stdin.write(pickle.dumps(storage))
    upload.stdin.close()
    upload.stdout.readline()
    time.sleep(0.1)  # 400 MiB take longer
    os.kill(upload.pid, signal.SIGKILL)
    upload.wait()
    assert upload.returncode == -signal.SIGKILL
    assert storage.read("last.pt") == b"whole"
    assert list(storage.files()) == ["last.pt"]


@pytest.mark.parametrize(
    ("address", "environment", "what"),
    [
        ("s3://no-such-bucket/x", {}, "bucket"),
        (f"s3://{BUCKET}/x", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "connect"),
        ("nowhere://x", {}, "nowhere"),
    ],
)
def test_storage_that_cannot_be_had_is_told_in_one_line(
    server: S3Server, address: str, environment: dict[str, str], what: str
) -> None:
    script = f"""
from tunebench.study.storage import *
import sys
try: Storage({address!r}, patience_s=1.0).write("x", b"1")
except StorageError as error: print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"{STORAGE_FAILED}: {address}: cannot write x: found ")
    assert what in line.lower()


def test_missing_keys_are_not_waited_for(server: S3Server, tmp_path: Path) -> None:
    script = f"from tunebench.study.storage import *; Storage('s3://{BUCKET}/x').read('x')"
    environment = {k: v for k, v in os.environ.items() if k not in KEYS} | {
        "HOME": str(tmp_path), "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert "credentials" in done.stderr.splitlines()[-1].lower()


def test_a_server_that_does_not_answer_for_seconds_is_waited_for(server: S3Server) -> None:
    storage = Storage(f"s3://{BUCKET}/wait")
    storage.write("x", b"1")
    server.pause()
    Timer(3.0, server.go_on).start()
    storage.write("x", b"2")
    assert storage.read("x") == b"2"


def test_a_folder_whose_disk_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "mounted"), patience_s=1.0)
    for use in (lambda: storage.write("x", b"1"), lambda: storage.read("x")):
        with pytest.raises(StorageError, match="mounted"):
            use()
    assert not (tmp_path / "mounted").exists()
