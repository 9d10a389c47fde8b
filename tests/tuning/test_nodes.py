"""Nodes of a real Ray cluster that join, leave or do not match, while a study runs on it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tuning.conftest import STUDY, python_path, tunebench, write_study
from tests.tuning.driver import Driver
from tunebench.study.journal import read_trials
from tunebench.study.record import Reason
from tunebench.tuning.trial_log import LOGS

SMALL: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 2**27, "include_dashboard": False}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of one node with one core, which has no devices but that core."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    from ray.cluster_utils import Cluster  # reads its environment when it is imported

    cluster = Cluster(initialize_head=True, head_node_args=SMALL)
    yield cluster
    cluster.shutdown()


def with_old_e3nn(folder: Path) -> dict[str, str]:
    """Environment of a node that finds another e3nn installed."""
    about = folder / "old" / "e3nn-0.5.0.dist-info" / "METADATA"
    about.parent.mkdir(parents=True)
    about.write_text("Metadata-Version: 2.1\nName: e3nn\nVersion: 0.5.0\n")
    return {"PYTHONPATH": python_path(about.parents[1])}


def test_a_study_is_refused_where_a_node_runs_other_versions(cluster: Any, tmp_path: Path) -> None:
    cluster.add_node(**SMALL, env_vars=with_old_e3nn(tmp_path))
    study = write_study(tmp_path, engine="cohort")
    done = tunebench("run", study, "--run", tmp_path / "run", "--address", cluster.address, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(r"tunebench: node \S+: found e3nn 0\.5\.0, allowed: [\d.]+", line)
    assert all(trial.state == "WAITING" for trial in read_trials(tmp_path / "run"))


def drain(cluster: Any, node: Any) -> None:
    """Announce that a node will be taken in ten minutes, as whoever runs spot machines does."""
    command = [str(Path(sys.executable).parent / "ray"), "drain-node", "--address", cluster.address]
    command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([*command, "--deadline-remaining-seconds", "600"], check=True, capture_output=True, timeout=120)


def test_nodes_that_join_are_checked_and_used_and_those_about_to_go_are_left(cluster: Any, tmp_path: Path) -> None:
    long = {**STUDY["workloads"][0], "max_steps": 480, "evaluate_every_steps": 12}
    study = write_study(
        tmp_path,
        engine="cohort",
        workloads=[long],
        optimizers=["adamw"],
        resources={"slots": 2},
        tune={"trials_per_arm": 4, "asha": None},
        confirm={"top_k": 1, "seeds": 1},
    )
    driver = Driver(study, tmp_path / "run", "--address", cluster.address)
    logs = tmp_path / "run" / LOGS
    try:
        driver.wait(driver.saved)
        cluster.add_node(**SMALL, env_vars=with_old_e3nn(tmp_path))
        node = cluster.add_node(**SMALL)
        joined = time.monotonic()
        log = logs / "cohort-1.log"
        driver.wait(lambda: log.exists() and "is open" in log.read_text())
        used_after_s = time.monotonic() - joined
        first = driver.saved()
        driver.wait(lambda: len(driver.saved()) == 4)
        second = driver.saved().keys() - first.keys()
        drain(cluster, node)
        told = time.monotonic()
        driver.wait(lambda: "is being drained" in (logs / "pool.log").read_text())
        driver.wait(lambda: "cohort 1 on node" in (logs / "pool.log").read_text())
        left_after_s = time.monotonic() - told
        code, output = driver.finish()
    finally:
        driver.end()
    assert code == 0, output
    print(f"used after {used_after_s:.1f} s, left after {left_after_s:.1f} s")
    assert used_after_s < 60.0
    assert output.count("found e3nn 0.5.0") == 1
    assert output.count("it is being drained") == 1
    assert not list(logs.glob("cohort-2.log"))
    trials = {trial.key.trial_id: trial for trial in read_trials(tmp_path / "run")}
    assert {trial.reason for trial in trials.values()} == {Reason.FINISHED}
    assert {trials[name].ledger["attempts"] for name in second} == {2.0}
    assert {trial.ledger["lost_steps"] for trial in trials.values()} == {0}
