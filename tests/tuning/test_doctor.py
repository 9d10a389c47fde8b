from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.tuning.conftest import tunebench
from tunebench.cli import run_command
from tunebench.study.software import Software
from tunebench.tuning.doctor import NodeReport, judge, node_report

SOFTWARE = Software(python="3.11.7", packages={"torch": "2", "nequip": "1", "ray": "3"}, source="a", cuda=None)
WELL = NodeReport(
    software=SOFTWARE,
    gpus=[],
    reads=True,
    storage_error="",
    free_bytes=2**40,
    clock_s=0.0,
)


def with_packages(**versions: str | None) -> NodeReport:
    return replace(WELL, software=replace(SOFTWARE, packages={**SOFTWARE.packages, **versions}))


def mends(node: NodeReport, skew_s: float = 0.0) -> dict[str, str]:
    return {finding.check: finding.mend for finding in judge("a node", node, WELL, skew_s) if finding.mend}


def test_a_healthy_node_needs_no_mending() -> None:
    assert mends(WELL) == {}


@pytest.mark.parametrize(
    ("node", "skew_s", "check", "mend"),
    [
        (with_packages(nequip=None), 0.0, "versions", "install nequip"),
        (with_packages(torch="1"), 0.0, "versions", "the versions of the driver"),
        (replace(WELL, gpus=["A100"]), 0.0, "versions", "the versions of the driver"),  # no CUDA for it
        (replace(WELL, reads=False), 0.0, "storage", "a folder that all nodes share"),
        (replace(WELL, storage_error="Read-only file system"), 0.0, "storage", "a folder that all nodes share"),
        (replace(WELL, free_bytes=2**20), 0.0, "free space", "at least 2 GiB"),
        (WELL, -6.0, "clock", "synchronise clocks"),
    ],
)
def test_what_is_wrong_with_a_node_is_named_with_its_mend(
    node: NodeReport, skew_s: float, check: str, mend: str
) -> None:
    assert list(mends(node, skew_s)) == [check]
    assert mends(node, skew_s)[check].startswith(mend)


def test_a_machine_tells_whether_it_can_write_and_see_the_probe(tmp_path: Path) -> None:
    (tmp_path / "probe").write_bytes(b"now")
    assert node_report(tmp_path, "probe", b"now").reads
    assert not node_report(tmp_path, "probe", b"before").reads
    assert not node_report(tmp_path, "elsewhere", b"now").reads
    assert node_report(tmp_path / "missing", "probe", b"now").storage_error
    assert [file.name for file in tmp_path.iterdir()] == ["probe"]


def test_this_machine_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["doctor", "--folder", str(tmp_path / "runs"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [finding["check"] for finding in found] == ["versions", "devices", "storage", "free space", "clock"]
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert run_command(["doctor", "--folder", str(tmp_path / "file" / "runs")]) == 1
    assert "a folder that can be written" in capsys.readouterr().out


def test_every_node_of_a_cluster_is_asked(tmp_path: Path) -> None:
    found = json.loads(tunebench("doctor", "--folder", tmp_path, "--address", "local", "--json").stdout)
    assert len({finding["where"] for finding in found}) == 2
    assert all(finding["ok"] for finding in found)
