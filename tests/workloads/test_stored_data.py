"""A base model reaches nodes that do not see the driver's disk, by way of the run's storage."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tunebench.study.initial import Initial
from tunebench.study.spec import Workload
from tunebench.study.storage import Storage
from tunebench.tuning.node_copy import workload_here
from tunebench.workloads.starting_point import checked_hash
from tunebench.workloads.stored_data import store_initial

CONTENT = b"weights"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    found = Storage(str(tmp_path / "storage"))
    found.make()
    return found


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    """As the driver has it: with the path on its disk, and the file's hash."""
    file = tmp_path / "driver" / "base.v2.nequip.zip"
    file.parent.mkdir()
    file.write_bytes(CONTENT)
    return Workload.model_validate(
        {
            "name": "copper",
            "data": {"source": "xtb", "system": "ethanol", "frames": {"train": 1, "val": 1, "test": 1}},
            "model": {"family": "nequip"},
            "init": {"path": str(file), "sha256": hashlib.sha256(CONTENT).hexdigest()},
            "max_steps": 1,
        }
    )


def base_of(workload: Workload) -> Initial:
    assert workload.init is not None
    return workload.init


def test_a_node_without_the_file_gets_it_from_the_storage_once(
    storage: Storage, workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_initial(storage, base_of(workload))
    Path(base_of(workload).path).unlink()
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "node"))
    here = base_of(workload_here(workload, storage))
    assert here.path.startswith(str(tmp_path / "node"))
    assert here.path.endswith(".nequip.zip")  # by which it is read
    assert Path(here.path).read_bytes() == CONTENT
    assert checked_hash(here) == base_of(workload).sha256
    for name in storage.files():
        storage.drop(name)
    assert base_of(workload_here(workload, storage)) == here


def test_a_node_that_has_the_file_uses_its_own_and_never_another_one_of_that_name(
    storage: Storage, workload: Workload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNEBENCH_CACHE", str(tmp_path / "node"))
    store_initial(storage, base_of(workload))
    assert workload_here(workload, storage) == workload
    Path(base_of(workload).path).write_bytes(b"other weights")
    assert Path(base_of(workload_here(workload, storage)).path).read_bytes() == CONTENT


def test_a_workload_from_scratch_stays_as_it_is(storage: Storage, workload: Workload) -> None:
    scratch = workload.model_copy(update={"init": None})
    assert workload_here(scratch, storage) is scratch
