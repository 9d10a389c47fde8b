"""Nodes of a real Ray cluster that join, leave or do not match, while a study runs on it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tuning.conftest import STUDY, python_path, tunebench, write_study
from tests.tuning.driver import Driver
from tunebench.engine.book import last_evaluation
from tunebench.engine.task import Evaluation
from tunebench.study.journal import read_trials
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
    endless = {**STUDY["workloads"][0], "max_steps": 100_000, "evaluate_every_steps": 10}
    study = write_study(
        tmp_path,
        engine="cohort",
        workloads=[endless],
        optimizers=["adamw"],
        resources={"slots": 2},
        tune={"trials_per_arm": 4, "asha": None},
    )
    driver = Driver(study, tmp_path / "run", "--address", cluster.address)
    logs = tmp_path / "run" / LOGS

    def is_open(cohort: int) -> bool:
        log = logs / f"cohort-{cohort}.log"
        return log.exists() and "is open" in log.read_text()

    def went_on(name: str, before: Evaluation | None) -> bool:
        now = last_evaluation(tmp_path / "run", name)
        return now is not None and before is not None and now.attempts > before.attempts

    try:
        driver.wait(driver.saved, timeout_s=600.0)
        first = driver.saved().keys()
        cluster.add_node(**SMALL, env_vars=with_old_e3nn(tmp_path))
        node = cluster.add_node(**SMALL)
        driver.wait(lambda: is_open(1))
        driver.wait(lambda: len(driver.saved()) == 4)
        moved = sorted(driver.saved().keys() - first)
        drain(cluster, node)
        driver.wait(lambda: "ended: its node is being drained" in (logs / "pool.log").read_text())
        saved = [last_evaluation(tmp_path / "run", name) for name in moved]
        cluster.add_node(**SMALL)
        driver.wait(lambda: is_open(2))
        driver.wait(lambda: all(map(went_on, moved, saved)))
        now = [last_evaluation(tmp_path / "run", name) for name in moved]
    finally:
        driver.end()
    events = (logs / "pool.log").read_text()
    assert events.count("found e3nn 0.5.0") == 1
    assert events.count("it is being drained, its trials go on elsewhere") == 1
    assert len(moved) == 2
    for before, after in zip(saved, now, strict=True):
        assert before is not None
        assert after is not None
        assert (before.attempts, after.attempts) == (1, 2)
        assert after.step > before.step
        assert after.lost.steps == 0
